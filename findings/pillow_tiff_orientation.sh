#!/usr/bin/env bash
# Pillow 13.0.0, PIL/TiffImagePlugin.py (the size is set in _setup, the pixels are turned and the tag dropped in
# load_end).
#
# Expected: between `open` and `load` a picture's size and its orientation tag (274) belong together: the stored size
#   with the tag, as for PNG, JPEG and WebP, so that a reader of the header who sees tag 6 swaps width and height.
# Seen: an opened TIFF with orientation 5 to 8 reports the turned size and still carries the tag, so that this reader
#   swaps twice; `load` then turns the pixels and drops the tag. PNG, JPEG and WebP keep both.
# Seen with: pictures 4 wide and 2 high, saved and opened in memory, orientation 1 to 8.
#
# Exits with 0 while this stands, and with another status once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check pillow==13.0.0

echo "Expected of Pillow 13.0.0: an opened picture that carries an orientation tag reports the size as stored, 4 × 2."
"$folder/venv/bin/python" -I - <<'PYTHON'
import io

from PIL import Image

TAG = 274
for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[TAG] = orientation
        file = io.BytesIO()
        Image.new("RGB", (4, 2)).save(file, kind, exif=exif)
        picture = Image.open(file)
        opened = (picture.size, picture.getexif().get(TAG))
        picture.load()
        loaded = (picture.size, picture.getexif().get(TAG))
        print(f"{kind} with orientation {orientation}: opened {opened}, loaded {loaded}")
        turned = kind == "TIFF" and orientation >= 5
        assert opened == ((2, 4) if turned else (4, 2), orientation), "what an opened picture says has changed"
        if kind == "TIFF" and orientation > 1:
            assert loaded == ((2, 4) if turned else (4, 2), None), "a loaded TIFF no longer drops its tag"
        else:
            assert loaded == opened, "loading changed the size or the tag"
print("Seen: only TIFF reports the turned size and the tag at once, and loses the tag when it is loaded.")
PYTHON
