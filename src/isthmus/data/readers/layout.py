"""What the folders of a data set mean: parts of the data, classes, or nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from isthmus.data.readers.walk import Tree
from isthmus.data.splits import PARTS, part_of


@dataclass
class Place:
    """Where a file stands: ``name`` relative to the data set, ``folders`` of it that have no meaning yet."""

    name: str
    folders: tuple[str, ...]
    part: str | None = None
    label: str | None = None

    @property
    def key(self) -> str:
        """The name without the folder of its part, by which a source without parts is divided."""
        return "/".join((*self.folders, self.name.rpartition("/")[2]))


@dataclass
class Layout:
    """Files with their parts and labels, and sentences about what was found.

    Attributes:
        labelled: whether every file has a label.
    """

    places: list[Place]
    labelled: bool = False
    notes: list[str] = field(default_factory=list)


def arrange(names: Sequence[str]) -> Layout:
    """Tell parts and classes from the folders of files.

    Folders are parts where all of one level are called train, val(idation) or test, above or below the classes. The
    next level are classes, if there are at least as many files in folders as beside them. Folders that all files share
    mean nothing.
    """
    places = [Place(name, tuple(name.split("/")[:-1])) for name in names]
    loose = [place for place in places if not place.folders]
    strays = loose if 2 * len(loose) < len(places) else []
    kept = [place for place in places if place.folders] if strays else places
    layout = _arranged(kept)
    if strays and not layout.labelled and not any(place.part for place in kept):
        return _arranged([Place(place.name, tuple(place.name.split("/")[:-1])) for place in places])
    beside = strays + [place for place in kept if place not in layout.places]
    if beside:
        layout.notes.append(f"{len(beside)} files beside the folders are left out, such as {beside[0].name}.")
    return layout


def _arranged(places: list[Place]) -> Layout:
    layout = Layout(places)
    skipped = _shared(places)
    if _all_parts(places):
        _take_parts(places, 0)
        skipped = _shared(places) or skipped
    if skipped:
        layout.notes.append(f"Classes and parts are looked for in {skipped}, which holds all files.")
    if not any(place.folders for place in places) or not _classed(places):
        return layout
    layout.places = inside = [place for place in places if place.folders]
    for place in inside:
        place.label = place.folders[0]
    if all(place.part is None and len(place.folders) > 1 and part_of(place.folders[1]) for place in inside):
        _take_parts(inside, 1)
    layout.labelled = True
    return layout


def parts_of(names: Sequence[str]) -> list[Place]:
    """Parts alone, of files whose folders are no classes."""
    places = [Place(name, tuple(name.split("/")[:-1])) for name in names]
    _shared(places)
    if _all_parts(places):
        _take_parts(places, 0)
    return places


def say_parts(places: Sequence[Place]) -> list[str]:
    """A sentence about the parts that folders stand for, or about folders that look like parts and are classes."""
    counts = Counter(place.part for place in places if place.part)
    if counts:
        told = ", ".join(f"{counts[part]} for {part}" for part in PARTS if part in counts)
        return [f"Folders say the part of the data: {told}."]
    looks = sorted({place.label for place in places if place.label and part_of(place.label)})
    if looks:
        return [
            f"{', '.join(looks)} {'are classes' if len(looks) > 1 else 'is a class'} here: other folders stand beside."
        ]
    return []


def say_left_out(tree: Tree, names: Sequence[str], what: str) -> list[str]:
    """Sentences about folders beside those with files that have none of their own, or are locked."""
    full = {"/".join(name.split("/")[:depth]) for name in names for depth in range(name.count("/") + 1)}
    bare = [each for each in tree.folders if each not in full and each.rpartition("/")[0] in full]
    told = []
    for folder in bare:
        inside = [file for file in tree.files if file.startswith(f"{folder}/")]
        told.append(
            f"{folder} ({len(inside)} other files, such as {inside[0].rpartition('/')[2]})" if inside else folder
        )
    notes = [f"No {what} is in {', '.join(told[:8])}{' and others' if len(told) > 8 else ''}."] if told else []
    return notes + ([f"Locked folders cannot be listed: {', '.join(tree.locked)}."] if tree.locked else [])


def _shared(places: Sequence[Place]) -> str:
    """Take off the folders that all files share, but the last one above them and those that are parts; tell which."""
    taken = []
    while places and all(place.folders for place in places):
        first = {place.folders[0] for place in places}
        second = {place.folders[1] for place in places if len(place.folders) > 1}
        loose = sum(len(place.folders) == 1 for place in places)
        if len(first) > 1 or part_of(next(iter(first))) or 2 * loose >= len(places) or len(second) < 1 + bool(loose):
            break
        taken += first
        for place in places:
            place.folders = place.folders[1:]
    return "/".join(taken)


def _all_parts(places: Sequence[Place]) -> bool:
    return any(place.folders for place in places) and all(
        part_of(place.folders[0]) for place in places if place.folders
    )


def _take_parts(places: Sequence[Place], level: int) -> None:
    for place in places:
        if len(place.folders) > level:
            place.part = part_of(place.folders[level])
            place.folders = (*place.folders[:level], *place.folders[level + 1 :])


def _classed(places: Sequence[Place]) -> bool:
    """Whether the folders are classes: everywhere, or, beside a few loose files, two at least."""
    if all(place.folders for place in places):
        return True
    for part in {place.part for place in places}:
        own = [place for place in places if place.part == part]
        classes = Counter(place.folders[0] for place in own if place.folders)
        if len(classes) > 1 and 2 * classes.total() > len(own):
            return True
    return False
