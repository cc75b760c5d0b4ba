"""Pictures and their masks in one folder: which file is which, and which mask belongs to which picture.

Folders called ``images`` and ``masks`` (or another usual word, see below) at one level of the paths, parts inside or
outside of them; CamVid's ``train`` and ``trainannot``; Cityscapes' ``leftImg8bit`` and ``gtFine``; or ``x.jpg`` beside
``x_mask.png``. A mask has the name of its picture, but for its ending and the additions below.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from isthmus.data.splits import part_of

IMAGES = ("images", "image", "imgs", "img", "jpegimages", "leftimg8bit", "photos", "pictures", "rgb", "inputs")
MASKS = (
    *("masks", "mask", "labels", "label", "annotations", "annotation", "annots", "annot", "gtfine", "gtcoarse", "gt"),
    *("groundtruth", "ground_truth", "segmentationclass", "segmentations", "segmentation", "segs", "seg", "targets"),
)
_PART_AND_ROLE = re.compile(r"([a-z]+)[-_ ]?(images|imgs|annot|annots|annotations|labels|masks|mask|gt)$")
_OF_IMAGES = re.compile(r"^(?:image|img|photo)[-_]|[-_](?:leftImg8bit|image|img|photo|rgb|sat)$", re.IGNORECASE)
_OF_MASKS = re.compile(
    r"^(?:mask|label|seg|gt|annotation)[-_]|[-_](?:(?:gtFine|gtCoarse)_)?"
    r"(?:labelTrainIds|labelIds|masks?|labels?|seg|segmentation|annotation|gt)$|_[LP]$",
    re.IGNORECASE,
)
_SIDE = re.compile(r"_[LP]$", re.IGNORECASE)  # of a stereo picture, where no folder says that it is a mask
#: Cityscapes stores every mask several times; the first of these is taken.
_BEST = ("_labeltrainids", "_labelids")
_NO_MASKS = ("_color", "_instanceids")


class Pair(NamedTuple):
    """A picture and its mask, by their names below the folder; ``key`` is the picture's name without its role."""

    image: str
    mask: str | None
    key: str


class Pairs(NamedTuple):
    """Pictures with and without masks, and masks without pictures."""

    pairs: list[Pair]
    alone: list[str]


def find(names: Sequence[str], image: str = "", mask: str = "") -> Pairs | None:
    """Sort files into pictures and masks; ``None`` where they are pictures only.

    Args:
        names: of pictures and masks, relative to the folder.
        image: the folder of the pictures, where a person names it.
        mask: the folder of the masks, likewise.
    """
    if image or mask:
        return _matched(names, _told(image.strip("/"), mask.strip("/")))
    levels = max((name.count("/") for name in names), default=0)
    for rule in (*(_by_word(level) for level in range(levels)), _by_part):
        found = _matched(names, rule)
        if found is not None and 2 * sum(pair.mask is not None for pair in found.pairs) > len(found.alone):
            return found
    return _beside(names)


#: A path → whether it is a mask, and the path without what says so; ``None`` for other files.
_Rule = Callable[[str], tuple[bool, str] | None]


def _told(image: str, mask: str) -> _Rule:
    def rule(name: str) -> tuple[bool, str] | None:
        if mask and name.startswith(f"{mask}/"):
            return True, name[len(mask) + 1 :]
        if not image:
            return False, name
        return (False, name[len(image) + 1 :]) if name.startswith(f"{image}/") else None

    return rule


def _by_word(level: int) -> _Rule:
    def rule(name: str) -> tuple[bool, str] | None:
        *folders, file = name.split("/")
        word = folders[level].lower() if level < len(folders) else ""
        if word not in (*IMAGES, *MASKS):
            return None
        return word in MASKS, "/".join((*folders[:level], *folders[level + 1 :], file))

    return rule


def _by_part(name: str) -> tuple[bool, str] | None:
    *folders, file = name.split("/")
    for i, folder in enumerate(folders):
        found = _PART_AND_ROLE.match(folder.lower())
        word, role = (found[1], found[2]) if found else (folder, "images")
        if part_of(word):
            return role not in ("images", "imgs"), "/".join((*folders[:i], word.lower(), *folders[i + 1 :], file))
    return None


def _matched(names: Sequence[str], rule: _Rule) -> Pairs | None:
    images, masks = {}, {}
    for name in names:
        found = rule(name)
        if found is not None:
            (masks if found[0] else images)[name] = found[1]
    if not images or not masks:
        return None
    found = _paired(images, masks)
    if len(found.alone) > len(masks) // 2:  # the folders of one are not those of the other
        by_file = _paired(*({name: key.rpartition("/")[2] for name, key in each.items()} for each in (images, masks)))
        if len(by_file.alone) < len(found.alone) and len({_stem(key) for key in images.values()}) == len(images):
            keys = [Pair(pair.image, pair.mask, images[pair.image]) for pair in by_file.pairs]
            return Pairs(keys, by_file.alone)
    return found


def _beside(names: Sequence[str]) -> Pairs | None:
    """``x_mask.png`` beside ``x.jpg``, for at least half of the pictures."""
    masks = {name: name for name in names if _bare(name, _OF_MASKS) != _stem(name) and not _SIDE.search(_stem(name))}
    images = {name: name for name in names if name not in masks}
    found = _paired(images, masks) if images and masks else None
    if found is None or found.alone or 2 * sum(pair.mask is not None for pair in found.pairs) < len(images):
        return None
    return found


def _paired(images: dict[str, str], masks: dict[str, str]) -> Pairs:
    """Match by the whole name, then without additions to it."""
    by_key: dict[str, list[str]] = {}
    for mask, key in masks.items():
        if not _stem(mask).lower().endswith(_NO_MASKS):
            for each in {_stem(key), _bare(key, _OF_MASKS)}:
                by_key.setdefault(each, []).append(mask)
    pairs, used = [], set()
    for image, key in images.items():
        candidates = by_key.get(_stem(key)) or by_key.get(_bare(key, _OF_IMAGES)) or []
        mask = min(candidates, key=lambda name: (_rank(name), name), default=None)
        used.update(candidates)
        pairs.append(Pair(image, mask, key))
    alone = [mask for mask in masks if mask not in used and not _stem(mask).lower().endswith(_NO_MASKS)]
    return Pairs(pairs, alone)


def _rank(name: str) -> int:
    stem = _stem(name).lower()
    return next((i for i, ending in enumerate(_BEST) if stem.endswith(ending)), len(_BEST))


def _stem(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.rpartition(".")[0]


def _bare(name: str, addition: re.Pattern[str]) -> str:
    """The name without ending, and without what says that it is a picture or a mask."""
    folder, slash, file = _stem(name).rpartition("/")
    return folder + slash + (addition.sub("", file) or file)
