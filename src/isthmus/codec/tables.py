"""Where parts and architectures stand, so that one is imported when a file names it and not before."""

from __future__ import annotations

from fnmatch import fnmatchcase

#: Module → the names of the parts in it.
_PARTS = {
    "isthmus.bottlenecks.key_value": ("KeyValueBottleneck",),
    "isthmus.bottlenecks.latent_quantization": ("LatentQuantization",),
    "isthmus.bottlenecks.latents": ("FSQ", "GaussianLatents", "PlainLatents"),
    "isthmus.bottlenecks.splitters": ("Chunk", "LearnedProjection", "RandomProjection"),
    "isthmus.bottlenecks.vq": ("VQ",),
    "isthmus.codec.codec": ("Codec", "PassThrough"),
    "isthmus.compression.reshaping": ("Reshaped",),
    "isthmus.decoders.conv_tokenizer": ("ConvDetokenizer",),
    "isthmus.decoders.digit_sequence": ("AbsentDigits", "DigitSequence"),
    "isthmus.decoders.ffnet_head": ("FFNetClassifier", "FFNetHead"),
    "isthmus.decoders.latent_heads": ("LatentHeads",),
    "isthmus.decoders.latent_painter": ("LatentPainter",),
    "isthmus.decoders.metamixer_head": ("MetaMixerHead",),
    "isthmus.decoders.metamixer_sr": ("MetaMixerSR",),
    "isthmus.decoders.necks": ("FPN", "HorFPN"),
    "isthmus.decoders.probes": (
        "AlexNetProbe",
        "AttentiveProbe",
        "ConvProbe",
        "LinearProbe",
        "NonLinearProbe",
        "PooledProbe",
    ),
    "isthmus.decoders.ridge": ("Ridge",),
    "isthmus.decoders.spark_unet": ("Densify", "SparKUNet"),
    "isthmus.decoders.style_decoder": ("DenseDecoder", "StyleDecoder"),
    "isthmus.decoders.voting": ("FlatHead", "Vote"),
    "isthmus.encoders.backbone": ("Backbone",),
    "isthmus.encoders.images.as_image": ("AsImage", "AudioImage", "PointImage", "SeriesImage", "VideoImage"),
    "isthmus.encoders.images.convit": ("ConViT",),
    "isthmus.encoders.images.hornet": ("HorNet",),
    "isthmus.encoders.images.inceptionnext": ("InceptionNeXtMixers",),
    "isthmus.encoders.images.maxout_cnn": ("MaxoutCNN",),
    "isthmus.encoders.images.patch_net": ("PatchNet",),
    "isthmus.encoders.images.perception": ("MapForecaster", "Perception", "SeriesRows", "VideoFrames"),
    "isthmus.encoders.images.pixels": ("Pixels",),
    "isthmus.encoders.images.qlae": ("DenseEncoder", "QLAEEncoder"),
    "isthmus.encoders.images.small_cnns": ("PooledCNN", "SmoothAutoencoder", "UpscalingCNN"),
    "isthmus.encoders.images.token_mixers": ("MetaMixerMixers",),
    "isthmus.encoders.images.transnext": ("TransNeXt",),
    "isthmus.encoders.images.unireplknet": ("UniRepLKNet",),
    "isthmus.encoders.signals.meg_conv": ("MEGConv",),
    "isthmus.encoders.signals.metamixer_forecaster": ("MetaMixerForecaster", "SeriesEncoder"),
    "isthmus.encoders.signals.plane_net": ("PlaneNet",),
    "isthmus.encoders.signals.sensor_attention": ("SpatialAttention",),
    "isthmus.encoders.tokenizers.conv_tokenizer": ("ConvTokenizer",),
    "isthmus.encoders.words.embedding": ("Embedding",),
    "isthmus.layers.codebook": ("EMACodebook",),
    "isthmus.layers.robust_scale": ("RobustScale",),
    "isthmus.layers.subject": ("SubjectLinear",),
    "isthmus.objectives.spark": ("SparK",),
    "isthmus.priors.circuit": ("HCLT",),
    "isthmus.priors.tiny_lm": ("tiny_llama",),
    "isthmus.robustness.crop_selection": ("CropSelection",),
}

#: Name of a part → the module that has it.
PARTS = {name: module for module, names in _PARTS.items() for name in names}

#: Module → patterns of the timm names that it registers, or whose networks of timm's own it replaces.
ARCHITECTURES = {
    "isthmus.encoders.images.alexnet": ("rotnet_alexnet*",),
    "isthmus.encoders.images.convit": ("convit_*",),
    "isthmus.encoders.images.ffnet": ("ffnet*",),
    "isthmus.encoders.images.hornet": ("hornet_*",),
    "isthmus.encoders.images.inceptionnext": ("inceptionnext_*", "convnext_tiny_k*"),
    "isthmus.encoders.images.metamixer": ("metamixer_*",),
    "isthmus.encoders.images.nin": ("nin_cifar*",),
    "isthmus.encoders.images.replknet": ("replknet_*",),
    "isthmus.encoders.images.resnet_cifar": ("cifar_resnet*", "resnet*_cifar"),
    "isthmus.encoders.images.transnext": ("transnext_*",),
    "isthmus.encoders.images.unireplknet": ("unireplknet_*",),
}

#: System → modules whose ``PUBLISHED`` reads its published checkpoints, the most particular kind first.
PUBLISHED = {
    "hornet": ("isthmus.encoders.images.hornet",),
    "transnext": ("isthmus.encoders.images.transnext",),
    "unireplknet": ("isthmus.encoders.images.unireplknet",),
    "large-kernels": ("isthmus.encoders.images.replknet",),
    "convit": ("isthmus.encoders.images.convit",),
    "inceptionnext": ("isthmus.encoders.images.inceptionnext",),
    "metamixer": (
        "isthmus.decoders.metamixer_sr",
        "isthmus.decoders.metamixer_head",
        "isthmus.encoders.images.metamixer",
    ),
    "simple-segmentation": ("isthmus.decoders.ffnet_head", "isthmus.encoders.images.ffnet"),
    "rotnet": ("isthmus.encoders.images.nin", "isthmus.encoders.images.alexnet", "isthmus.decoders.probes"),
    "dkvb": ("isthmus.bottlenecks.key_value",),
    "meg-decoding": ("isthmus.encoders.signals.meg_conv",),
    "spark": ("isthmus.objectives.spark_files",),
    "lrp-pruning": ("isthmus.encoders.images.resnet_cifar",),
}


def module_of(architecture: str) -> str | None:
    """The module of ours that a timm name belongs to, ``None`` for timm's own."""
    for module, patterns in ARCHITECTURES.items():
        if any(fnmatchcase(architecture, pattern) for pattern in patterns):
            return module
    return None
