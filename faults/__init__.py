"""Faults on purpose, outside CI's time: kills, full disks, damaged files, mutated formats, odd arguments.

``make faults``, or ``python -m faults [KIND …] [--seconds 60] [--add]``; counts go to ``results/faults.json`` and
``.md``. All of it is aimed at this library's own guards, on files made here.
"""
