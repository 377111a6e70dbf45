"""Images drawn by the model of a run, whole or from the first rows of an image."""

import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from vir_jax.data import decode_image, eval_transform, open_source
from vir_jax.generation.generate import generate
from vir_jax.models import VisionModel
from vir_jax.models.likelihood import Likelihood
from vir_jax.models.pixels import to_colours, to_levels
from vir_jax.runs.load import Run, load_run
from vir_jax.runs.log import quiet_libraries
from vir_jax.runs.metrics import ProgressBar
from vir_jax.runs.model import image_size
from vir_jax.runs.writers import tiled
from vir_jax.tasks import Task
from vir_jax.tasks.pixels import Pixels, check_predicts_pixels

# Images drawn at a time, at most.
BATCH_SIZE = 64


def generate_images(
    workdir: str | os.PathLike[str],
    num: int,
    *,
    checkpoint: str = "last",
    weights: str | None = None,
    seed: int = 0,
    temperature: int | float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    prompt: str | None = None,
    rows: int | None = None,
) -> tuple[UInt8[np.ndarray, "num y x 3"], Float[np.ndarray, " num"]]:
    """Draw images from the model of a run; a progress bar is shown on a terminal.

    Args:
      workdir: folder of the run.
      num: how many images.
      checkpoint: "last", "best" or the number of a step.
      weights: "raw" or "ema"; None takes the average where the run kept one.
      seed: of all images; image i is the same whatever `num` is.
      temperature: see `vir_jax.generation.Sampling`, and the next two.
      top_k: see there.
      top_p: see there.
      prompt: an image file, or the number of an example of the run's evaluation data: what all images begin with.
      rows: how many of its rows; None takes half of them.

    Returns:
      The images, and the bits per dimension, in the model, of what was drawn of each.

    Raises:
      FileNotFoundError: there is no run, or no such prompt.
      ValueError: a run of another task, or an argument that its model cannot do with.
    """
    quiet_libraries()
    if num < 1:
        raise ValueError(f"num is {num}; expected at least 1")
    run = load_run(workdir, checkpoint, weights=weights)
    check_predicts_pixels(run.task)
    assert isinstance(run.task, Pixels)
    likelihood, size = run.task.likelihood, image_size(run.config.model)
    given = read_prompt(run, likelihood, prompt, rows)
    kept = 0 if given is None else given.shape[1]
    batches = [(first, min(BATCH_SIZE, num - first)) for first in range(0, num, BATCH_SIZE)]

    images, bits = [], []
    with ProgressBar(total=len(batches) * (size[0] - kept), unit="row", disable=None, leave=False) as bar:
        for first, batch in batches:
            levels, log_probabilities = generate(
                run.model,
                jax.random.key(seed, impl="threefry2x32"),
                batch,
                given,
                temperature,
                top_k,
                top_p,
                first=first,
                progress=lambda _: bar.update(),
            )
            images.append(np.asarray(to_colours(levels, likelihood.levels)))
            dimensions = (size[0] - kept) * size[1] * likelihood.channels
            drawn = np.asarray(log_probabilities[:, kept:], np.float64)
            bits.append(-np.sum(drawn, axis=(1, 2)) / (math.log(2) * dimensions))
    return np.concatenate(images), np.concatenate(bits)


def read_prompt(
    run: Run, likelihood: Likelihood, prompt: str | None, rows: int | None
) -> Int[np.ndarray, "1 rows x channels"] | None:
    """Return the levels of the first rows of an image, which is just as large as those of the run.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it has another size, or pixels that no level stands for; no such example, or not so many rows.
    """
    if prompt is None:
        if rows is not None:
            raise ValueError(
                f"rows is {rows}, and there is no prompt that they could be taken from. Name one"
            )
        return None
    size = height, width = image_size(run.config.model)
    image = _example(run, int(prompt)) if prompt.isdecimal() else _image(run, Path(prompt))
    if image.shape[:2] != size:
        raise ValueError(
            f"the prompt {prompt} has {image.shape[0]} x {image.shape[1]} pixels; expected {height} x {width}, as the "
            "model draws. Crop or resize it"
        )
    rows = height // 2 if rows is None else rows
    if not 1 <= rows < height:
        raise ValueError(f"rows is {rows}; expected 1 to {height - 1} of the prompt's {height}")
    levels = to_levels(jnp.asarray(image[None, :rows]), likelihood.levels, likelihood.channels)
    wrong = np.argwhere(np.asarray(to_colours(levels, likelihood.levels))[0] != image[:rows])
    if len(wrong):
        y, x, _ = wrong[0]
        kind = "grey" if likelihood.channels == 1 else "of a channel"
        raise ValueError(
            f"the prompt {prompt} has the colour {tuple(map(int, image[y, x]))} in row {y}, column {x}, which is none "
            f"of the {likelihood.levels} levels ({kind}) that the model knows"
        )
    return np.asarray(levels)


def save_grid(images: UInt8[np.ndarray, "num y x 3"], path: str | os.PathLike[str]) -> None:
    """Write images side by side to an image file, small ones enlarged by a whole number, a white line between them."""
    Image.fromarray(tiled(images)).save(path)


def draw_samples(model: VisionModel, task: Task, num: int, seed: int) -> UInt8[np.ndarray, "num y x 3"]:
    """Draw images from the model of a run in training; `train` shows them after each evaluation.

    Raises:
      ValueError: a run of another task.
    """
    check_predicts_pixels(task)
    assert isinstance(task, Pixels)
    levels, _ = generate(model, jax.random.key(seed, impl="threefry2x32"), num)
    return np.asarray(to_colours(levels, task.likelihood.levels))


def _example(run: Run, number: int) -> UInt8[np.ndarray, "y x 3"]:
    data = run.config.data
    source = open_source(data.dataset, data.eval_split, data_dir=data.data_dir)
    if number >= len(source):
        raise ValueError(f"prompt {number}: the run's evaluation data has examples 0 to {len(source) - 1}")
    stored = source[number]["image"]
    image = decode_image(stored, background=tuple(data.background)) if isinstance(stored, bytes) else stored
    return eval_transform(image, image_size(run.config.model), data.crop_fraction)


def _image(run: Run, path: Path) -> UInt8[np.ndarray, "y x 3"]:
    return decode_image(path.read_bytes(), background=tuple(run.config.data.background))
