"""The 52 systems as data: what each is, what its paper reports, what we claim of it, and whether it can be run.

Everything here is read from ``catalog.toml``, from the recipes' source and from ``results/``; nothing imports torch,
so ``isthmus list`` and ``isthmus show`` answer at once. ``python -m isthmus.catalog --readme`` rewrites the table of
systems in the README.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import json
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

PARTS = (
    "encoder",
    "bottleneck",
    "decoder",
    "prior",
    "sampler",
    "objective",
    "compression",
    "lens",
    "robustness",
    "layer",
)
CATALOG = Path(__file__).with_name("catalog.toml")
RECIPES = Path(__file__).with_name("recipes")
TRAINING = Path(__file__).with_name("engine") / "training.py"
Rule = Literal["mean", "every"]


class UnknownSystem(ValueError):
    """No system has that name; the message shows the nearest ones."""


@dataclass(frozen=True)
class Claim:
    """A sentence that a measurement can refute, with the bar it has to clear.

    Attributes:
        name: short, unique within the system.
        text: the claim in words.
        metric: the name under which the recipe records the number.
        at_least: lower bar, inclusive; ``None`` if there is none.
        at_most: upper bar, inclusive; ``None`` if there is none.
        rule: ``"mean"``: the mean over seeds clears the bar; ``"every"``: each seed does.
        published: what the paper reports for the same thing, in its own terms.
    """

    name: str
    text: str
    metric: str
    at_least: float | None = None
    at_most: float | None = None
    rule: Rule = "mean"
    published: str | None = None

    def __post_init__(self) -> None:
        if self.at_least is None and self.at_most is None:
            raise ValueError(f"claim {self.name!r} has no bar; give at_least, at_most or both.")
        if self.rule not in ("mean", "every"):
            raise ValueError(f"claim {self.name!r} has the rule {self.rule!r}; it is 'mean' or 'every'.")

    @property
    def bar(self) -> str:
        """The bar as people write it, such as ``≥ 0.04``."""
        bars = [f"≥ {self.at_least:g}"] if self.at_least is not None else []
        bars += [f"≤ {self.at_most:g}"] if self.at_most is not None else []
        return " and ".join(bars)


@dataclass(frozen=True)
class System:
    """One published system. ``arxiv``, ``venue`` and ``headline`` are ``None`` where nothing could be confirmed."""

    number: int
    name: str
    title: str
    authors: str
    year: int
    part: str
    summary: str
    data: tuple[str, ...] = ()
    venue: str | None = None
    arxiv: str | None = None
    headline: str | None = None
    claims: tuple[Claim, ...] = ()

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"system {self.name!r} has the part {self.part!r}; it is one of {', '.join(PARTS)}.")

    @property
    def slug(self) -> str:
        """Number and name, such as ``02-meg-decoding``."""
        return f"{self.number:02d}-{self.name}"

    @property
    def module(self) -> str:
        """The name in Python, such as ``meg_decoding``."""
        return self.name.replace("-", "_")

    @property
    def recipe(self) -> Path:
        """Where the recipe is, or will be."""
        return RECIPES / f"{self.module}.py"

    @property
    def ready(self) -> bool:
        """A system is ready when its recipe exists."""
        return self.recipe.is_file()

    @property
    def url(self) -> str | None:
        """The paper's page."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None


@functools.cache
def systems() -> tuple[System, ...]:
    """All systems, in the order of their numbers."""
    with CATALOG.open("rb") as file:
        tables = tomllib.load(file)["system"]
    found = []
    for table in tables:
        claims = tuple(Claim(**claim) for claim in table.pop("claims", ()))
        if len({claim.name for claim in claims}) < len(claims):
            raise ValueError(f"system {table['name']!r} has two claims of one name.")
        found.append(System(**{**table, "data": tuple(table.get("data", ()))}, claims=claims))
    return tuple(found)


def find(name: str) -> System:
    """The system of a name in any spelling: ``spark``, ``SparK``, ``01``, ``1``, ``01-spark``, ``meg_decoding``.

    Raises:
        UnknownSystem: no system is called that; the nearest names are in the message.
    """
    wanted = name.strip().lower().replace("_", "-").removesuffix(".py")
    everything = systems()
    for system in everything:
        if wanted in (system.name, system.slug) or (wanted.isdigit() and int(wanted) == system.number):
            return system
    known = {spelling: s.name for s in everything for spelling in (s.name, s.slug, s.name.replace("-", ""))}
    near = [s.name for s in everything if len(wanted) > 2 and wanted in f"{s.name} {s.title.lower()}"]
    near += difflib.get_close_matches(re.sub(r"^\d+-", "", wanted), known, n=6, cutoff=0.5)
    names = list(dict.fromkeys(known.get(spelling, spelling) for spelling in near))[:4]
    told = f"Nearest: {', '.join(names)}." if names else "`isthmus list` shows all of them."
    raise UnknownSystem(f"no system is called {name!r}. {told}")


# ---------------------------------------------------------------------------------------- what was measured before


def results_folder() -> Path:
    """Where measured results are read from: ``./results`` if it is one of ours, else what came with the package."""
    package = Path(__file__).parent
    for folder in (Path("results"), package / "_results", package.parents[1] / "results"):
        if (folder / "claims").is_dir():
            return folder
    return Path("results")


def measured(system: System, results: Path | None = None) -> dict[str, Any] | None:
    """The newest verdict file of a system (its form is in ``report.py``); ``None`` where nothing was measured.

    Raises:
        ValueError: the file is not JSON of the known form.
    """
    path = (results or results_folder()) / "claims" / f"{system.name}.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); measure it again or restore it.") from error
    if not isinstance(found, dict) or found.get("format") != "isthmus-claims":
        raise ValueError(f"{path} was not written by `isthmus claim`; move it away.")
    return found


def verdict_of(claim: Claim, record: dict[str, Any] | None) -> bool | None:
    """Whether a claim was found to hold; ``None`` if it was not measured, or had another bar when it was."""
    for verdict in (record or {}).get("verdicts", ()):
        if verdict["name"] == claim.name and (verdict["metric"], verdict["bar"], verdict["rule"]) == (
            claim.metric,
            claim.bar,
            claim.rule,
        ):
            return verdict["holds"]
    return None


def figure_of(verdict: dict[str, Any]) -> str:
    """Mean and spread over seeds as people read them."""
    if verdict["mean"] is None:
        return "not finite"
    return (
        f"{verdict['mean']:.4g} ± {verdict['spread']:.2g}" if len(verdict["values"]) > 1 else f"{verdict['mean']:.4g}"
    )


# ----------------------------------------------------------------------------------- a recipe's settings, unimported


@dataclass(frozen=True)
class Setting:
    """One flag of a recipe: its type and default as written, the paper's value if given, and what it means.

    ``usual`` marks a field of a nested ``Training`` that the recipe leaves as ``Training`` has it.
    """

    name: str
    type: str
    default: str
    paper: str | None
    doc: str
    usual: bool = False


def settings(recipe: Path, class_name: str = "Config") -> list[Setting]:
    """The fields of a recipe's ``Config``, read from its source, so that nothing heavy is imported.

    A field's documentation is the string below it, or the ``#`` comment beside or above it. The paper's values are
    the keyword arguments of the call that ``Config.paper()`` returns. A field of the type ``Training`` becomes the
    fields of ``Training``, with its name in front.
    """
    source = recipe.read_text(encoding="utf-8")
    module = ast.parse(source).body
    classes = {node.name: node for node in module if isinstance(node, ast.ClassDef)}
    constants = {node.targets[0].id: node.value for node in module if _names_one(node)}
    if class_name not in classes:
        return []
    found: dict[str, Setting] = {}
    for base in classes[class_name].bases:
        if isinstance(base, ast.Name) and base.id in classes:
            found |= {setting.name: setting for setting in settings(recipe, base.id)}
    body = classes[class_name].body
    paper = {name: _resolved(value, constants) for name, value in _paper_values(body).items()}
    found = {s.name: dataclasses.replace(s, paper=_source(paper.get(s.name)) or s.paper) for s in found.values()}
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        name, value = node.target.id, _resolved(node.value, constants)
        if ast.unparse(node.annotation) == "Training":
            found |= {s.name: s for s in _training(name, value, paper.get(name))}
            continue
        below = following.value if isinstance(following, ast.Expr) else None
        if isinstance(below, ast.Constant) and isinstance(below.value, str):
            doc = below.value
        else:
            doc = _comment(source.splitlines(), node)
        default, published = _source(value) or "", _source(paper.get(name))
        found[name] = Setting(name, ast.unparse(node.annotation), default, published, " ".join(doc.split()))
    return list(found.values())


def _names_one(node: ast.stmt) -> TypeGuard[Any]:
    return isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)


def _resolved(node: Any, constants: dict[str, ast.expr]) -> Any:
    """What stands behind the name of one of the module's constants; other expressions as they are."""
    return constants.get(node.id, node) if isinstance(node, ast.Name) else node


def _training(name: str, laptop: ast.expr | None, paper: ast.expr | None) -> list[Setting]:
    """The fields of a nested ``Training(…)``, with the values that the recipe and its paper setting give them."""
    here, there = _keywords(laptop), _keywords(paper)
    told = []
    for field in settings(TRAINING, "Training"):
        default = here.get(field.name, field.default)
        published = there.get(field.name, field.default) if paper is not None else default
        usual = field.name not in here and field.name not in there
        told.append(
            dataclasses.replace(
                field,
                name=f"{name}.{field.name}",
                default=default,
                paper=published if published != default else None,
                usual=usual,
            )
        )
    return told


def _keywords(node: ast.expr | None) -> dict[str, str]:
    """Keyword arguments of the call in an expression, as source; also inside ``field(default_factory=lambda: …)``."""
    calls = [n for n in ast.walk(node) if isinstance(n, ast.Call)] if node is not None else []
    made = next((call for call in calls if ast.unparse(call.func).rpartition(".")[2] == "Training"), None)
    return {k.arg: _source(k.value) or "" for k in made.keywords if k.arg} if made is not None else {}


def _source(node: ast.expr | None) -> str | None:
    """An expression as written; arithmetic with plain numbers is done, and an empty collection shown as one."""
    if node is None:
        return None
    if all(isinstance(n, (ast.BinOp, ast.UnaryOp, ast.Constant, ast.operator, ast.unaryop)) for n in ast.walk(node)):
        return repr(eval(compile(ast.Expression(node), "<setting>", "eval"), {"__builtins__": {}}))
    written = ast.unparse(node)
    return {"field(default_factory=dict)": "{}", "field(default_factory=list)": "[]"}.get(written, written)


def _paper_values(body: list[ast.stmt]) -> dict[str, ast.expr]:
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == "paper":
            calls = [n.value for n in ast.walk(node) if isinstance(n, ast.Return) and isinstance(n.value, ast.Call)]
            return {k.arg: k.value for call in calls for k in call.keywords if k.arg}
    return {}


def _comment(lines: list[str], node: ast.AnnAssign) -> str:
    """The comment beside a field, else the block of comment lines straight above it."""
    beside = lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset or 0 :].strip()
    if beside.startswith("#"):
        return beside.lstrip("#: ")
    above = []
    for line in reversed(lines[: node.lineno - 1]):
        if not line.strip().startswith("#"):
            break
        above.append(line.strip().lstrip("#: "))
    return " ".join(reversed(above))


def docstring(recipe: Path) -> str:
    """What a recipe says about itself."""
    return ast.get_docstring(ast.parse(recipe.read_text(encoding="utf-8"))) or ""


# --------------------------------------------------------------------------------------------- the README's table

MARKS = ("<!-- systems: begin (python -m isthmus.catalog --readme) -->", "<!-- systems: end -->")


def markdown_table(results: Path | None = None) -> str:
    """The table of systems as Markdown: number, name with the paper, what it does, and what was measured."""
    rows = ["| | system | part | what it does | measured here |", "|-|-|-|-|-|"]
    for system in systems():
        name = f"**{system.name}**" if system.ready else system.name
        paper = f"[{system.authors} {system.year}]({system.url})" if system.url else f"{system.authors} {system.year}"
        rows.append(
            f"| {system.number:02d} | {name}<br>{paper} | {system.part} | {system.summary} "
            f"| {_markdown_verdicts(system, results)} |"
        )
    return "\n".join(rows)


def _markdown_verdicts(system: System, results: Path | None) -> str:
    if not system.ready:
        return ""
    record = measured(system, results)
    told = []
    for claim in system.claims:
        holds = verdict_of(claim, record)
        figures = {v["name"]: v for v in (record or {}).get("verdicts", ())}
        mark = {True: "✓", False: "✗", None: "not measured yet:"}[holds]
        value = f" **{figure_of(figures[claim.name])}**" if holds is not None else ""
        told.append(f"{mark} {claim.text.rstrip('.')} ({claim.metric}{value}, bar {claim.bar})")
    return "<br>".join(told) or "ready"


def update_readme(readme: Path, results: Path | None = None, write: bool = True) -> bool:
    """Put the table of systems between the marks of a README; tells whether it was out of date.

    Raises:
        ValueError: the marks are missing.
    """
    text = readme.read_text(encoding="utf-8")
    begin, end = text.find(MARKS[0]), text.find(MARKS[1])
    if begin < 0 or end < begin:
        raise ValueError(f"{readme} lacks the marks {MARKS[0]!r} … {MARKS[1]!r}.")
    new = f"{text[: begin + len(MARKS[0])]}\n{markdown_table(results)}\n{text[end:]}"
    if write and new != text:
        readme.write_text(new, encoding="utf-8")
    return new != text


def _main(arguments: list[str]) -> str | int:
    if arguments[:1] not in (["--readme"], ["--check"]):
        return "usage: python -m isthmus.catalog --readme | --check [README.md]"
    readme = Path(arguments[1] if len(arguments) > 1 else "README.md")
    stale = update_readme(readme, Path("results"), write=arguments[0] == "--readme")
    if arguments[0] == "--check" and stale:
        return f"{readme}: the table of systems is out of date; run `python -m isthmus.catalog --readme`"
    sys.stdout.write(f"{readme}: {'rewritten' if stale else 'up to date'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
