"""What a model is fed: the facts that a kept model carries, so that it is used as it was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, get_args

from torch import nn

from isthmus.codec import UserError
from isthmus.data.transforms.augmentation import IMAGENET
from isthmus.data.transforms.pictures import CenterCrop, Compose, Normalize, Resize, Transform

Kind = Literal["image", "sound", "signal", "series", "points", "clip", "recording", "tokens"]
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


@dataclass(frozen=True)
class Inputs:
    """How an input is prepared.

    Raises:
        UserError: a value that cannot be; the sentence names it.
    """

    kind: Kind = "image"
    """What an input is."""
    size: tuple[int, int] | None = None
    """Rows and columns of pixels; ``None`` takes pictures as they are."""
    mean: tuple[float, ...] = IMAGENET[0]
    """Mean of every channel, of values in [0, 1]."""
    std: tuple[float, ...] = IMAGENET[1]
    """Standard deviation of every channel."""
    crop_pct: float = 1.0
    """Share of the shorter side that is kept."""
    interpolation: str = "bicubic"
    """How pictures are resized: nearest, bilinear or bicubic."""
    channels: int = 3
    """Channels of an input."""
    rate: float | None = None
    """Samples a second, of sounds, signals and recordings."""
    stretched: tuple[int, int] | None = None
    """Rows and columns that whole pictures are brought to, whatever their shape, before the middle is cut out; without
    it their shape stays."""

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        if self.size is not None:
            object.__setattr__(self, "size", tuple(int(side) for side in self.size))
        if self.stretched is not None:
            object.__setattr__(self, "stretched", tuple(int(side) for side in self.stretched))
        for name, sides in (("size", self.size), ("stretched", self.stretched)):
            if sides is not None and (len(sides) != 2 or min(sides) < 1):
                raise UserError(f"{name} {sides}: rows and columns, at least 1 pixel each.")
        if self.kind not in get_args(Kind):
            raise UserError(f"an input is of kind {', '.join(get_args(Kind))}, not {self.kind!r}.")
        if not 0 < self.crop_pct <= 1:
            raise UserError(f"crop_pct is the share of the shorter side that is kept, got {self.crop_pct}.")
        if len(self.mean) != len(self.std) or not all(math.isfinite(value) for value in self.mean):
            raise UserError(f"mean {self.mean} and std {self.std}: one finite number a channel each.")
        if not all(0 < value < math.inf for value in self.std):
            raise UserError(f"std {self.std}: the standard deviation of every channel must be above 0.")
        if self.interpolation not in _INTERPOLATIONS:
            raise UserError(f"interpolation is {', '.join(_INTERPOLATIONS)}, not {self.interpolation!r}.")
        if self.channels < 1 or (self.rate is not None and not 0 < self.rate < math.inf):
            raise UserError(f"channels {self.channels} are at least 1, and rate {self.rate} is above 0.")

    @classmethod
    def of(cls, model: nn.Module | None, size: tuple[int, int] | None = None, **changed: Any) -> Self:
        """What a timm model was made for by its own data config; ImageNet's usual values for any other.

        Args:
            model: a timm model, or any other, or none.
            size: rows and columns; the model's own without it. The crop is the model's own at its own size and at
                larger ones; smaller pictures are not cropped.
            changed: further fields.
        """
        config = getattr(model, "pretrained_cfg", None)
        if not config:
            found: dict[str, Any] = {"size": size, "crop_pct": usual_crop(min(size)) if size else 1.0}
            return cls(**{**found, **changed})
        from timm.data.config import resolve_model_data_config

        own = resolve_model_data_config(model)
        natural = tuple(own["input_size"][1:])
        asked = size or natural
        found = {
            "size": asked,
            "mean": tuple(own["mean"]),
            "std": tuple(own["std"]),
            "crop_pct": float(own["crop_pct"]) if min(asked) >= min(natural) else usual_crop(min(asked)),
            "interpolation": own["interpolation"] if own["interpolation"] in _INTERPOLATIONS else "bicubic",
            "channels": int(own["input_size"][0]),
        }
        return cls(**{**found, **changed})

    @property
    def resized(self) -> int | tuple[int, int]:
        """What a picture is resized to before its middle is cut out: a shorter side, or both where they differ."""
        if self.size is None:
            raise UserError("these inputs have no size of their own; give one.")
        if self.stretched is not None:
            return self.stretched
        sides = [round(side / self.crop_pct) for side in self.size]
        return sides[0] if sides[0] == sides[1] else (sides[0], sides[1])

    def transform(self) -> Transform:
        """Batches of pictures as the model was measured with: resized, cropped, normalised."""
        if self.size is None:
            return Compose([Normalize(self.mean, self.std)])
        resize = Resize(self.resized, self.interpolation)
        return Compose([resize, CenterCrop(self.size), Normalize(self.mean, self.std)])

    def at(self, size: int) -> Self:
        """The same for squares of another side."""
        return replace(self, size=(size, size))

    def natural(self) -> Self:
        """The same for pictures as they are, of any size."""
        return replace(self, size=None)

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """What :meth:`as_json` gave.

        Raises:
            UserError: something else.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or not values.keys() <= known:
            raise UserError(f"inputs are an object with {', '.join(sorted(known))}, got {values!r:.120}.")
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise UserError(f"these inputs cannot be used: {error}") from error


def usual_crop(size: int) -> float:
    """Share of the shorter side that ImageNet's pictures keep when measuring: 0.875 from 224 pixels, all from 384."""
    return 0.875 if 224 <= size < 384 else 1.0
