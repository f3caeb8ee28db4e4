"""What the pictures of an evaluation share. Needs matplotlib."""

import io
from typing import cast

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from unetr_flax.viewing.labels import color_of

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


def label_color(label: int) -> tuple[float, float, float]:
    """Returns the color of a label, the same as in all views of segmentations."""
    red, green, blue = color_of(label)
    return red / 255, green / 255, blue / 255
