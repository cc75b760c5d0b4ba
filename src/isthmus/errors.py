"""The one error that is the person's at the keyboard; it imports nothing, so that checks of settings are quick."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake the person at the keyboard can mend; the command line prints it as one sentence, no traceback."""
