"""Draws docs/figures/what_is_vir.png: python -m docs.figures.what_is_vir."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from vir_jax.ops import decay_mask, vir_log_decay

ROWS = COLS = 4
HEADS = 6


def draw_patches(axes: Axes) -> None:
    """Draw the order in which tokens are read."""
    numbers = np.arange(1, ROWS * COLS + 1).reshape(ROWS, COLS)
    for (y, x), number in np.ndenumerate(numbers):
        axes.add_patch(Rectangle((x, y), 0.94, 0.94, facecolor="0.9", edgecolor="0.4"))
        axes.text(x + 0.47, y + 0.47, str(number), ha="center", va="center", fontsize=11)
    axes.add_patch(Rectangle((0, ROWS + 0.3), 0.94, 0.94, facecolor="0.25"))
    axes.text(0.47, ROWS + 0.77, "cls", ha="center", va="center", color="w", fontsize=11)
    axes.text(
        1.2,
        ROWS + 0.77,
        "read last: sees every patch,\nno patch sees it",
        va="center",
        fontsize=9,
        color="0.2",
    )
    axes.set(xlim=(-0.1, COLS + 0.6), ylim=(ROWS + 1.5, -0.2), aspect="equal")
    axes.axis("off")
    axes.set_title("1  An image is read patch by patch", fontsize=11, loc="left")


def draw_mask(axes: Axes) -> None:
    """Draw the decay mask of the head that forgets fastest."""
    n = ROWS * COLS + 1
    mask = np.array(decay_mask(n, vir_log_decay(HEADS))[0])
    mask = np.where(np.tri(n, dtype=bool), mask, np.nan)
    picture = axes.imshow(mask, cmap="Greys", vmin=0.4, vmax=1)
    axes.figure.colorbar(picture, ax=axes, shrink=0.75, label=r"$D_{nm} = \gamma^{\,n-m}$")
    axes.set(xlabel="key token m", ylabel="query token n", xticks=[0, 4, 8, 12, 16], yticks=[0, 4, 8, 12, 16])
    axes.text(10.5, 5, "0: not yet read", ha="center", color="0.4", fontsize=9)
    axes.set_title(r"2  Parallel: $O = (QK^\top \odot D)\,V$", fontsize=11, loc="left")


def draw_recurrence(axes: Axes) -> None:
    """One state that is updated token by token."""
    for step, label in enumerate(("$S_{n-1}$", "$S_n$", "$S_{n+1}$")):
        axes.add_patch(Rectangle((step * 2.0, 1.4), 1.1, 1.1, facecolor="0.9", edgecolor="0.4"))
        axes.text(step * 2.0 + 0.55, 1.95, label, ha="center", va="center", fontsize=13)
    arrow = {"arrowstyle": "-|>", "mutation_scale": 12, "color": "0.25"}
    for step in range(2):
        axes.add_patch(FancyArrowPatch((step * 2.0 + 1.15, 1.95), (step * 2.0 + 1.95, 1.95), **arrow))
        axes.text(step * 2.0 + 1.55, 2.1, r"$\gamma$", ha="center", fontsize=12)
    for step, index in enumerate(("n-1", "n", "n+1")):
        x = step * 2.0 + 0.55
        axes.add_patch(FancyArrowPatch((x, 0.65), (x, 1.35), **arrow))
        axes.text(x, 0.35, rf"$k_{{{index}}}^\top v_{{{index}}}$", ha="center", fontsize=11)
        axes.add_patch(FancyArrowPatch((x, 2.55), (x, 3.25), **arrow))
        axes.text(x, 3.4, rf"$q_{{{index}}} S_{{{index}}}$", ha="center", fontsize=11)
    axes.set(xlim=(-0.3, 5.4), ylim=(-0.2, 4.0))
    axes.axis("off")
    axes.set_title(r"3  Recurrent, the same outputs: $O(1)$ memory", fontsize=11, loc="left")


def main() -> None:
    """Write the picture beside this file."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.9), width_ratios=(0.9, 1.15, 1.2), layout="constrained")
    for draw, panel in zip((draw_patches, draw_mask, draw_recurrence), axes, strict=True):
        draw(panel)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
