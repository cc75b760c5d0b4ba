"""Python read, not run: classes, constants and imports of our own modules, followed from file to file.

What stands behind a name is an expression together with the :class:`Module` whose names it uses.
"""

from __future__ import annotations

import ast
import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1]
DEEPEST = 20  # names that stand for names
_BUILTINS = {call.__name__: call for call in (dict, list, tuple, range, round, min, max, int, float)}
_COMPUTED = (
    *(ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.BinOp, ast.UnaryOp, ast.Subscript, ast.Call, ast.Name),
    *(ast.operator, ast.unaryop, ast.expr_context),
)


@dataclass(frozen=True, eq=False)
class Module:
    """What a file defines.

    Attributes:
        lines: its text.
        classes: by name.
        functions: by name.
        constants: by name, the expressions assigned to them.
        imports: ``{name here: (module, name there)}``.
        bound: inside a function, its arguments and what it assigns.
    """

    lines: list[str]
    classes: Mapping[str, ast.ClassDef]
    functions: Mapping[str, ast.FunctionDef]
    constants: Mapping[str, ast.expr]
    imports: Mapping[str, tuple[str, str]]
    bound: Mapping[str, Value] = field(default_factory=dict)

    def imported(self, name: str) -> tuple[Module, str] | None:
        """The module of ours that a name is imported from, and its name there (empty: the module itself)."""
        module, original = self.imports.get(name, ("", ""))
        if module.partition(".")[0] != "isthmus":
            return None
        found = _open_module(f"{module}.{original}")
        if found is not None:
            return found, ""
        found = _open_module(module)
        return (found, original) if found is not None else None


class Value(NamedTuple):
    """An expression, and where its names are to be looked up."""

    node: ast.expr
    module: Module


class Class(NamedTuple):
    """A class, and where the names in its body are to be looked up."""

    node: ast.ClassDef
    module: Module


def read(path: Path) -> Module:
    """What a file defines; a file that has not changed is read once."""
    return _read(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _read(path: Path, _: int) -> Module:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    imports = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    return Module(
        text.splitlines(),
        {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)},
        {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)},
        _assigned(tree.body),
        imports,
    )


def _open_module(name: str) -> Module | None:
    place = PACKAGE.joinpath(*name.split(".")[1:])
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file():
            return read(path)
    return None


def _assigned(body: list[ast.stmt]) -> dict[str, ast.expr]:
    found = {}
    for node in body:
        target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
        target = node.target if isinstance(node, ast.AnnAssign) else target
        value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        if isinstance(target, ast.Name) and value is not None:
            found[target.id] = value
    return found


def find_class(node: ast.expr, module: Module) -> Class | None:
    """The class of ours that an expression names, wherever it is defined."""
    value = _followed(Value(node, module))
    if isinstance(value.node, ast.Name) and value.node.id in value.module.classes:
        return Class(value.module.classes[value.node.id], value.module)
    return None


def resolved(value: Value) -> Value:
    """What stands behind a name, a ``field(default_factory=…)``, or a call of a function that returns one thing."""
    for _ in range(DEEPEST):
        value = _followed(value)
        if not isinstance(value.node, ast.Call):
            return value
        given = {k.arg: k.value for k in value.node.keywords}
        called = called_name(value.node)
        if called == "field" and "default" in given:
            value = Value(given["default"], value.module)
        elif called == "field" and "default_factory" in given:
            factory = given["default_factory"]
            made = factory.body if isinstance(factory, ast.Lambda) else ast.Call(factory, [], [])
            value = Value(made, value.module)
        else:
            function = _followed(Value(value.node.func, value.module))
            name = function.node.id if isinstance(function.node, ast.Name) else ""
            definition = function.module.functions.get(name)
            returned = _returned(definition) if definition is not None else None
            if definition is None or returned is None:
                return value
            value = Value(returned, inside(function.module, definition, arguments(value, _parameters(definition))))
    return value


def _followed(value: Value) -> Value:
    """Names and ``module.name`` replaced by what they stand for; the name itself where that is a class or function."""
    node, module = value
    for _ in range(DEEPEST):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            there = module.imported(node.value.id)
            if there is None or there[1]:
                break
            node, module = ast.Name(node.attr), there[0]
        elif not isinstance(node, ast.Name) or node.id in module.classes or node.id in module.functions:
            break
        elif node.id in module.bound:
            node, module = module.bound[node.id]
        elif node.id in module.constants:
            node = module.constants[node.id]
        else:
            there = module.imported(node.id)
            if there is None or not there[1]:
                break
            node, module = ast.Name(there[1]), there[0]
    return Value(node, module)


def called_name(call: ast.Call) -> str:
    """The last part of the name of what is called."""
    return ast.unparse(call.func).rpartition(".")[2]


def arguments(call: Value, names: list[str]) -> dict[str, Value]:
    """What a call gives to parameters of these names, ``**{…}`` and ``replace(…, name=…)`` included."""
    if not isinstance(call.node, ast.Call):
        return {}
    found: dict[str, Value] = {}
    if called_name(call.node) == "replace":
        found |= arguments(resolved(Value(call.node.args[0], call.module)), names)
    else:
        found |= {name: Value(node, call.module) for name, node in zip(names, call.node.args, strict=False)}
    for keyword in call.node.keywords:
        value = Value(keyword.value, call.module)
        found |= {keyword.arg: value} if keyword.arg else _entries(resolved(value))
    return found


def _entries(mapping: Value) -> dict[str, Value]:
    """What a dictionary has by name, those that it takes from others with ``**`` included."""
    if not isinstance(mapping.node, ast.Dict):
        is_dict = isinstance(mapping.node, ast.Call) and called_name(mapping.node) == "dict"
        return arguments(mapping, []) if is_dict else {}
    found: dict[str, Value] = {}
    for key, node in zip(mapping.node.keys, mapping.node.values, strict=True):
        value = Value(node, mapping.module)
        if key is None:
            found |= _entries(resolved(value))
        elif isinstance(key, ast.Constant):
            found[str(key.value)] = value
    return found


def inside(module: Module, function: ast.FunctionDef, given: Mapping[str, Value]) -> Module:
    """The names as a function's body sees them, called with these arguments."""
    bound = {name: Value(node, module) for name, node in _defaults(function).items()} | dict(given)
    within = replace(module, bound=bound)
    if function.args.kwarg is not None:
        more = [name for name in given if name not in _parameters(function)]
        collected = ast.Dict([ast.Constant(name) for name in more], [ast.Name(name) for name in more])
        bound[function.args.kwarg.arg] = Value(collected, within)
    bound |= {name: Value(node, within) for name, node in _assigned(function.body).items()}
    return within


def _defaults(function: ast.FunctionDef) -> dict[str, ast.expr]:
    names = [argument.arg for argument in function.args.args]
    found = dict(zip(reversed(names), reversed(function.args.defaults), strict=False))
    only = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    return found | {argument.arg: node for argument, node in only if node is not None}


def _parameters(function: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]


def _returned(function: ast.FunctionDef) -> ast.expr | None:
    """What a function returns, where it does so in one place, as its last step."""
    returns = [node for node in ast.walk(function) if isinstance(node, ast.Return)]
    return returns[0].value if len(returns) == 1 and function.body[-1] is returns[0] else None


def inlined(value: Value) -> ast.expr:
    """An expression with names of constants replaced by them."""
    return _Inlined(value.module).visit(copy.deepcopy(value.node))


def written(value: Value) -> str:
    """An expression as source, with names of constants replaced by them, and computed where that takes no import."""
    node = _Inlined(value.module).visit(copy.deepcopy(resolved(value).node if _named(value.node) else value.node))
    text = ast.unparse(node)
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    if all(isinstance(n, _COMPUTED) for n in ast.walk(node)) and names <= _BUILTINS.keys():
        try:
            return repr(eval(text, {"__builtins__": _BUILTINS}))
        except (TypeError, ValueError, LookupError, ArithmeticError):
            return text
    return text


def _named(node: ast.expr) -> bool:
    return isinstance(node, (ast.Name, ast.Attribute, ast.Call))


class _Inlined(ast.NodeTransformer):
    """Literals in place of the names that stand for them."""

    def __init__(self, module: Module) -> None:
        self.module = module

    def visit_Name(self, node: ast.Name) -> ast.expr:
        found = resolved(Value(node, self.module)).node
        return copy.deepcopy(found) if all(isinstance(n, _COMPUTED) for n in ast.walk(found)) else node
