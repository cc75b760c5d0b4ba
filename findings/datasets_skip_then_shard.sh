#!/usr/bin/env bash
# datasets 5.2.0, datasets/iterable_dataset.py (SkipExamplesIterable, which shares its count out among the shards).
#
# Expected: the shards of `skip(3)` are parts of what `skip(3)` yields: together 3, 4, … 9 of the numbers 0 to 9, none
#   of the first three, none missing.
# Seen: the first shard begins with 2, which was skipped, and 5 is in no shard: the first shard leaves out two examples
#   of its own and the second leaves out one. Without `shard`, `skip(3)` yields 3 to 9.
# Seen with: the numbers 0 to 9 as an iterable dataset of two shards, skip(3).shard(2, 0) and skip(3).shard(2, 1).
#
# Exits with 0 while this stands, and with another status once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check datasets==5.2.0 numpy==2.4.6 pyarrow==26.0.1
export HF_HOME="$folder/cache" HF_HUB_OFFLINE=1

echo "Expected of datasets 5.2.0: the two shards of skip(3) of the numbers 0 to 9 hold 3, 4, 5, 6, 7, 8 and 9 together."
"$folder/venv/bin/python" -I - <<'PYTHON'
from datasets import Dataset

numbers = Dataset.from_dict({"number": list(range(10))}).to_iterable_dataset(num_shards=2)
skipped = numbers.skip(3)
whole = [row["number"] for row in skipped]
shards = [[row["number"] for row in skipped.shard(num_shards=2, index=index)] for index in range(2)]
print(f"skip(3) yields {whole}")
for index, shard in enumerate(shards):
    print(f"skip(3).shard(2, {index}) yields {shard}")
assert whole == [3, 4, 5, 6, 7, 8, 9], "skip alone has changed"
assert shards == [[2, 3, 4], [6, 7, 8, 9]], "the shards have changed"
print("Seen: 2 is in a shard although it was skipped, and 5 is in none.")
PYTHON
