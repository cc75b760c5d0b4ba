#!/usr/bin/env bash
# torch 2.12.1, torch/utils/flop_counter.py (conv_backward_flop).
#
# Expected: the backward pass of a convolution costs twice its forward pass, once for the gradient of the input and once
#   for that of the weight; for a depthwise convolution too, so that a training step costs 3 × the forward pass.
# Seen: the gradient of the input is counted as if the convolution were dense. With 64 channels a step counts
#   66 × the forward pass. The forward count is right, and so is the step's of a dense convolution (3 ×).
# Seen with: FlopCounterMode on Conv2d(64, 64, 3, padding=1), groups=1 and groups=64, input (1, 64, 16, 16), CPU.
#
# Exits with 0 while this stands, and with another status once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check torch==2.12.1 numpy==2.4.6

echo "Expected of FlopCounterMode in torch 2.12.1: forward and backward of a convolution count 3 × its forward pass."
"$folder/venv/bin/python" -I - <<'PYTHON'
import torch
from torch.utils.flop_counter import FlopCounterMode

pixels = torch.zeros(1, 64, 16, 16, requires_grad=True)
steps = {}
for groups in (1, 64):
    convolution = torch.nn.Conv2d(64, 64, 3, padding=1, groups=groups, bias=False)
    with FlopCounterMode(display=False) as forward:
        convolution(pixels)
    with FlopCounterMode(display=False) as step:
        convolution(pixels).sum().backward()
    by_hand = 2 * 64 * (64 // groups) * 3 * 3 * 16 * 16
    assert forward.get_total_flops() == by_hand, "the forward count is not the one by hand"
    steps[groups] = step.get_total_flops() / forward.get_total_flops()
    print(f"groups={groups}: forward {forward.get_total_flops()}, step {step.get_total_flops()}: {steps[groups]:g} ×")
assert steps == {1: 3, 64: 66}, "the counts have changed"
print("Seen: the step of a depthwise convolution counts 66 × its forward pass, that of a dense one 3 ×.")
PYTHON
