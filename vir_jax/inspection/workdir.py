"""What a run left in its workdir: the trained model, images as it saw them, and the metrics."""

import dataclasses
import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from vir_jax.data import decode_image, eval_transform, open_source
from vir_jax.inspection.curves import Curve, metric_curves
from vir_jax.models import VisionModel
from vir_jax.models.pixels import normalize
from vir_jax.runs.load import load_run
from vir_jax.runs.log import quiet_libraries
from vir_jax.runs.metrics import read_metrics
from vir_jax.runs.model import image_size
from vir_jax.tasks.classification import check_classifies


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model with trained parameters, and what its run says of them."""

    model: VisionModel
    config: ml_collections.ConfigDict
    class_names: tuple[str, ...]
    step: int

    def prepare(self, image: UInt8[np.ndarray, "y x 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """Return an RGB image cropped and resized as in the run's evaluation."""
        return eval_transform(image, image_size(self.config.model), self.config.data.crop_fraction)

    def normalize(self, images: UInt8[np.ndarray, "b H W 3"]) -> Float[Array, "b H W 3"]:
        """Return prepared images as the model takes them."""
        return normalize(jnp.asarray(images), self.config.data.mean, self.config.data.std)

    def logits(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b classes"]:
        """Return the logits of normalised images, in the mode that the run was trained in."""
        graph, params = nnx.split(self.model)
        mode = self.config.model.mode
        return jax.jit(lambda params, images: nnx.merge(graph, params)(images, mode=mode))(params, images)


def load_model(
    workdir: str | os.PathLike[str], *, checkpoint: str = "last", weights: str | None = None
) -> TrainedModel:
    """Return the model of a run.

    Args:
        workdir: folder of the run.
        checkpoint: "last", "best" or the number of a step.
        weights: "raw" or "ema"; None takes the moving average where the run kept one.

    Raises:
        FileNotFoundError: the folder holds no checkpoints.
        ValueError: no such checkpoint or weights.
    """
    quiet_libraries()
    run = load_run(workdir, checkpoint, weights=weights)
    check_classifies(run.task)
    return TrainedModel(run.model, run.config, run.class_names, run.step)


def read_curves(workdir: str | os.PathLike[str]) -> dict[str, Curve]:
    """Return `metric_curves` of a run.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    try:
        return metric_curves(read_metrics(workdir))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no metrics in {workdir}: expected the workdir of a run") from error


def load_image(trained: TrainedModel, image: str) -> UInt8[np.ndarray, "H W 3"]:
    """Return an image as the model's evaluation would see it.

    Args:
        trained: of `load_model`.
        image: an image file, or the number of an example of the run's evaluation data.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such example, or no image that can be decoded.
    """
    data = trained.config.data
    decode = functools.partial(decode_image, background=tuple(data.background))
    if not image.isdigit():
        return trained.prepare(decode(Path(image).read_bytes()))
    source = open_source(data.dataset, data.eval_split, data_dir=data.data_dir)
    if int(image) >= len(source):
        raise ValueError(f"image {image}: the run's evaluation data has examples 0 to {len(source) - 1}")
    stored = source[int(image)]["image"]
    return trained.prepare(decode(stored) if isinstance(stored, bytes) else stored)
