"""Figures of what each patch and head adds to the class token, and to a logit."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float32, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vir_jax.inspection.contributions import LogitContributions
from vir_jax.inspection.decay import on_grid
from vir_jax.inspection.figures.style import draw_image, draw_signed, evenly_spaced, largest, new_figure

HEADS = 4  # Shown one by one, at most.
LAYERS = 4  # Taken apart, at most: the last ones.


def draw_layer_shares(
    shares: Mapping[int, Float32[Array, "h n"]], image: UInt8[np.ndarray, "H W 3"], grid: tuple[int, int]
) -> Figure:
    """Draw what part of the class token's retention each patch is, layer by layer and head by head.

    Args:
        shares: by layer, `LayerContributions.shares` of one image.
        image: as the model saw it.
        grid: of its patches.
    """
    heads = evenly_spaced(len(next(iter(shares.values()))), HEADS)
    figure = new_figure(
        1.85 * (len(heads) + 2) + 1.0,
        2.15 * len(shares) + 0.6,
        "What retention gives the class token: each patch's share (a layer's maps and class token sum to 100 %)",
    )
    axes = figure.subplots(len(shares), len(heads) + 2, squeeze=False)
    for row, (layer, share) in zip(axes, shares.items(), strict=True):
        percent, own = 100 * np.asarray(on_grid(share, grid)), 100 * np.asarray(share)[:, -1]
        maps = [("all heads", percent.sum(axis=0), own.sum())]
        maps += [(f"head {head}", percent[head], own[head]) for head in heads]
        limit = largest([values for _, values, _ in maps])
        draw_image(row[0], image, "the image's patches", grid)
        row[0].set_ylabel(f"layer {layer}")
        for cell, (name, values, itself) in zip(row[1:], maps, strict=True):
            picture = draw_signed(cell, values, f"{name}\n(class token {round(float(itself))} %)", limit)
        figure.colorbar(picture, ax=row[-1], label="share of a patch, %")
    return figure


def draw_logit(
    terms: LogitContributions, image: UInt8[np.ndarray, "H W 3"], grid: tuple[int, int], *, class_name: str
) -> Figure:
    """Draw what one logit of the first image is the sum of: the last layer's patches, its heads, all else."""
    first = LogitContributions(*(np.asarray(field)[0] for field in terms))
    last = np.asarray(on_grid(terms.retention[0, -1], grid))
    heads = evenly_spaced(len(last), HEADS)
    figure = new_figure(
        1.85 * (len(heads) + 2) + 0.8, 5.4, f'What the logit of class "{class_name}" is the sum of, exactly'
    )
    rows: Any = figure.subfigures(2, 1, height_ratios=(1, 1.25))

    cells = rows[0].subplots(1, len(heads) + 2)
    draw_image(cells[0], image, "image", grid)
    total = last.sum(axis=0)
    limit = largest([total, *last])
    picture = draw_signed(cells[1], total, f"last layer, all heads\nsum {total.sum():+.2f}", limit)
    for cell, head in zip(cells[2:], heads, strict=True):
        draw_signed(cell, last[head], f"head {head}\nsum {last[head].sum():+.2f}", limit)
    rows[0].colorbar(picture, ax=cells[-1], label="part of the logit, nats")

    depth = len(first.mlp)
    detailed = range(max(0, depth - LAYERS), depth)
    bars = [(f"before layer {detailed[0]}", terms.before_layer(detailed[0])[0])]
    for layer in detailed:
        patches, itself = first.retention[layer, :, :-1].sum(), first.retention[layer, :, -1].sum()
        bars += [(f"{layer}: patches", patches), (f"{layer}: class token", itself)]
        bars += [(f"{layer}: bias", first.retention_bias[layer]), (f"{layer}: MLP", first.mlp[layer])]
    bars += [("norm's and head's bias", first.constant)]
    _draw_waterfall(rows[1].subplots(), [(name, float(value)) for name, value in bars])
    return figure


def _draw_waterfall(axes: Axes, bars: Sequence[tuple[str, float]]) -> None:
    """Draw terms from left to right, each beginning where the one before ends; the last bar is their sum."""
    ends = np.cumsum([value for _, value in bars])
    starts = np.concatenate([[0.0], ends[:-1]])
    for index, ((_, value), start) in enumerate(zip(bars, starts, strict=True)):
        axes.bar(
            index, value, bottom=start, color="0.85" if value >= 0 else "0.35", edgecolor="0.1", linewidth=0.7
        )
        text = f"{value:+.2f}" if abs(value) >= 0.005 else "0.00"
        axes.text(index, max(start, start + value), text, ha="center", va="bottom", fontsize=7)
    axes.bar(len(bars), ends[-1], color="0.6", edgecolor="0.1", hatch="//", linewidth=0.7)
    axes.text(
        len(bars), max(ends[-1], 0), f"{ends[-1]:.2f}", ha="center", va="bottom", fontsize=8, weight="bold"
    )
    axes.axhline(0, color="0.2", linewidth=0.7)
    names = [*(name for name, _ in bars), "logit"]
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    axes.set(xlabel="layer: term", ylabel="sum so far, nats", xlim=(-0.7, len(names) - 0.3))
    axes.set_title("Every term of the logit, by layer (light: adds; dark: takes away)", fontsize=9)
    low, high = min(0.0, ends.min()), max(0.0, ends.max())
    axes.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))
