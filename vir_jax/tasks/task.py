"""The contract between a task and all that trains, saves, evaluates and reports it."""

import abc
from collections.abc import Mapping, Sequence
from typing import ClassVar

import ml_collections
import numpy as np
from jaxtyping import Array, Float, Key

from vir_jax.models.pixels import normalize

Batch = dict[str, Array]
"""What the loaders give: "image" uint8 [b y x 3], "label" int32 [b], or of tasks `per_pixel` uint8 [b y x], 255 where a
pixel has none; in evaluation "mask" bool [b], of examples, besides."""


class Task(abc.ABC):
    """From batches to inputs, targets and a loss; from outputs to metrics, one of which says what is best.

    A task is made once for a run. Its methods but `metrics` and `columns` are traced: pure functions of arrays.

    Args:
      config: of the run. A task checks here what it uses of it, augmentations included, with ValueError.
      class_names: of the labels in the data, in their order.

    Attributes:
      best: the metric that the best checkpoint is chosen by.
      higher_is_better: whether the best checkpoint has the highest; else it has the lowest.
      per_pixel: whether the data have a class for each pixel, a mask, in place of one for each image.
      of_classes: whether the model's head has an output for each class of the data, in their order.
      fields: dotted names of the fields of the config that are for tasks alone and that this one uses; 0 must switch
        each off. Those that only other tasks use must be off.
    """

    best: ClassVar[str]
    higher_is_better: ClassVar[bool]
    per_pixel: ClassVar[bool] = False
    of_classes: ClassVar[bool] = False
    fields: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ml_collections.ConfigDict, class_names: Sequence[str]) -> None:
        self.mean, self.std = tuple(config.data.mean), tuple(config.data.std)

    @property
    @abc.abstractmethod
    def num_outputs(self) -> int:
        """How many numbers the model's head gives."""

    # ---------------------------------------------------------------- training

    def training_inputs(self, batch: Batch, key: Key[Array, ""]) -> tuple[Array, Array]:
        """Return what the model is given and what `loss` compares its outputs with, arrays [b ...].

        The whole batch is here at once; with gradient accumulation, model and loss see slices of it.

        Args:
          batch: of the training data.
          key: of this step; all randomness comes from it.
        """
        return self.inputs(batch), batch["label"]

    @abc.abstractmethod
    def loss(
        self, outputs: Float[Array, "b ..."], targets: Array
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Return the loss that is minimised and the metrics of training, each a mean over the examples.

        Args:
          outputs: of the model, float32.
          targets: of `training_inputs`.
        """

    # ---------------------------------------------------------------- evaluation

    def inputs(self, batch: Batch) -> Float[Array, "b y x c"]:
        """Return what the model is given in evaluation: the normalised images, unless a task says otherwise."""
        return normalize(batch["image"], self.mean, self.std)

    @abc.abstractmethod
    def evaluate(self, outputs: Float[Array, "b ..."], batch: Batch) -> dict[str, Array]:
        """Return what is averaged over the examples, each [b ...].

        Rows whose mask is False (padding, corrupt images) hold anything and are left out of the mean; a task need not
        look at the mask.

        Args:
          outputs: of the model, float32.
          batch: of the evaluation data.
        """

    def among(self, class_names: Sequence[str]) -> "Task":
        """Return the task in which the model chooses among some of the classes alone; itself where it chooses none.

        Args:
          class_names: of the run's data.
        """
        return self

    def metrics(self, means: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Return the metrics, `best` among them.

        Args:
          means: of what `evaluate` returns, over all examples, float64. By default they are the metrics. The number
            of examples, "count", is added to them.
        """
        return {name: float(mean) for name, mean in means.items()}

    def columns(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Return the metrics as text, by the heading of a table's column."""
        return {name: f"{value:.4f}" for name, value in metrics.items()}

    def score(self, metrics: Mapping[str, float]) -> float:
        """Return `best` of these metrics, so signed that the best checkpoint has the highest."""
        return metrics[self.best] if self.higher_is_better else -metrics[self.best]
