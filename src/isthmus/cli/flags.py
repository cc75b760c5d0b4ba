"""The flags of ``isthmus run NAME``: the fields of the recipe's ``Config`` and of ``RunOptions``, all checked."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import io
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, TypeVar

from isthmus import bounds, catalog
from isthmus.catalog import System
from isthmus.errors import UserError

SCALES = ("laptop", "paper")
_Parsed = TypeVar("_Parsed")


def parse(system: System, recipe: ModuleType, arguments: Sequence[str]) -> tuple[str, Any, Any]:
    """Scale, ``Config`` and ``RunOptions`` from flags; a run that is resumed starts from its own settings.

    Raises:
        UserError: a flag does not exist (the nearest are named) or has an unfit value.
    """
    from isthmus.engine.options import RunOptions

    with bounds.later():
        scale, config, options = _parse(system, recipe, arguments, RunOptions())
    check(recipe, config)
    bounds.check_fields(options)
    return scale, config, options


def check(recipe: ModuleType, config: Any) -> None:
    """Refuse settings that are out of bounds, or that the recipe's own ``check`` refuses.

    Raises:
        UserError: names the flag and what it may be.
    """
    bounds.check_fields(config)
    if hasattr(recipe, "check"):
        recipe.check(config)


def _parse(system: System, recipe: ModuleType, arguments: Sequence[str], options: Any) -> tuple[str, Any, Any]:
    import tyro

    scale = _value(arguments, "--scale") or "laptop"
    if scale not in SCALES:
        raise UserError(f"--scale is laptop or paper, not {scale!r}.")
    config = recipe.Config() if scale == "laptop" else recipe.Config.paper()
    if "--resume" in arguments and (folder := _folder(system, arguments)) is not None:
        scale, config, options = settings_of(folder, system, config, options)
    config = _in_the_unit_given(config, arguments)
    both = dataclasses.make_dataclass(
        "Both",
        [
            ("recipe", Annotated[type(config), tyro.conf.arg(name="")]),
            ("run", Annotated[type(options), tyro.conf.arg(name="")]),
            ("scale", Literal["laptop", "paper"], scale),
        ],
    )
    prog = f"isthmus run {system.name}"
    check_flags(arguments, [*_flags(config), *_flags(options), "--scale", "--help", "--json"], prog)
    registry = tyro.constructors.ConstructorRegistry()
    registry.struct_rule(_with_bounds)
    parsed = through_tyro(
        lambda: tyro.cli(
            both,
            default=both(config, options, scale),
            args=list(arguments),
            prog=prog,
            description=_about(system),
            registry=registry,
        ),
        arguments,
    )
    return parsed.scale, _warmed_up(parsed.recipe, arguments), parsed.run


def _folder(system: System, arguments: Sequence[str]) -> Path | None:
    """The run to go on with, as far as the flags tell; ``None`` where there is none."""
    from isthmus.engine.folder import CONFIG, newest

    out, seed = _value(arguments, "--out"), _value(arguments, "--seed") or "0"
    if out is not None:
        return Path(out) if (Path(out) / CONFIG).is_file() else None
    return newest(system.name, int(seed)) if seed.isdecimal() else None


def _with_bounds(info: Any) -> Any:
    """How tyro makes a dataclass of ours: as any other, with the bounds of every field behind its text."""
    from tyro.constructors import StructConstructorSpec, StructFieldSpec

    made: type[Any] = info.type
    if not dataclasses.is_dataclass(made) or not isinstance(info.default, made):
        return None
    source = inspect.getsourcefile(made) if made.__module__.startswith("isthmus.") else None
    if source is None:
        return None
    told = catalog.told(Path(source), made.__name__)
    hints = typing.get_type_hints(made, include_extras=True)
    fields = [
        StructFieldSpec(field.name, hints[field.name], getattr(info.default, field.name), told.get(field.name))
        for field in dataclasses.fields(made)
        if field.init
    ]
    return StructConstructorSpec(instantiate=made, fields=tuple(fields))


def _in_the_unit_given(config: Any, arguments: Sequence[str]) -> Any:
    """A config in which ``--PHASE.epochs`` takes the place of the recipe's steps, and the other way round."""
    given = {argument.partition("=")[0] for argument in arguments}
    for field in dataclasses.fields(config):
        training = getattr(config, field.name)
        if not {"steps", "epochs"} <= getattr(training, "__dataclass_fields__", {}).keys():
            continue
        flag = f"--{field.name.replace('_', '-')}"
        for unit, other in (("epochs", "steps"), ("steps", "epochs")):
            if f"{flag}.{unit}" in given and f"{flag}.{other}" not in given and getattr(training, unit) is None:
                # One of the two has to be set at all times; the flag's own value comes afterwards.
                training = dataclasses.replace(training, **{unit: 1, other: None})
                config = dataclasses.replace(config, **{field.name: training})
    return config


def _warmed_up(config: Any, arguments: Sequence[str]) -> Any:
    """A config whose phases, made shorter than their warm-up by a flag, warm up over their first tenth."""
    given = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    for field in dataclasses.fields(config):
        phase, flag = getattr(config, field.name), f"--{field.name.replace('_', '-')}"
        for unit in ("steps", "epochs"):
            length, warmup = getattr(phase, unit, None), getattr(phase, f"warmup_{unit}", None)
            changed = f"{flag}.{unit}" in given and f"{flag}.warmup-{unit}" not in given
            if changed and length and warmup and 0 < length <= warmup:
                shorter = dataclasses.replace(phase, **{f"warmup_{unit}": type(warmup)(length / 10)})
                config = dataclasses.replace(config, **{field.name: shorter})
    return config


def check_flags(arguments: Sequence[str], known: Sequence[str], prog: str) -> None:
    """Refuse a flag that does not exist, naming the nearest ones.

    Raises:
        UserError: the sentence for the person who typed it.
    """
    spelled = {flag.replace("_", "-") for flag in known}
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and len(flag) > 2 and flag not in spelled:
            near = difflib.get_close_matches(flag, sorted(spelled), n=3, cutoff=0.55)
            told = f"nearest: {', '.join(near)}" if near else f"`{prog} --help` lists all"
            raise UserError(f"there is no flag {flag}; {told}.")


def through_tyro(call: Callable[[], _Parsed], arguments: Sequence[str]) -> _Parsed:
    """Let tyro parse; what it prints about a mistake becomes one sentence.

    Raises:
        UserError: tyro's complaint.
    """
    if {"-h", "--help"} & set(arguments):
        return call()  # prints the help and leaves
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            return call()
    except SystemExit as leaving:
        if not leaving.code:
            raise
        raise UserError(_sentence(told.getvalue())) from None


def _sentence(box: str) -> str:
    """The first paragraph inside tyro's box, which has round corners or is plain ASCII."""
    paragraph: list[str] = []
    for line in (line.strip("│| ") for line in box.splitlines()[1:]):
        separator = not line or set(line) <= set("─-+╰╯")
        if separator and paragraph:
            break
        paragraph += [] if separator else [line]
    text = re.sub(r"^Error parsing (recipe|run): ", "", " ".join(paragraph))
    return text.rstrip(".") + "." if text else "the flags could not be understood."


def _flags(settings: Any, prefix: str = "") -> list[str]:
    """All spellings of a dataclass's flags, nested ones with their prefix."""
    found = []
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            found += _flags(value, f"{name}.")
        found += (
            [f"--{name}", f"--{prefix}no-{field.name.replace('_', '-')}"] if isinstance(value, bool) else [f"--{name}"]
        )
    return found


def _value(arguments: Sequence[str], flag: str) -> str | None:
    """The value of a flag given as ``--flag value`` or ``--flag=value``."""
    for index, argument in enumerate(arguments):
        if argument == flag:
            return arguments[index + 1] if index + 1 < len(arguments) else None
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
    return None


def settings_of(folder: Path, system: System, config: Any, options: Any) -> tuple[str, Any, Any]:
    """Scale, config and options that a run was started with, to go on with the same.

    Raises:
        UserError: the folder holds another system's run, or settings that this recipe does not take.
    """
    from isthmus.engine.folder import CONFIG, read_config

    saved = read_config(folder)
    if saved["name"] != system.name:
        raise UserError(f"{folder} holds a run of {saved['name']}, not of {system.name}.")
    try:
        with bounds.later():
            config, options = restored(config, saved["config"]), restored(options, saved["options"])
        bounds.check_fields(config)
        bounds.check_fields(options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} holds settings that cannot be used: {error}") from error
    return saved["scale"], config, options


def restored(like: Any, saved: Mapping[str, Any]) -> Any:
    """A dataclass like the given one, with the values that were saved as JSON."""
    if not isinstance(saved, Mapping):
        raise UserError(f"settings are an object, got {saved!r}.")
    values, hints = {}, typing.get_type_hints(type(like), include_extras=True)
    for field in dataclasses.fields(like):
        if field.name not in saved:
            continue
        value, model = saved[field.name], getattr(like, field.name)
        if dataclasses.is_dataclass(model):
            value = restored(model, value)
        elif isinstance(value, list):
            value = tuple(value) if isinstance(model, tuple) or model is None else value
        elif isinstance(value, str) and "Path" in str(field.type):
            value = Path(value)
        if not bounds.fits(hints[field.name], value):
            raise UserError(f"{field.name} cannot be {value!r}.")
        values[field.name] = value
    return dataclasses.replace(like, **values)


def _about(system: System) -> str:
    first = catalog.docstring(system.recipe).partition("\n\n")[0]
    return (
        f"{first}\n\n{system.title} ({system.authors}, {system.year}).\n\n"
        f"examples: isthmus run {system.name}  |  isthmus run {system.name} --seed 1 --out runs/try  |  "
        f"isthmus run {system.name} --scale paper --max-steps 1"
    )
