"""What a run leaves behind: numbers, claims, pictures and notes, as JSON that scripts read and HTML that people read.

``Record`` collects while a run goes on, ``judge`` compares claims with what was measured over seeds, ``render`` makes
one self-contained page out of one or several runs.
"""

from isthmus.report.environment import code, environment, versions
from isthmus.report.html import render
from isthmus.report.judge import Verdict, judge
from isthmus.report.record import Record, plain, read

__all__ = ["Record", "Verdict", "code", "environment", "judge", "plain", "read", "render", "versions"]
