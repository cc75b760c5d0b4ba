#!/usr/bin/env bash
# CPython 3.11's standard library, Lib/zipfile.py (_EndRecData64, called by is_zipfile); nothing is installed.
#
# Expected: `zipfile.is_zipfile` answers True or False for every file that can be read.
# Seen: it raises BadZipFile for a file whose ZIP64 locator names two disks, a part of a split archive; is_zipfile
#   catches only OSError.
# Seen with: an archive of one small member with such a locator put before its end record, in memory.
#
# Exits with 0 while this stands, and with another status once it has changed. Needs a python3.11 on the path.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv --without-pip "$folder/venv"

echo "Expected of Python 3.11: is_zipfile says True or False, also for a part of a split archive."
"$folder/venv/bin/python" -I - <<'PYTHON'
import io
import platform
import struct
import zipfile

file = io.BytesIO()
with zipfile.ZipFile(file, "w") as archive:
    archive.writestr("member", "text")
whole = file.getvalue()
assert zipfile.is_zipfile(io.BytesIO(whole)), "a plain archive is no zip file"
assert not zipfile.is_zipfile(io.BytesIO(b"text")), "text is a zip file"

end = whole.rindex(b"PK\5\6")
for disks in (1, 2):
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, 0, disks)  # disk of the end record, its offset, number of disks
    try:
        outcome = zipfile.is_zipfile(io.BytesIO(whole[:end] + locator + whole[end:]))
    except zipfile.BadZipFile as error:
        outcome = f"BadZipFile: {error}"
    print(f"Python {platform.python_version()}, a locator that names {disks} disks: {outcome}")
assert outcome == "BadZipFile: zipfiles that span multiple disks are not supported", "is_zipfile has changed"
print("Seen: is_zipfile raises BadZipFile.")
PYTHON
