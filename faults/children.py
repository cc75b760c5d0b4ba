"""Work in a child process that may be killed or may find no room to write."""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

from isthmus.errors import UserError

KILLED, REFUSED, BROKEN = -9, 2, 1


class Ended(NamedTuple):
    """How a child ended: 0 done, 2 a sentence for the user, 1 any other error, -9 killed; and what it said."""

    code: int
    said: str


def run(
    work: Callable[[], object],
    kill_after: float | None = None,
    most_bytes: int | None = None,
    timeout: float = 300.0,
) -> Ended:
    """Do ``work`` in a fork; kill it after some seconds, or let no file grow beyond ``most_bytes``."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        _child(work, writing, most_bytes)
    os.close(writing)
    said, end = b"", time.monotonic() + (timeout if kill_after is None else kill_after)
    while (left := end - time.monotonic()) > 0:
        if select.select([reading], [], [], left)[0]:
            part = os.read(reading, 65536)
            if not part:
                break
            said += part
    else:
        os.kill(child, signal.SIGKILL)
        if kill_after is None:
            said += b"it hung"
    os.close(reading)
    _, status = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(status), said.decode(errors="replace"))


def _child(work: Callable[[], object], writing: int, most_bytes: int | None) -> None:
    code = BROKEN
    try:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        if most_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))
        work()
        code = 0
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        code = REFUSED
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stderr.flush()
        finally:
            os._exit(code)
