"""Figures of what happens while an image is read: each head's state, and the prediction."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, ArrayLike, Float, Float32, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vir_jax.inspection.figures.style import draw_map, evenly_spaced, line, new_figure
from vir_jax.inspection.state import StateSummary

HEADS, LAYERS, CLASSES, MOMENTS = 4, 4, 5, 6  # Shown at most.


def draw_states(
    summary: StateSummary, log_decay: Float32[ArrayLike, "*l h"], *, state_bytes: int, kind: str
) -> Figure:
    """Draw norm, effective rank and memory of each head's state against the patches read; a column for each layer.

    Args:
        summary: of `states_as_read`, the first image of which is shown.
        log_decay: of the heads, the same in every layer or of each.
        state_bytes: of all layers together.
        kind: "1d" or "2d".
    """
    fields = [np.asarray(field)[0] for field in summary]  # [l, h, t] each.
    labels = ("norm of the state", "effective rank\n(directions)", "memory\n(patches held)")
    layers, heads = evenly_spaced(len(fields[0]), LAYERS), evenly_spaced(fields[0].shape[1], HEADS)
    size = f"{state_bytes / 1024:,.0f} KiB" if state_bytes < 2**20 else f"{state_bytes / 2**20:,.1f} MiB"
    where = "" if kind == "1d" else " in the last column"
    figure = new_figure(
        2.5 * len(layers) + 1.2,
        6.2,
        f"Each head's state{where} as the image is read ({size} for all layers and heads)",
    )
    axes = figure.subplots(3, len(layers), squeeze=False, sharex=True, sharey="row")
    gammas = np.exp(np.atleast_2d(np.asarray(log_decay)))
    alike = bool((gammas == gammas[0]).all())
    for row, (field, label) in enumerate(zip(fields, labels, strict=True)):
        for col, layer in enumerate(layers):
            for index, head in enumerate(heads):
                name = f"head {head}, $\\gamma$ = {gammas[0, head]:.4f}" if alike else f"head {head}"
                axes[row, col].plot(field[layer, head], label=name, **line(index))
            axes[row, col].grid(color="0.92")
        axes[row, 0].set_ylabel(label)
        axes[row, 0].set_ylim(bottom=0)
    patches = np.arange(fields[0].shape[-1])
    for col, layer in enumerate(layers):
        axes[2, col].plot(patches, patches, color="0.8", linewidth=1, label="all that were read")
        axes[0, col].set_title(f"layer {layer}", fontsize=10)
        axes[2, col].set_xlabel("patches read")
    handles, names = axes[2, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(handles), fontsize=8)
    return figure


def draw_reading(
    logits: Float[Array, "t classes"],
    image: UInt8[np.ndarray, "H W 3"],
    grid: tuple[int, int],
    *,
    class_names: Sequence[str],
) -> Figure:
    """Draw the probability of the classes that get likeliest at any time, against the patches read by then.

    Args:
        logits: of `logits_as_read`, for one image.
        image: as the model saw it.
        grid: of its patches.
        class_names: of all classes.
    """
    scores = np.asarray(logits, np.float64)
    probabilities = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    last = len(scores) - 1
    figure = new_figure(
        8.4, 5.0, "The prediction as patches arrive: the class token is read after each of them"
    )
    rows: Any = figure.subfigures(2, 1, height_ratios=(2.6, 1))
    axes = rows[0].subplots()
    likeliest = np.argsort(-probabilities.max(axis=0))[:CLASSES]  # At any time.
    for index, label in enumerate(likeliest):
        style = {"marker": "osD^v"[index], "markersize": 4, **line(index)}
        axes.plot(probabilities[:, label], label=class_names[label], **style)
    axes.set(xlabel="patches read", ylabel="probability", ylim=(0, 1.02), xlim=(-0.2, last + 0.2))
    axes.grid(color="0.92")
    rows[0].legend(title="class", fontsize=8, title_fontsize=8, loc="outside right upper")

    moments = [round(t) for t in np.linspace(1, last, min(last, MOMENTS))]
    for cell, t in zip(np.atleast_1d(rows[1].subplots(1, len(moments))), moments, strict=True):
        leader = int(probabilities[t].argmax())
        _draw_read(cell, image, grid, t, f"{t} read:\n{class_names[leader]} ({probabilities[t, leader]:.0%})")
    return figure


def _draw_read(
    axes: Axes, image: UInt8[np.ndarray, "H W 3"], grid: tuple[int, int], read: int, title: str
) -> None:
    """Lighten the patches of the image that are unread; a bidirectional model's second reading hides none."""
    unread = (np.arange(grid[0] * grid[1]) >= read).reshape(grid)
    height, width = image.shape[0] // grid[0], image.shape[1] // grid[1]
    hidden = np.kron(unread, np.ones((height, width), bool))[..., None]
    draw_map(axes, np.where(hidden, 255 - (255 - image.astype(int)) // 8, image).astype(np.uint8), title)
