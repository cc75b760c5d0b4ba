"""The files of a folder, in an order of names, whatever links and locks stand in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Tree:
    """What stands below a folder; every name is relative to it, with forward slashes.

    Attributes:
        files: visible files, sorted folder by folder.
        folders: visible folders.
        locked: folders that cannot be listed.
    """

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    locked: list[str] = field(default_factory=list)


def walk(root: str) -> Tree:
    """Everything visible below ``root``. Links to folders are followed, but no folder is read twice, nor through a link
    where it can be reached without one."""
    tree = Tree()
    _add(tree, root, "", _real_folders(root))
    tree.files.sort(key=lambda name: (name.split("/")[:-1], name.split("/")[-1]))
    return tree


def _real_folders(root: str) -> set[str]:
    """The folders below that are reached without a link, and those above, which would be without end."""
    real = os.path.realpath(root)
    above, folder = {real}, real
    while (parent := os.path.dirname(folder)) != folder:
        above.add(parent)
        folder = parent
    return above | {os.path.realpath(folder) for folder, _, _ in os.walk(root)}


def _add(tree: Tree, root: str, below: str, taken: set[str]) -> None:
    """Add what stands in one folder and below; ``taken`` are the places that links must not lead to."""
    files, folders, links = [], [], []
    try:
        for entry in _visible(os.path.join(root, below)):
            kind = files if not entry.is_dir() else links if entry.is_symlink() else folders
            kind.append(f"{below}/{entry.name}".lstrip("/"))
    except OSError:
        tree.locked.append(below or ".")
        return
    tree.files += files
    for name in sorted(folders):
        tree.folders.append(name)
        _add(tree, root, name, taken)
    for name in sorted(links):
        real = os.path.realpath(os.path.join(root, name))
        if real not in taken:
            taken |= {real} | {os.path.realpath(folder) for folder, _, _ in os.walk(real)}
            tree.folders.append(name)
            _add(tree, root, name, taken)


def _visible(folder: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith((".", "__MACOSX")):
                yield entry
