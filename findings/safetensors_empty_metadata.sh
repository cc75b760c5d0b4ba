#!/usr/bin/env bash
# safetensors 0.8.0, safetensors/src/tensor.rs (the header is written there), called through safetensors.numpy.
#
# Expected: `save({}, metadata={})` gives bytes that `load` reads back as {}, as with metadata=None or one entry.
# Seen: the header is `{},"__metadata__":{}}`, which is no JSON; `load` raises SafetensorError. With a tensor in the
#   file an empty metadata is fine.
# Seen with: no tensor and one, metadata None, {} and {"made by": "hand"}.
#
# Exits with 0 while this stands, and with another status once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6

echo "Expected of safetensors 0.8.0: what save({}, metadata={}) writes is read back by load."
"$folder/venv/bin/python" -I - <<'PYTHON'
import numpy
from safetensors import SafetensorError
from safetensors.numpy import load, save

unreadable = []
for tensors in ({}, {"x": numpy.zeros(1, numpy.float32)}):
    for metadata in (None, {}, {"made by": "hand"}):
        written = save(tensors, metadata=metadata)
        header = written[8 : 8 + int.from_bytes(written[:8], "little")].decode().strip()
        try:
            outcome = f"reads back {list(load(written))}"
        except SafetensorError as error:
            unreadable.append((list(tensors), metadata, header))
            outcome = f"SafetensorError: {error}"
        print(f"tensors {list(tensors)}, metadata {metadata}: header {header}: {outcome}")
assert unreadable == [([], {}, '{},"__metadata__":{}}')], "other files are unreadable than before"
print("Seen: only no tensors together with an empty metadata gives a header that is no JSON.")
PYTHON
