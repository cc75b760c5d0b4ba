"""``python -m isthmus.cli``: the command line where the ``isthmus`` script is not on the path."""

import sys

from isthmus.cli import main

sys.exit(main())
