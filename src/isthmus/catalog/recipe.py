"""What a recipe says of itself, read from its source: nothing heavy is imported for it."""

from __future__ import annotations

import ast
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

TRAINING = Path(__file__).parents[1] / "engine" / "training.py"


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
