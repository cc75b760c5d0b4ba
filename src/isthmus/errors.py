"""The errors that are no bugs; this file imports nothing, so that checks of settings are quick."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake the person at the keyboard can mend; the command line prints it as one sentence, no traceback."""


class RunFailed(RuntimeError):
    """A run that could not go on, through no mistake in the command; one sentence as well, with exit code 1."""
