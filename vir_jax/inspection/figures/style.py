"""What all figures share: greys whose order survives a black-and-white print, and lines told apart by their dashes."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

# From light grey, not white: white is what a token does not see.
GREYS = LinearSegmentedColormap.from_list(
    "light_greys", mpl.colormaps["Greys"](np.linspace(0.12, 1.0, 256))
).with_extremes(bad="white")
# Brighter is more, in print too: negative is dark, positive is bright, zero half-way.
SIGNED = mpl.colormaps["cividis"]

LINES = (
    {"color": "0.0", "linestyle": "-"},
    {"color": "0.45", "linestyle": "--"},
    {"color": "0.2", "linestyle": ":"},
    {"color": "0.6", "linestyle": "-"},
    {"color": "0.3", "linestyle": "-."},
    {"color": "0.7", "linestyle": "--"},
)


def line(index: int) -> dict[str, Any]:
    """Shade and dashes of line number `index`."""
    return dict(LINES[index % len(LINES)], linewidth=1.6)


def new_figure(width: float, height: float, title: str) -> Figure:
    """Make an empty figure, inches, its title above everything. It belongs to no window: pyplot is not needed."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    figure.suptitle(title, fontsize=11)
    return figure


def evenly_spaced(count: int, at_most: int) -> list[int]:
    """Return all of 0 .. count - 1, or `at_most` of them, evenly spread, first and last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, at_most))})


def draw_map(axes: Axes, values: np.ndarray, title: str, **limits: Any) -> AxesImage:
    """Draw values on the grid of patches, without ticks."""
    picture = axes.imshow(values, interpolation="nearest", **limits)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)
    return picture


def draw_signed(axes: Axes, values: np.ndarray, title: str, limit: float) -> AxesImage:
    """Draw a map of signed values on a scale that is symmetric about zero."""
    return draw_map(axes, values, title, cmap=SIGNED, vmin=-limit, vmax=limit)


def draw_image(axes: Axes, image: np.ndarray, title: str, grid: tuple[int, int]) -> None:
    """Draw an RGB image, with the borders of its patches where they are few enough to be seen."""
    height, width = image.shape[:2]
    draw_map(axes, image, title)
    if max(grid) <= 16:
        for row in range(1, grid[0]):
            axes.axhline(row * height / grid[0] - 0.5, color="0.5", linewidth=0.4)
        for col in range(1, grid[1]):
            axes.axvline(col * width / grid[1] - 0.5, color="0.5", linewidth=0.4)


def mark_cell(axes: Axes, row: int, col: int) -> None:
    """Draw a frame around one patch."""
    for colour, width in (("white", 2.6), ("black", 1.2)):
        axes.add_patch(
            Rectangle((col - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=colour, linewidth=width, zorder=3)
        )


def largest(values: Sequence[np.ndarray] | np.ndarray) -> float:
    """Return the largest absolute value, or 1 where all are zero: the limit of a symmetric scale."""
    limit = max(float(np.abs(x).max()) for x in values)
    return limit if limit > 0 and math.isfinite(limit) else 1.0
