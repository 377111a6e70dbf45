"""Figures of the decays alone: no model is needed."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float32
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vir_jax.inspection.decay import RetentionKind, decay_row, half_life, half_life_in_rows
from vir_jax.inspection.figures.style import GREYS, draw_map, evenly_spaced, line, mark_cell, new_figure
from vir_jax.ops import decay_mask, decay_mask_2d

KINDS: tuple[RetentionKind, ...] = ("1d", "2d")
NAMES = {"1d": "1-D, raster order", "2d": "2-D, both axes"}


def draw_masks(log_decay: Float32[Array, "h"], grid: tuple[int, int], *, heads: int = 4) -> Figure:
    """Draw the decay mask of several heads, in 1-D and in 2-D, as matrices over patches and class token."""
    n = math.prod(grid) + 1
    masks = {"1d": decay_mask(n, log_decay), "2d": decay_mask_2d(grid, log_decay, trailing=1)}
    chosen = evenly_spaced(len(log_decay), heads)
    figure = new_figure(
        2.3 * len(chosen) + 1.4,
        5.2,
        f"Decay masks D of {grid[0]} x {grid[1]} patches and the class token",
    )
    axes = figure.subplots(2, len(chosen), squeeze=False, sharex=True, sharey=True)
    lowest = min(float(np.min(np.asarray(mask)[np.asarray(mask) > 0])) for mask in masks.values())
    for row, (kind, mask) in enumerate(masks.items()):
        for col, head in enumerate(chosen):
            values = np.asarray(mask[head])
            picture = axes[row, col].imshow(
                np.where(values > 0, values, np.nan), cmap=GREYS, vmin=lowest, vmax=1, interpolation="nearest"
            )
            axes[row, col].xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes[row, col].yaxis.set_major_locator(MaxNLocator(5, integer=True))
            if row == 0:
                axes[row, col].set_title(head_title(log_decay, head), fontsize=9)
            else:
                axes[row, col].set_xlabel("key token m")
        axes[row, 0].set_ylabel(f"{NAMES[kind]}\nquery token n")
    figure.colorbar(
        picture, ax=axes, label="D[n, m], the part left of token m\n(white: not seen)", shrink=0.8
    )
    return figure


def draw_seen_from(
    log_decay: Float32[Array, "h"],
    grid: tuple[int, int],
    query: tuple[int, int] | None = None,
    *,
    heads: int = 4,
) -> Figure:
    """Draw rows of the masks folded back on the image: what a query patch at (row, column) sees; None: the class
    token.
    """
    index = -1 if query is None else query[0] * grid[1] + query[1]
    chosen = evenly_spaced(len(log_decay), heads)
    who = "the class token" if query is None else f"the patch at row {query[0]}, column {query[1]} (framed)"
    figure = new_figure(2.1 * len(chosen) + 1.4, 5.2, f"What {who} sees of {grid[0]} x {grid[1]} patches")
    axes = figure.subplots(2, len(chosen), squeeze=False)
    for row, kind in zip(axes, KINDS, strict=True):
        seen = np.asarray(decay_row(log_decay, index, grid, kind))[:, :-1].reshape(-1, *grid)
        lowest = float(seen[seen > 0].min())
        for cell, head in zip(row, chosen, strict=True):
            values = np.where(seen[head] > 0, seen[head], np.nan)
            title = head_title(log_decay, head) if kind == KINDS[0] else ""
            picture = draw_map(cell, values, title, cmap=GREYS, vmin=lowest, vmax=1)
            if query is not None:
                mark_cell(cell, *query)
        row[0].set_ylabel(f"{NAMES[kind]}\nrow of patches")
        figure.colorbar(picture, ax=row, label="D, the part left of a patch\n(white: not seen)")
    for cell in axes[-1]:
        cell.set_xlabel("column of patches")
    return figure


def draw_widths(
    log_decay: Float32[Array, "h"], widths: Sequence[int], *, rows: int = 8, head: int = 0
) -> Figure:
    """Draw what one patch sees in images of several widths: in raster order that depends on the width, in 2-D not."""
    patch = 0.17  # Inches.
    figure = new_figure(
        patch * sum(widths) + 2.2,
        2 * patch * rows + 1.9,
        f"What one patch (framed) sees in images of several widths, head {head}, "
        f"$\\gamma$ = {math.exp(float(log_decay[head])):.4f}",
    )
    axes = figure.subplots(2, len(widths), squeeze=False, width_ratios=widths)
    for row, kind in zip(axes, KINDS, strict=True):
        for cell, width in zip(row, widths, strict=True):
            y, x = rows - 2, width // 2
            decay = decay_row(log_decay[head : head + 1], y * width + x, (rows, width), kind)
            seen = np.asarray(decay)[0, :-1].reshape(rows, width)
            title = f"{width} columns\nright above: {seen[y - 1, x]:.2f}"
            values = np.where(seen > 0, seen, np.nan)
            picture = draw_map(cell, values, title, cmap=GREYS, vmin=0, vmax=1)
            mark_cell(cell, y, x)
        row[0].set_ylabel(NAMES[kind])
    figure.colorbar(picture, ax=axes, label="D, the part left of a patch\n(white: not seen)", shrink=0.9)
    return figure


def draw_half_lives(log_decay: Float32[Array, "h"], widths: Sequence[int]) -> Figure:
    """Draw the half-life of each head in tokens, and in rows of images of several widths."""
    figure = new_figure(10.0, 3.4, "Half-life of each head's memory")
    tokens, rows = figure.subplots(1, 2)
    heads = np.arange(len(log_decay))
    steps = np.asarray(half_life(log_decay))
    tokens.bar(heads, steps, color="0.75", edgecolor="0.2")
    for head, value in zip(heads, steps, strict=True):
        tokens.text(head, value, f"{value:.0f}", ha="center", va="bottom", fontsize=8)
    tokens.set(xlabel="head", ylabel="half-life in tokens (1-D)", xticks=heads)
    tokens.margins(y=0.12)
    for index, width in enumerate(widths):
        in_rows = half_life_in_rows(log_decay, width, "1d")
        rows.plot(heads, in_rows, marker="osD^v"[index % 5], label=f"1-D, {width} columns", **line(index + 1))
    in_rows = half_life_in_rows(log_decay, 1, "2d")
    rows.plot(heads, in_rows, color="0.0", linewidth=2.6, label="2-D, any width")
    rows.set(xlabel="head", ylabel="half-life in rows of patches", yscale="log", xticks=heads)
    rows.grid(axis="y", color="0.9")
    figure.legend(loc="outside right center", fontsize=8)
    return figure


def head_title(log_decay: Float32[Array, "h"], head: int) -> str:
    """Return the head's number, decay and half-life."""
    gamma, steps = math.exp(float(log_decay[head])), float(half_life(log_decay)[head])
    return f"head {head}: $\\gamma$ = {gamma:.4f},\nhalf left after {steps:.0f} steps"
