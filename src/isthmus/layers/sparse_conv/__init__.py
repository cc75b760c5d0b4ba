"""Sparse execution of any convnet: visible cells only, without touching the model (SparK, arXiv 2301.03580).

``sparse_features(encoder, images, visible)`` runs a timm model so that nothing leaks from or into hidden places.
Read ``tensor.py`` first (the carrier), then ``convs.py`` (the published algorithm), then ``tiles.py`` (the fast one).
"""

from .check import check_leaks
from .context import SparseContext, upsample_mask
from .features import run_sparse, sparse_features
from .functional import (
    sparse_avg_pool2d,
    sparse_batch_norm,
    sparse_conv2d,
    sparse_layer_norm,
    sparse_max_pool2d,
)
from .sparsity import Sparsity, sparsity
from .tensor import SparseTensor, sparse_form

__all__ = [
    "SparseContext",
    "SparseTensor",
    "Sparsity",
    "check_leaks",
    "run_sparse",
    "sparse_avg_pool2d",
    "sparse_batch_norm",
    "sparse_conv2d",
    "sparse_features",
    "sparse_form",
    "sparse_layer_norm",
    "sparse_max_pool2d",
    "sparsity",
    "upsample_mask",
]
