"""What a recipe says of itself, read from its source: nothing heavy is imported for it."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from isthmus import bounds
from isthmus.catalog import source
from isthmus.catalog.source import Class, Value


@dataclass(frozen=True)
class Setting:
    """One flag of a recipe: its type and default as written, the paper's value if given, and what it means.

    ``usual`` marks a field of a nested dataclass, such as ``Training``, that the recipe leaves as that has it.
    """

    name: str
    type: str
    default: str
    paper: str | None
    doc: str
    usual: bool = False


@dataclass(frozen=True)
class _Field:
    annotation: Value
    default: Value | None
    doc: str

    @property
    def told(self) -> str:
        """The documentation, and the bounds where there are any."""
        stated = ", ".join(str(bound) for bound in _bounds(self.annotation))
        return f"{self.doc} ({stated})" if stated else self.doc


def settings(recipe: Path, class_name: str = "Config") -> list[Setting]:
    """The fields of a recipe's ``Config``, those of its bases included, read from source.

    A field's documentation is the string below it, or the ``#`` comment beside or above it. The paper's values are
    the keyword arguments of the call that ``Config.paper()`` returns. A field whose type is a dataclass becomes the
    fields of that, with its name in front.
    """
    module = source.read(recipe)
    if class_name not in module.classes:
        return []
    config = Class(module.classes[class_name], module)
    return _settings(config, {}, _paper(config), "", top=True)


def told(path: Path, class_name: str) -> dict[str, str]:
    """What a dataclass's fields mean, by name, and what they may be."""
    module = source.read(path)
    if class_name not in module.classes:
        return {}
    return {name: field.told for name, field in _fields(Class(module.classes[class_name], module)).items()}


def docstring(recipe: Path) -> str:
    """What a recipe says about itself."""
    return ast.get_docstring(ast.parse(recipe.read_text(encoding="utf-8"))) or ""


def _settings(
    config: Class, here: Mapping[str, Value], there: Mapping[str, Value] | None, prefix: str, top: bool = False
) -> list[Setting]:
    """The fields of a dataclass.

    Args:
        config: the dataclass.
        here: what the recipe gives to its fields.
        there: what the paper's setting gives to them; ``None`` where that has the recipe's.
        prefix: what the flags begin with.
        top: the paper's setting has the recipe's values where it gives none, not those of the class.
    """
    told = []
    for name, field in _fields(config).items():
        default = here.get(name, field.default)
        published = None if there is None else there.get(name, None if top else field.default)
        nested = source.find_class(*field.annotation)
        if nested is not None and _is_dataclass(nested):
            parts = [None if value is None else _arguments(value, nested) for value in (default, published)]
            told += _settings(nested, parts[0] or {}, parts[1], f"{prefix}{name}.")
            continue
        values = ["" if value is None else source.written(value) for value in (default, published)]
        paper = values[1] if published is not None and (top or values[0] != values[1]) else None
        usual = not top and name not in here and name not in (there or {})
        told.append(Setting(prefix + name, _type(field.annotation), values[0], paper, field.told, usual))
    return told


def _fields(config: Class) -> dict[str, _Field]:
    """The fields of a class and of its bases, in the order in which ``dataclass`` has them."""
    found: dict[str, _Field] = {}
    for base in reversed(config.node.bases):
        inherited = source.find_class(base, config.module)
        found |= _fields(inherited) if inherited is not None else {}
    body = config.node.body
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        if ast.unparse(node.annotation).startswith("ClassVar"):
            continue
        below = following.value if isinstance(following, ast.Expr) else None
        written = below.value if isinstance(below, ast.Constant) else None
        doc = written if isinstance(written, str) else _comment(config.module.lines, node)
        before = found.get(node.target.id)
        doc = " ".join(doc.split()) or (before.doc if before else "")
        default = None if node.value is None else Value(node.value, config.module)
        found[node.target.id] = _Field(Value(node.annotation, config.module), default, doc)
    return found


def _paper(config: Class) -> dict[str, Value]:
    """What ``paper()`` gives to the fields, also where it changes what that of a base gives."""
    bases = [base for base in (source.find_class(node, config.module) for node in config.node.bases) if base]
    inherited = next((found for found in map(_paper, bases) if found), {})
    for node in config.node.body:
        if isinstance(node, ast.FunctionDef) and node.name == "paper":
            within = source.inside(config.module, node, {})
            calls = [n.value for n in ast.walk(node) if isinstance(n, ast.Return) and isinstance(n.value, ast.Call)]
            found: dict[str, Value] = {}
            for call in calls:
                changed = source.called_name(call) == "replace"
                arguments = ast.Call(ast.Name("cls"), [], call.keywords)
                found |= (inherited if changed else {}) | source.arguments(Value(arguments, within), [])
            return found
    return inherited


def _arguments(value: Value, config: Class) -> dict[str, Value]:
    """What an expression that makes a dataclass gives to its fields."""
    return source.arguments(source.resolved(value), list(_fields(config)))


def _is_dataclass(found: Class) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in found.node.decorator_list)


def _type(annotation: Value) -> str:
    """A type as written, without bounds; the words themselves where its name stands for a ``Literal``."""
    behind = source.resolved(annotation).node
    if ast.unparse(behind).startswith("Literal["):
        return ast.unparse(behind)
    if not _bounds(annotation):
        return ast.unparse(annotation.node)
    return ast.unparse(_Unbound().visit(source.inlined(annotation)))


class _Unbound(ast.NodeTransformer):
    """``int`` in place of ``Annotated[int, at_least(1)]``."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        self.generic_visit(node)
        return node.slice.elts[0] if _annotated(node) else node  # type: ignore[union-attr]


def _annotated(node: ast.AST) -> bool:
    if not isinstance(node, ast.Subscript) or not isinstance(node.slice, ast.Tuple):
        return False
    return ast.unparse(node.value) == "Annotated"


def _bounds(annotation: Value) -> list[bounds.Bound]:
    """The bounds in a type; those whose table cannot be read without an import are left out."""
    found = []
    for node in ast.walk(source.inlined(annotation)):
        for extra in node.slice.elts[1:] if _annotated(node) else ():  # type: ignore[union-attr]
            with contextlib.suppress(Exception):
                found.append(eval(ast.unparse(extra), {"__builtins__": {}, **vars(bounds)}))
    return [bound for bound in found if isinstance(bound, bounds.Bound)]


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
