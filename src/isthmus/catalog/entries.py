"""The 52 systems and their claims, one TOML file a system in ``data/``, named after its number and name.

======================== =====================================================================================
``number, name``         what the command line knows it by; the recipe is ``recipes/<name with underscores>.py``
``title, authors, year`` of the paper; the year is that of its first version
``venue, arxiv``         left out where there is none
``part``                 one of :data:`PARTS`
``summary``              one line, in our words
``headline``             what the paper reports; left out where no figure could be confirmed
``data``                 built-in sources the recipe uses; ``+name`` is real data, used where a person supplies it
``[[claims]]``           the fields of :class:`Claim`, stated before anything is run, and only here
``[published]``          by metric of the recipe, what the paper reports for it, in its own terms
======================== =====================================================================================
"""

from __future__ import annotations

import difflib
import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from isthmus.errors import UserError

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
DATA = Path(__file__).with_name("data")
RECIPES = Path(__file__).parents[1] / "recipes"
Rule = Literal["mean", "every"]


class UnknownSystem(UserError):
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
    """One published system. ``arxiv``, ``venue`` and ``headline`` are ``None`` where nothing could be confirmed.

    ``published`` has the paper's figures by the metric of the recipe that measures the same thing.
    """

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
    published: Mapping[str, str] = field(default_factory=dict, hash=False)

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
    return tuple(sorted((read(path) for path in DATA.glob("*.toml")), key=lambda system: system.number))


def read(path: Path) -> System:
    """One system from its file.

    Raises:
        ValueError: the file is not named after what is in it, or has two claims of one name.
    """
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    claims = tuple(Claim(**claim) for claim in table.pop("claims", ()))
    system = System(**{**table, "data": tuple(table.get("data", ()))}, claims=claims)
    if path.stem != system.slug:
        raise ValueError(f"{path} is about {system.slug!r}; its name has to be {system.slug}.toml.")
    if len({claim.name for claim in claims}) < len(claims):
        raise ValueError(f"{path} has two claims of one name.")
    return system


def published(name: str) -> Mapping[str, str]:
    """What the paper of a system reports, by the metric of our recipe that measures the same thing.

    Raises:
        UnknownSystem: no system is called that.
    """
    return find(name).published


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
