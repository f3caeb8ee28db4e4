"""What the pictures of an evaluation share. Needs matplotlib."""

import io
from typing import Any, cast

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

DPI = 150


def make_figure(width: float, height: float) -> Figure:
    """Makes a figure of a size in inches that needs no display."""
    figure = Figure((width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Figure) -> bytes:
    """Draws a figure as the content of a PNG file."""
    # Names are shown as they are, even with dollar signs.
    for text in figure.findobj(Text):
        cast(Text, text).set_parse_math(False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def label_colors(number: int) -> list[tuple[float, float, float]]:
    """Chooses distinct colors, which repeat after 18; no grays, the colors of scans."""
    colormaps: Any = matplotlib.colormaps
    palette = colormaps["tab10" if number <= 9 else "tab20"].colors
    palette = [color for color in palette if len(set(color)) > 1]
    return [palette[i % len(palette)] for i in range(number)]
