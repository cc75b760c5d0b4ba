"""Figures, pictures and tensors as the bytes of a PNG file. Words are drawn as they are: ``$a$`` is no formula."""

from __future__ import annotations

import io
import warnings
from typing import Any


def png(figure: Any) -> bytes:
    """A matplotlib figure, a PIL image, or a tensor ``(3, H, W)``, ``(1, H, W)`` or ``(H, W)`` as PNG.

    Raises:
        ValueError: it is none of these.
    """
    buffer = io.BytesIO()
    if hasattr(figure, "savefig"):
        _take_words_literally(figure)
        with warnings.catch_warnings():  # a script that no installed font has is drawn as boxes
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight", facecolor="white")
    elif hasattr(figure, "save"):
        figure.save(buffer, format="PNG")
    else:
        _image(figure).save(buffer, format="PNG")
    return buffer.getvalue()


def _take_words_literally(figure: Any) -> None:
    """No text of a figure is read as a formula, but for the powers of ten that matplotlib writes at an axis itself."""
    from matplotlib.text import Text
    from matplotlib.ticker import FixedFormatter, FuncFormatter

    ticks = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            labels = [tick.label1 for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())]
            if not isinstance(axis.get_major_formatter(), (FixedFormatter, FuncFormatter)):
                ticks |= set(map(id, labels))
    for text in figure.findobj(Text):
        if id(text) not in ticks:
            text.set_parse_math(False)


def _image(tensor: Any) -> Any:
    import torch
    from PIL import Image

    if not isinstance(tensor, torch.Tensor) or tensor.ndim not in (2, 3):
        given = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"a figure is a matplotlib figure, a PIL image or a tensor (3, H, W), not {given}.")
    tensor = tensor.detach().cpu()
    if tensor.dtype.is_floating_point:
        tensor = tensor.float().nan_to_num().clamp(0, 1).mul(255).round().to(torch.uint8)
    tensor = tensor.expand(3, *tensor.shape[-2:])
    return Image.fromarray(tensor.permute(1, 2, 0).contiguous().numpy())
