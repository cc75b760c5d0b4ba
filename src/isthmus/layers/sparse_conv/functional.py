"""The sparse operators one by one, on a dense map and its visibility. Each is the published masked-dense operator.

``x`` is ``(B, C, H, W)`` and is taken as it is (a hidden pixel that is not zero is read by its neighbours, as in the
published layers; with ``mode="tiled"`` it must be zero where hidden); ``visible`` is ``(B, h, w)`` bool. The result is
dense, exactly zero where hidden. SparK, arXiv 2301.03580, section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from . import features  # noqa: F401 - fills the table of sparse forms
from .context import SparseContext, check_visible
from .tensor import SparseTensor


def as_carrier(x: Tensor, visible: Tensor, mode: str = "masked") -> SparseTensor:
    """A carrier around a dense map."""
    check_visible(x, visible)
    carrier = SparseTensor(x, SparseContext(visible, mode), (x.shape[2], x.shape[3]), False)
    return carrier.as_tiles() if mode == "tiled" else carrier


def _dense(x: Any) -> Tensor:
    return x.as_canvas().values


def sparse_conv2d(
    x: Tensor, visible: Tensor, weight: Tensor, bias: Tensor | None = None, mode: str = "masked", **kwargs: Any
) -> Tensor:
    """Convolution whose output, bias included, is zero where hidden; keywords as ``F.conv2d``."""
    return _dense(F.conv2d(as_carrier(x, visible, mode), weight, bias, **kwargs))


def sparse_max_pool2d(x: Tensor, visible: Tensor, kernel_size: int, mode: str = "masked", **kwargs: Any) -> Tensor:
    """Max pool, then the mask; keywords as ``F.max_pool2d``."""
    return _dense(F.max_pool2d(as_carrier(x, visible, mode), kernel_size, **kwargs))


def sparse_avg_pool2d(x: Tensor, visible: Tensor, kernel_size: int, mode: str = "masked", **kwargs: Any) -> Tensor:
    """Average pool, not renormalised by the visible count, then the mask; keywords as ``F.avg_pool2d``."""
    return _dense(F.avg_pool2d(as_carrier(x, visible, mode), kernel_size, **kwargs))


def sparse_batch_norm(
    x: Tensor,
    visible: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    mode: str = "masked",
) -> Tensor:
    """Batch norm over the visible pixels of the batch; running statistics are updated in place."""
    carrier = as_carrier(x, visible, mode)
    return _dense(F.batch_norm(carrier, running_mean, running_var, weight, bias, training, momentum, eps))


def sparse_layer_norm(
    x: Tensor,
    visible: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    mode: str = "masked",
) -> Tensor:
    """Layer norm over the channels of every visible pixel; hidden pixels become zero, not the bias."""
    rows = as_carrier(x, visible, mode).permute(0, 2, 3, 1)
    return _dense(F.layer_norm(rows, (x.shape[1],), weight, bias, eps).permute(0, 3, 1, 2))
