#!/usr/bin/env bash
# transformers 5.24.0, transformers/cache_utils.py (LinearAttentionAndStaticFullAttentionLayer, the static cache's layer
# for layer type "hybrid"), with torch 2.12.1.
#
# Expected: a cache layer whose `is_croppable` is True forgets two positions by `crop(-2)`, in its convolution state and
#   in its keys and values, as the dynamic layer does: 6 positions become 4.
# Seen: the static layer has no `crop` of its own and inherits that of the linear attention: the convolution state is
#   cut, the keys and values still count 6 positions, and no error is raised.
# Seen with: both layers after activate_past_recording(), 6 positions of keys, values and convolution state (kernel of 3)
#   and no recurrent state.
#
# Exits with 0 while this stands, and with another status once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check \
  transformers==5.24.0 torch==2.12.1 numpy==2.4.6

echo "Expected of transformers 5.24.0: crop(-2) of a croppable layer of 6 positions leaves 4."
"$folder/venv/bin/python" -I - <<'PYTHON'
import torch
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionAndStaticFullAttentionLayer

POSITIONS = torch.arange(6.0)
left = {}
for kind, layer in (
    ("dynamic", LinearAttentionAndFullAttentionLayer()),
    ("static", LinearAttentionAndStaticFullAttentionLayer(max_cache_len=16)),
):
    layer.activate_past_recording()
    keys = POSITIONS.view(1, 1, 6, 1)
    layer.update(keys, keys)
    layer.update_conv_state(POSITIONS.view(1, 1, 6), conv_kernel_size=3)
    assert layer.is_croppable and int(layer.get_seq_length()) == 6, f"the {kind} layer cannot be cropped"
    layer.crop(-2)
    left[kind] = (int(layer.get_seq_length()), layer.conv_states[0].flatten().tolist())
    print(f"{kind}: {left[kind][0]} positions of keys and values, convolution state of positions {left[kind][1]}")
assert left == {"dynamic": (4, [1, 2, 3]), "static": (6, [1, 2, 3])}, "what crop leaves has changed"
print("Seen: the static layer cuts its convolution state and leaves its keys and values.")
PYTHON
