"""Figures of made-up arrays: titled, labelled and whole; and those of a model, from the command line."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from vir_jax.inspection import Cost, Curve, LogitContributions, StateSummary, figures
from vir_jax.ops import MODES, vir_log_decay

ROOT = Path(__file__).parents[2]
NAMES = [
    "masks",
    "seen_from_patch",
    "seen_from_class_token",
    "widths",
    "half_lives",
    "layer_contributions",
    "logit_contributions",
    "states",
    "reading",
    "mode_errors",
    "mode_costs",
    "curves",
]
RNG = np.random.default_rng(0)
GRID, DEPTH, HEADS = (3, 4), 12, 6
IMAGE = RNG.integers(0, 255, (6, 8, 3), np.uint8)
LOG_DECAY = vir_log_decay(HEADS)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def curve(scale):
    return Curve(np.arange(1, 6) * 10, scale * np.array([3.0, np.nan, 2.0, 1.0, 0.5]))


TERMS = LogitContributions(
    normal(1, DEPTH, HEADS, 13), normal(1, DEPTH), normal(1, DEPTH), normal(1), normal(1)
)
STATES = StateSummary(*(jnp.abs(normal(1, DEPTH, HEADS, 13)) for _ in range(3)))
NOT_RUN = Cost("parallel", (16, 16), 2**33, None)
COSTS = [Cost(mode, (side, side), 2**side, float(side)) for side in (4, 8) for mode in MODES]
RUN = {
    f"{part}/{name}": curve(0.3) for part in ("train", "eval") for name in ("loss", "top1", "gradient_norm")
}
# Each with the number of its colour bars.
DRAWN = {
    "masks": (lambda: figures.draw_masks(LOG_DECAY, GRID), 1),
    "masks of many heads": (lambda: figures.draw_masks(vir_log_decay(16), (14, 14)), 1),
    "seen from a patch": (lambda: figures.draw_seen_from(LOG_DECAY, GRID, (1, 2)), 2),
    "seen from the class token": (lambda: figures.draw_seen_from(LOG_DECAY, GRID), 2),
    "widths": (lambda: figures.draw_widths(LOG_DECAY, (8, 14, 32)), 1),
    "half-lives": (lambda: figures.draw_half_lives(vir_log_decay(16), (8, 14, 32, 64)), 0),
    "layers": (lambda: figures.draw_layer_shares({1: normal(6, 13), 11: normal(6, 13)}, IMAGE, GRID), 2),
    "logit": (lambda: figures.draw_logit(TERMS, IMAGE, GRID, class_name="grey fox, gray fox"), 1),
    "states": (lambda: figures.draw_states(STATES, LOG_DECAY, state_bytes=2**21, kind="2d"), 0),
    "states of learned decays": (
        lambda: figures.draw_states(STATES, -jnp.abs(normal(DEPTH, HEADS)), state_bytes=2**9, kind="1d"),
        0,
    ),
    "reading": (lambda: figures.draw_reading(normal(13, 9), IMAGE, GRID, class_names=list("abcdefghi")), 0),
    "errors": (lambda: figures.draw_mode_errors({("a", "b"): np.array([0, 1e-7, 1e-6])}, what="x"), 0),
    "costs": (lambda: figures.draw_mode_costs([*COSTS, NOT_RUN], patch=16, what="x"), 0),
    "curves": (lambda: figures.draw_curves({"first": RUN, "second": RUN}), 0),
}


@pytest.mark.parametrize("name", DRAWN)
def test_titled_labelled_and_whole(name):
    draw, colour_bars = DRAWN[name]
    figure = draw()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn, edge = figure.get_tightbbox(canvas.get_renderer()), figure.bbox_inches
    assert edge.x0 <= drawn.x0
    assert edge.y0 <= drawn.y0
    assert drawn.x1 <= edge.x1
    assert drawn.y1 <= edge.y1
    assert figure.get_suptitle()
    bars = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    assert len(bars) == colour_bars
    assert all(bar.get_ylabel() for bar in bars)
    for axes in set(figure.axes) - set(bars):
        for axis in (axes.xaxis, axes.yaxis):
            if any(label.get_visible() for label in axis.get_ticklabels()):
                assert axis.get_label_text(), axes.get_title()


def test_command_line(workdir, tmp_path):
    command = [
        sys.executable,
        "-m",
        "vir_jax.inspection",
        f"--workdir={workdir}",
        "--image=7",
        f"--out={tmp_path}",
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str(tmp_path / f"{name}.png") for name in NAMES]
    for name in NAMES:
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
        assert min(pixels.shape) > 300
        assert pixels.std() > 5  # Something is drawn.
