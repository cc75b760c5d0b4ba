"""Figures by name. Nothing here is shown on a screen; ``run.figure`` keeps what these return.

Names of classes and networks are drawn as they are. Every axis has a label, every colour a name.
"""

from isthmus.report.figures.charts import bars, grouped_bars, histogram, lines, scatter, series
from isthmus.report.figures.grids import (
    captioned,
    confusion_matrix,
    first_filters,
    maps,
    pictures,
    sheet,
    table,
    to_unit,
)
from isthmus.report.figures.masks import coloured, masks, overlaid, palette
from isthmus.report.png import png

confusion = confusion_matrix

__all__ = [
    "bars",
    "captioned",
    "coloured",
    "confusion",
    "confusion_matrix",
    "first_filters",
    "grouped_bars",
    "histogram",
    "lines",
    "maps",
    "masks",
    "overlaid",
    "palette",
    "pictures",
    "png",
    "scatter",
    "series",
    "sheet",
    "table",
    "to_unit",
]
