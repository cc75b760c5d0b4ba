"""What sits between seeing and saying: encoder → bottleneck → decoder, and the contracts that cross rooms.

An *encoder* maps an input to a pyramid of features, a *bottleneck* maps features to a :class:`Code`, a *decoder* maps
features to a prediction. :class:`Codec` composes the three and saves and loads them; it knows nothing of training.
Parts are plain ``nn.Module`` objects that meet the protocols of :mod:`isthmus.codec.contracts`; there is no base class
to inherit.
"""

from isthmus.codec.codec import Codec, Output, PassThrough
from isthmus.codec.contracts import (
    Bottleneck,
    Code,
    Condition,
    Decoder,
    Encoder,
    FeatureInfo,
    Fitted,
    Loss,
    Neck,
    Objective,
    Turn,
    call_part,
    conditions_of,
    feature_levels,
)
from isthmus.codec.errors import UserError, extra
from isthmus.codec.files import load_weights, save_weights, write_atomically
from isthmus.codec.parts import build, part, spec_of
from isthmus.codec.timm_models import create_timm, replaces

__all__ = [
    "Bottleneck",
    "Code",
    "Codec",
    "Condition",
    "Decoder",
    "Encoder",
    "FeatureInfo",
    "Fitted",
    "Loss",
    "Neck",
    "Objective",
    "Output",
    "PassThrough",
    "Turn",
    "UserError",
    "build",
    "call_part",
    "conditions_of",
    "create_timm",
    "extra",
    "feature_levels",
    "load_weights",
    "part",
    "replaces",
    "save_weights",
    "spec_of",
    "write_atomically",
]
