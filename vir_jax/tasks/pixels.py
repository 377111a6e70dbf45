"""Pixels: the density of images, each pixel predicted from those before it, in bits per dimension."""

import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float, Int, Key

from vir_jax.models.likelihood import make_likelihood
from vir_jax.models.pixels import to_levels
from vir_jax.tasks.task import Batch, Task

# Fields of config.augment, each with the value at which it leaves the distribution of the images alone.
DENSITY = {"crop": "none", "randaugment_ops": 0, "color_jitter": 0, "erase": 0}


class Pixels(Task):
    """How probable images are: -log2 p(image) per dimension, a dimension being one channel of one pixel.

    The model is one of pixels (`stem="pixels"`), which says levels, channels and the distribution. It is trained by
    teacher forcing. Of the augmentations only a horizontal flip is allowed; it is part of the density, too: the model
    learns that of images and mirrored images.
    """

    best = "bits_per_dim"
    higher_is_better = False

    def __init__(self, config: ml_collections.ConfigDict, class_names: Sequence[str]) -> None:
        super().__init__(config, class_names)
        model = config.model
        if model.stem != "pixels":
            raise ValueError(f"config.model.stem is {model.stem!r}; expected 'pixels' for the task 'pixels'")
        for field, off in DENSITY.items():
            if config.augment[field] != off:
                raise ValueError(
                    f"config.augment.{field} is {config.augment[field]!r}, which changes the density that the task "
                    f"'pixels' learns; expected {off!r}"
                )
        self.likelihood = make_likelihood(model.levels, model.channels or 1, model.mixtures)

    @property
    def num_outputs(self) -> int:
        """How many numbers describe the distribution of a pixel."""
        return self.likelihood.num_outputs

    def training_inputs(
        self, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Int[Array, "b y x channels"], Int[Array, "b y x channels"]]:
        """Return the levels of the images twice: what is read is what is predicted."""
        levels = self.inputs(batch)
        return levels, levels

    def inputs(self, batch: Batch) -> Int[Array, "b y x channels"]:
        """Return the levels of the images."""
        return to_levels(batch["image"], self.likelihood.levels, self.likelihood.channels)

    def loss(
        self, outputs: Float[Array, "b n outputs"], targets: Int[Array, "b y x channels"]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Return the bits per dimension."""
        bits = jnp.mean(self.bits(outputs, targets))
        return bits, {self.best: bits}

    def evaluate(self, outputs: Float[Array, "b n outputs"], batch: Batch) -> dict[str, Array]:
        """Return the bits per dimension of each image."""
        return {self.best: self.bits(outputs, self.inputs(batch))}

    def columns(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Return the metrics as text."""
        return {"bits/dim": f"{metrics[self.best]:.4f}"}

    def bits(
        self, outputs: Float[Array, "b n outputs"], levels: Int[Array, "b y x channels"]
    ) -> Float[Array, " b"]:
        """Return the bits per dimension of each image."""
        symbols = levels.reshape(levels.shape[0], -1, levels.shape[-1])
        nats = -jnp.sum(self.likelihood.log_probability(outputs, symbols), axis=1)
        return nats / (math.log(2) * math.prod(symbols.shape[1:]))


def check_predicts_pixels(task: Task) -> None:
    """Check that a run's model gives the distribution of pixels, for whoever draws them.

    Raises:
      ValueError: its task is another.
    """
    if not isinstance(task, Pixels):
        raise ValueError(
            f"the run's task is {type(task).__name__}, which predicts no pixels; expected pixels"
        )
