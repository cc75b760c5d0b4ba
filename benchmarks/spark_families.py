"""Which families of timm run sparse, untouched: the leak check on a small member of each, and the share of tiles.

    python -m benchmarks.spark_families

Every row says whether :func:`isthmus.layers.sparse_conv.check_leaks` passes (nothing leaks, in evaluation and training
mode; tiles equal the masked-dense algorithm; everything visible equals the plain network) or why the encoder is
refused, and which share of its multiply-adds ran on tiles; the rest went over a canvas.
"""

from __future__ import annotations

import argparse
import os
from typing import Any, NamedTuple

import torch

from benchmarks.common import record
from isthmus.codec import UserError
from isthmus.encoders.backbone import Backbone
from isthmus.layers.sparse_conv import SparseContext, check_leaks, run_sparse


class Member(NamedTuple):
    """A model and the picture it is tried on, in pixels; ``cell`` is the side of a visible cell."""

    model: str
    size: int = 64
    cell: int = 32


FAMILIES: dict[str, Member] = {
    "ResNet": Member("resnet10t"),
    "ResNet-D": Member("resnet26d"),
    "ResNeXt": Member("resnext26ts"),
    "SE-ResNet": Member("seresnet18"),
    "SE-ResNeXt": Member("seresnext26d_32x4d"),
    "ECA-ResNet": Member("ecaresnet26t"),
    "SK-ResNet": Member("skresnet18"),
    "ResNeSt": Member("resnest14d"),
    "ResNet-RS": Member("resnetrs50"),
    "ResNet, anti-aliased": Member("resnetblur18"),
    "ResNet v2": Member("resnetv2_18"),
    "BiT-like ResNet v2, group norm": Member("resnetv2_50d_gn"),
    "NF-ResNet": Member("nf_resnet26"),
    "NFNet": Member("nfnet_l0"),
    "Res2Net": Member("res2net50_14w_8s"),
    "RegNetX": Member("regnetx_002"),
    "RegNetY": Member("regnety_002"),
    "RegNetZ": Member("regnetz_005"),
    "EfficientNet": Member("efficientnet_b0"),
    "EfficientNet-Lite, TensorFlow padding": Member("tf_efficientnet_lite0"),
    "EfficientNetV2": Member("tf_efficientnetv2_b0"),
    "MobileNetV1": Member("mobilenetv1_100"),
    "MobileNetV2": Member("mobilenetv2_035"),
    "MobileNetV3": Member("mobilenetv3_small_050"),
    "MobileNetV4": Member("mobilenetv4_conv_small_035"),
    "MNASNet": Member("mnasnet_small"),
    "MixNet": Member("mixnet_s"),
    "FBNet": Member("fbnetc_100"),
    "Single-Path NAS": Member("spnasnet_100"),
    "HardCoRe-NAS": Member("hardcorenas_a"),
    "TinyNet": Member("tinynet_e"),
    "LCNet": Member("lcnet_035"),
    "GhostNet": Member("ghostnet_050"),
    "GhostNetV2": Member("ghostnetv2_100", 128, 64),
    "RepGhostNet": Member("repghostnet_050"),
    "ReXNet": Member("rexnet_100"),
    "MobileOne": Member("mobileone_s0"),
    "FastViT, convolutional": Member("fastvit_t8"),
    "RepViT": Member("repvit_m0_9"),
    "StarNet": Member("starnet_s1"),
    "HGNetV2": Member("hgnetv2_b0"),
    "DenseNet": Member("densenet121"),
    "RDNet": Member("rdnet_tiny"),
    "DLA": Member("dla46_c"),
    "HRNet": Member("hrnet_w18_small"),
    "VGG": Member("vgg11_bn"),
    "RepVGG": Member("repvgg_a0"),
    "GENet": Member("gernet_s"),
    "VoVNet": Member("ese_vovnet19b_slim_dw"),
    "CSPNet": Member("cspresnet50"),
    "DarkNet": Member("darknet17"),
    "CS3-DarkNet": Member("cs3darknet_focus_s"),
    "DPN": Member("dpn48b"),
    "Xception": Member("legacy_xception"),
    "Aligned Xception": Member("xception41p"),
    "NASNet": Member("nasnetalarge"),
    "SelecSLS": Member("selecsls42b", 128, 64),
    "Inception v3": Member("inception_v3", 192, 64),
    "Inception v4": Member("inception_v4", 192, 64),
    "ConvNeXt": Member("convnext_atto"),
    "ConvNeXt V2": Member("convnextv2_atto"),
    "InceptionNeXt": Member("inception_next_atto"),
    "MambaOut": Member("mambaout_femto"),
    "PoolFormer": Member("poolformer_s12"),
    "ConvFormer": Member("convformer_s18"),
    "FocalNet": Member("focalnet_tiny_srf"),
    # No sparse form: attention over the map, space-to-depth by reshaping, global context by softmax over pixels.
    "EdgeNeXt": Member("edgenext_xx_small"),
    "EfficientViT": Member("efficientvit_b0"),
    "MobileNetV4, hybrid": Member("mobilenetv4_hybrid_medium", 64),
    "GC-ResNet": Member("gcresnet33ts"),
    "TResNet": Member("tresnet_m"),
    "CoAtNet": Member("coatnet_pico_rw_224", 224),
    "ViT": Member("test_vit"),
}


def examine(member: Member) -> dict[str, Any]:
    """One row: passes or the reason, and the share of tiles."""
    torch.manual_seed(0)
    options = {"img_size": member.size} if "vit" in member.model and member.model.startswith("test") else {}
    encoder = Backbone(member.model, **options)
    row: dict[str, Any] = {"model": member.model, "size": member.size, "cell": member.cell}
    try:
        check_leaks(encoder, member.size, member.cell)
    except UserError as error:
        return row | {"passes": False, "reason": str(error)}
    grid = member.size // member.cell
    visible = torch.zeros(1, grid, grid, dtype=torch.bool)
    visible[0, 0, 0] = True
    context = SparseContext(visible, "auto")
    with torch.no_grad():
        run_sparse(encoder.eval(), torch.zeros(1, 3, member.size, member.size), context)
    return row | {"passes": True, "tiled_share": context.work["tiles"] / sum(context.work.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    torch.set_num_threads(parser.parse_args().threads)
    rows = []
    for family, member in FAMILIES.items():
        rows.append({"family": family, **examine(member)})
        told = f"passes, {rows[-1]['tiled_share']:.0%} on tiles" if rows[-1]["passes"] else rows[-1]["reason"]
        print(f"{family} ({member.model}): {told}", flush=True)
    print(f"{sum(row['passes'] for row in rows)} of {len(rows)} families pass")
    print(record("spark_families", rows))


if __name__ == "__main__":
    main()
