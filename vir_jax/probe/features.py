"""Features of images: a vector for each, of any layer of a trained model."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from vir_jax.data import Source, eval_loader
from vir_jax.models import VisionModel
from vir_jax.models.layout import Layout
from vir_jax.models.readout import POOLS
from vir_jax.runs.load import Run
from vir_jax.runs.model import image_size
from vir_jax.runs.state import Params
from vir_jax.tasks.task import Batch

PATCHES_ALONE = "patch_tokens"
"""The layer without a class token."""


@dataclasses.dataclass(frozen=True)
class Features:
    """Vectors of images, and their classes.

    Attributes:
        values: one row an image, in the order of the data; corrupt images are left out.
        labels: numbers in `class_names`.
        class_names: of the data.
        layer: that they are of.
        pool: "class_token", or "average" of the patches.
    """

    values: Float[np.ndarray, "n c"]
    labels: Int[np.ndarray, " n"]
    class_names: tuple[str, ...]
    layer: str
    pool: str

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a NumPy .npz file of these fields."""
        with Path(path).open("wb") as file:
            np.savez(file, allow_pickle=False, **dataclasses.asdict(self))


def extract(
    run: Run, source: Source, layers: Sequence[str], *, pool: str | None = None, batch_size: int | None = None
) -> dict[str, Features]:
    """Return the features of a data set, by layer, with images resized and cropped as in the run's evaluation.

    Args:
        run: of `load_run`.
        source: the images; their classes need not be those of the run.
        layers: names of `VisionModel.intermediate_names` that are tokens: "features", "blocks.3.tokens", ...
        pool: "class_token" or "average"; None: what the model's head reads, or
            "average" where it gives logits to each pixel.
        batch_size: None: of the run's evaluation.

    Raises:
        ValueError: a layer that there is not or that is no tokens, or a pool that it has not.
        TooManyCorruptError: more corrupt images than the run's configuration allows.
    """
    config, data = run.config, run.config.data
    size = image_size(config.model)
    pool = pool or ("average" if run.model.dense else run.model.readout.reads)
    _check(run.model, layers, pool, size)
    batches = eval_loader(
        source,
        batch_size=batch_size or config.eval_batch_size,
        image_size=size,
        crop_fraction=data.crop_fraction,
        num_threads=data.threads,
        max_corrupt_fraction=data.max_corrupt_fraction,
        background=tuple(data.background),
    )
    forward = jax.jit(functools.partial(_forward, run, tuple(layers), pool, run.model.layout(size)))
    rows: dict[str, list[np.ndarray]] = {layer: [] for layer in layers}
    labels = []
    for batch in batches:
        kept = np.asarray(batch["mask"])
        for layer, values in forward(run.params, {"image": batch["image"]}).items():
            rows[layer].append(np.asarray(values)[kept])
        labels.append(np.asarray(batch["label"])[kept])
    names, together = tuple(source.class_names), np.concatenate(labels)
    return {
        layer: Features(np.concatenate(parts), together, names, layer, pool) for layer, parts in rows.items()
    }


def _forward(
    run: Run, layers: tuple[str, ...], pool: str, layout: Layout, params: Params, batch: Batch
) -> dict[str, Array]:
    tokens = run.functions.model(params).intermediates(run.task.inputs(batch), layers)
    return {layer: _pooled(x, layer, pool, layout) for layer, x in tokens.items()}


def _pooled(x: Float[Array, "b n c"], layer: str, pool: str, layout: Layout) -> Float[Array, "b c"]:
    """Return a vector for each image."""
    if pool == "class_token":
        return x[:, -1] if layout.class_token == "last" else x[:, 0]
    return (x if layer == PATCHES_ALONE else layout.patch_tokens(x)).mean(axis=1)


def _check(model: VisionModel, layers: Sequence[str], pool: str, size: Any) -> None:
    """Check that layers are there, and can be pooled so."""
    if pool not in POOLS:
        raise ValueError(f"pool is {pool!r}; expected one of {', '.join(POOLS)}")
    if pool == "class_token" and PATCHES_ALONE in layers:
        raise ValueError(f"{PATCHES_ALONE!r} are before the class token: take pool='average'")
    images = jax.ShapeDtypeStruct((1, *size, model.channels), "float32")
    shapes = jax.eval_shape(lambda images: model.intermediates(images, layers), images)
    for layer, shape in shapes.items():
        if len(shape.shape) != 3:
            raise ValueError(
                f"{layer!r} has shape {shape.shape}, one image; expected tokens [b, n, c], such as 'features',"
                f" 'blocks.{model.depth - 1}.tokens' or 'tokens'"
            )
