"""The parts that the shared contract test tries. A new part joins by one line here.

Every entry is ``name -> (make, input)``: a function that makes a small part, and one that makes an input for it (from
a generator). Encoders get an input, bottlenecks and decoders a pyramid.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from isthmus.bottlenecks.key_value import KeyValueBottleneck
from isthmus.bottlenecks.latent_quantization import LatentQuantization
from isthmus.bottlenecks.latents import FSQ, GaussianLatents
from isthmus.bottlenecks.splitters import RandomProjection
from isthmus.bottlenecks.vq import VQ
from isthmus.codec import FeatureInfo, PassThrough
from isthmus.decoders.conv_tokenizer import ConvDetokenizer
from isthmus.decoders.digit_sequence import DigitSequence
from isthmus.decoders.ffnet_head import FFNetHead
from isthmus.decoders.latent_heads import LatentHeads
from isthmus.decoders.latent_painter import LatentPainter
from isthmus.decoders.metamixer_head import MetaMixerHead
from isthmus.decoders.metamixer_sr import MetaMixerSR
from isthmus.decoders.necks import FPN, HorFPN
from isthmus.decoders.probes import (
    AlexNetProbe,
    AttentiveProbe,
    ConvProbe,
    LinearProbe,
    NonLinearProbe,
    PooledProbe,
)
from isthmus.decoders.spark_unet import SparKUNet
from isthmus.decoders.style_decoder import DenseDecoder, StyleDecoder
from isthmus.decoders.voting import FlatHead, Vote
from isthmus.encoders.backbone import Backbone
from isthmus.encoders.images.as_image import AsImage, AudioImage
from isthmus.encoders.images.maxout_cnn import MaxoutCNN
from isthmus.encoders.images.qlae import DenseEncoder, QLAEEncoder
from isthmus.encoders.signals.meg_conv import MEGConv
from isthmus.encoders.signals.metamixer_forecaster import SeriesEncoder
from isthmus.encoders.tokenizers.conv_tokenizer import ConvTokenizer
from isthmus.encoders.words.embedding import Embedding
from isthmus.robustness.crop_selection import CropSelection

Make = Callable[[], nn.Module]
Feed = Callable[[torch.Generator], "Tensor | list[Tensor]"]


def image(size: int = 64, batch: int = 2, channels: int = 3) -> Feed:
    """A batch of random images."""
    return lambda g: torch.rand(batch, channels, size, size, generator=g)


def pyramid(*levels: tuple[int, int], batch: int = 2) -> Feed:
    """Random maps, finest first: ``(channels, side)`` for every level."""
    return lambda g: [torch.randn(batch, c, s, s, generator=g) for c, s in levels]


def tokens(count: int, width: int, batch: int = 2) -> Feed:
    """A pyramid of one level of random tokens ``(B, N, D)``."""
    return lambda g: [torch.randn(batch, count, width, generator=g)]


ENCODERS: dict[str, tuple[Make, Feed]] = {
    "ffnet": (
        lambda: Backbone("ffnet46ns", layers=(1, 1, 1), widths=(4, 8, 12, 16), stem=(4, 4)),
        image(),
    ),
    "image tokenizer": (lambda: ConvTokenizer(8, 4, width=4), image()),
    "timm resnet": (lambda: Backbone("resnet10t"), image()),
    "timm convnext": (lambda: Backbone("convnext_atto"), image()),
    "timm swin, channels last inside": (
        lambda: Backbone("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24, img_size=64, window_size=2),
        image(),
    ),
    "timm vit": (
        lambda: Backbone("vit_tiny_patch16_224", depth=2, embed_dim=48, img_size=64),
        image(),
    ),
    "timm without forward_intermediates": (lambda: Backbone("legacy_xception", reductions=(8, 16)), image(96)),
    "timm densenet, levels inside one list": (
        lambda: Backbone("densenet121", growth_rate=8, block_config=(2, 2, 2, 2)),
        image(),
    ),
    "network in network": (lambda: Backbone("nin_cifar_tiny", reductions=(2, 4)), image(32)),
    "rotnet alexnet": (lambda: Backbone("rotnet_alexnet", widths=(4, 6, 8, 5, 5, 16)), image()),
    "replknet": (
        lambda: Backbone(
            "replknet_31b", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16), large_kernel_sizes=(31, 13, 9, 5)
        ),
        image(),
    ),
    "transnext": (
        lambda: Backbone(
            "transnext_micro", embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), pretrain_size=64
        ),
        image(),
    ),
    "convit": (
        lambda: Backbone("convit_tiny_plus", img_size=64, depth=3, embed_dim=36, num_heads=9, local_up_to_layer=2),
        image(),
    ),
    "hornet": (lambda: Backbone("hornet_tiny_7x7", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)), image()),
    "hornet, global filters": (
        lambda: Backbone("hornet_tiny_gf", depths=(1, 1, 1, 1), dims=(8, 8, 16, 32), norm_features=True),
        image(),
    ),
    "inceptionnext, isotropic": (lambda: Backbone("inceptionnext_isotropic_small", depths=(2,), dims=(16,)), image()),
    "convnext, partial kernels": (
        lambda: Backbone("convnext_tiny_k3_par1_4", depths=(1, 1, 1, 1), dims=(16, 16, 24, 32)),
        image(),
    ),
    "metamixer": (
        lambda: Backbone("metamixer_ffnet_2", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), stem_width=8),
        image(),
    ),
    "metamixer segmentation": (
        lambda: Backbone("metamixer_ffnet_seg", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), stem_width=8),
        image(),
    ),
    "metamixer forecasting": (
        lambda: SeriesEncoder(3, dims=(4, 6), depths=(1, 1), kernels=(13, 7), small_kernels=(5, 3)),
        lambda g: torch.randn(2, 3, 50, generator=g),
    ),
    "unireplknet": (lambda: Backbone("unireplknet_a", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)), image()),
    "unireplknet hearing": (
        lambda: AsImage(
            AudioImage(8000, 32, 32), Backbone("unireplknet_a", in_chans=1, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))
        ),
        lambda g: torch.randn(2, 4000, generator=g),
    ),
    "meg convnet": (
        lambda: MEGConv(
            layout=[[i / 8, i * 5 % 9 / 8] for i in range(9)],
            out_channels=6,
            attention=5,
            position_dim=8,
            mix=4,
            hidden=6,
        ),
        lambda g: torch.randn(2, 9, 16, generator=g),
    ),
    "street numbers": (
        lambda: MaxoutCNN(32, (4, 6), strides=(2, 1), local=5, dense=(8,)),
        image(32),
    ),
    "qlae": (
        lambda: QLAEEncoder(5, 16, widths=(4, 6), kernels=(3, 4), strides=(1, 2), dense=(8,)),
        image(16),
    ),
    "qlae, dense": (lambda: DenseEncoder(5, 8, widths=(8,)), image(8)),
    "crop selection": (lambda: CropSelection(Backbone("resnet10t"), 48, size=64), image()),
    "embedding of a backbone": (lambda: Embedding(Backbone("resnet10t"), 512), image()),
}

BOTTLENECKS: dict[str, tuple[Make, Feed]] = {
    "pass-through": (PassThrough, pyramid((4, 8), (8, 4))),
    "vector quantisation": (lambda: VQ(16, 8), pyramid((8, 6))),
    "latent quantisation": (lambda: LatentQuantization(5, (3, 4, 2, 5, 1)), tokens(1, 5)),
    "latent quantisation, places": (lambda: LatentQuantization(8, 4), pyramid((4, 8), (8, 4))),
    "latent quantisation, pooled": (lambda: LatentQuantization(5, 4, channels=8), pyramid((4, 8), (8, 4))),
    "finite scalars": (lambda: FSQ(8, 5), pyramid((8, 4))),
    "gaussian latents": (lambda: GaussianLatents(4), tokens(1, 8)),
    "gaussian latents, total correlation": (
        lambda: GaussianLatents(3, channels=8, total_correlation=True, samples=100),
        pyramid((8, 4)),
    ),
    "key-value": (
        lambda: KeyValueBottleneck(RandomProjection(8, 3, 4), 16, 5, topk=2).freeze_keys(),
        pyramid((4, 8), (8, 4)),
    ),
}

DECODERS: dict[str, tuple[Make, Feed]] = {
    "ffnet head": (lambda: FFNetHead((4, 8), 3, divisor=8), pyramid((4, 8), (8, 4))),
    "image detokenizer": (lambda: ConvDetokenizer(8, 4, width=4), pyramid((8, 6))),
    "digit sequence": (lambda: DigitSequence(8, grid=2, hidden=(6,)), pyramid((4, 8), (8, 4))),
    "linear probe": (lambda: LinearProbe(8, 5), pyramid((4, 8), (8, 4))),
    "linear probe of tokens": (lambda: LinearProbe(8, 5, token=0), tokens(9, 8)),
    "pooled probe": (lambda: PooledProbe(4, 5, grid=2, level=0), pyramid((4, 8), (8, 4))),
    "non-linear probe": (lambda: NonLinearProbe(128, 5), pyramid((4, 8), (8, 4))),
    "convolutional probe": (lambda: ConvProbe(8, 5, width=8), pyramid((4, 8), (8, 4))),
    "alexnet probe": (lambda: AlexNetProbe(8, 5, side=6, conv=True, width=16), pyramid((8, 6))),
    "attentive probe": (lambda: AttentiveProbe(8, 5, num_heads=2), tokens(9, 8)),
    "vote": (lambda: Vote(5), pyramid((10, 8), (15, 4))),
    "flat head": (lambda: FlatHead(128, 5, hidden=8), pyramid((4, 8), (8, 4))),
    "metamixer super-resolution": (lambda: MetaMixerSR(2, dim=8, depth=1), pyramid((3, 8))),
    "metamixer segmentation head": (
        lambda: MetaMixerHead((4, 6, 8), 5, width=8, depth=1, final_ratio=2),
        pyramid((4, 8), (6, 4), (8, 2)),
    ),
    "style": (
        lambda: StyleDecoder(5, 16, widths=(6, 4), kernels=(3, 4), strides=(1, 2), dense=(8,), start=6),
        tokens(1, 5),
    ),
    "dense picture": (lambda: DenseDecoder(5, 8, widths=(8,)), tokens(1, 5)),
    "latents of a window": (lambda: LatentHeads(8, 5, length=9, two=True), tokens(9, 8)),
    "latent painter": (lambda: LatentPainter(8, size=16, width=16), lambda g: [torch.randn(2, 8, generator=g)]),
    "spark u-net": (lambda: SparKUNet([(4, 4), (8, 8)], width=16, output_stride=4), pyramid((4, 8), (8, 4))),
}

NECKS: dict[str, tuple[Make, Feed]] = {
    "feature pyramid": (lambda: FPN([(4, 4), (8, 8)], width=6, levels=3), pyramid((4, 8), (8, 4))),
    "horfpn": (lambda: HorFPN([FeatureInfo(4, 4), FeatureInfo(8, 8)], width=8, filter=(4, 3)), pyramid((4, 8), (8, 4))),
}
