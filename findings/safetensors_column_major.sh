#!/usr/bin/env bash
# safetensors 0.8.0, safetensors/numpy.py (_flatten, which hands over the array's address and length).
#
# Expected: a transposed numpy array (dense, in column order) is saved with its values where they belong, as 0.7.0 does,
#   or refused with an error, as safetensors.torch refuses a tensor that is not contiguous.
# Seen: 0.8.0 writes the memory as it lies under the transposed shape, so that `load` gives other values at the same
#   shape; nothing is said. The docstring asks for contiguous and dense arrays and does not name an order.
# Seen with: the numbers 0 to 5 as a (2, 3) array, transposed to (3, 2), through `save` and `load` of 0.7.0 and of 0.8.0.
#
# Exits with 0 while this stands, and with another status once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"

echo "Expected of safetensors 0.8.0: load(save(transposed)) is equal to the array, as with 0.7.0, or save raises."
for version in 0.7.0 0.8.0; do
  "$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check \
    "safetensors==$version" numpy==2.4.6
  "$folder/venv/bin/python" -I - "$version" <<'PYTHON'
import sys

import numpy
from safetensors.numpy import load, save

version = sys.argv[1]
array = numpy.arange(6, dtype=numpy.float32).reshape(2, 3).T
loaded = load(save({"array": array}))["array"]
print(f"safetensors {version}: {array.tolist()} becomes {loaded.tolist()}")
expected = array if version == "0.7.0" else numpy.arange(6).reshape(3, 2)
assert numpy.array_equal(loaded, expected), "what is loaded has changed"
PYTHON
done
echo "Seen: 0.8.0 gives the values back in the order of the memory, at other places, without an error."
