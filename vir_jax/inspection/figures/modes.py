"""Figures of the modes side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64
from matplotlib.figure import Figure

from vir_jax.inspection.figures.style import line, new_figure
from vir_jax.inspection.modes import Cost

FLOOR = 1e-9  # Where differences of exactly zero are drawn: far below the rounding of float32.


def draw_mode_errors(errors: Mapping[tuple[str, str], Float64[np.ndarray, "n"]], *, what: str) -> Figure:
    """Draw the relative RMS difference of every token between each pair of modes.

    Args:
        errors: of `errors_by_token`.
        what: whose difference it is, for the title.
    """
    figure = new_figure(9.4, 3.6, f"How far the modes differ, token by token: {what}")
    axes = figure.subplots()
    widths = (4.0, 2.0, 1.0)  # So that lines that coincide are all seen.
    for index, ((first, second), error) in enumerate(errors.items()):
        style: dict[str, Any] = {"color": ("0.78", "0.4", "0.0")[index % 3], "linewidth": widths[index % 3]}
        axes.plot(np.maximum(error, FLOOR), label=f"{first} and {second}", **style)
    spacing = float(np.finfo(np.float32).eps)
    axes.axhline(spacing, color="0.0", linewidth=0.8, linestyle="--", label="spacing of float32 at 1")
    axes.set(xlabel="token n", ylabel="relative RMS difference", yscale="log")
    if any((error < FLOOR).any() for error in errors.values()):
        axes.text(0, 1.3 * FLOOR, "at the bottom: equal bit for bit", fontsize=8)
        axes.set_ylim(bottom=0.8 * FLOOR)
    axes.grid(color="0.92")
    axes.legend(loc="lower right", fontsize=8)
    return figure


def draw_mode_costs(costs: Sequence[Cost], *, patch: int, what: str) -> Figure:
    """Time and temporary memory of one layer's retention against the image's resolution, a line for each mode.

    Args:
        costs: of `retention_costs`, on square grids.
        patch: its side in pixels, to tell the image's size.
        what: whose cost it is, for the title.
    """
    figure = new_figure(9.0, 3.9, f"Cost of one layer's retention, one image: {what}")
    time, memory = figure.subplots(1, 2)
    for index, mode in enumerate(dict.fromkeys(cost.mode for cost in costs)):
        mine = [cost for cost in costs if cost.mode == mode]
        sides = [patch * cost.grid[0] for cost in mine]
        style = {"label": mode, "marker": "osD"[index % 3], "markersize": 5, **line(index)}
        time.plot(sides, [np.nan if cost.ms is None else cost.ms for cost in mine], **style)
        memory.plot(sides, [cost.temp_bytes / 2**20 for cost in mine], **style)
    tokens = {patch * rows: rows * cols + 1 for rows, cols in (cost.grid for cost in costs)}
    for axes, label in ((time, "time, ms (median)"), (memory, "temporary memory, MiB (compiled)")):
        axes.set(xscale="log", yscale="log", ylabel=label, xlabel="side of the image, pixels (tokens)")
        axes.set_xticks(list(tokens), [f"{side}\n({n:,})" for side, n in tokens.items()], fontsize=8)
        axes.minorticks_off()
        axes.grid(color="0.92")
        axes.legend(fontsize=8)
    return figure
