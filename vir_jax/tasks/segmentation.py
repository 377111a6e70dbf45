"""Segmentation: a class for each pixel; cross-entropy, and how far predicted and true regions overlap."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from vir_jax.label_maps import IGNORED, check_masks_follow
from vir_jax.models.readout import DENSE
from vir_jax.tasks.task import Batch, Task


class Segmentation(Task):
    """Which of the data's classes each pixel shows. The model's readout is one of `DENSE`.

    Pixels labelled `IGNORED` are neither learned nor counted. The intersection over union (IoU) of a class is, over all
    pixels of the data,

        IoU = right / (true + predicted - right),

    with the pixels that are of the class, that are taken for it, and both. Its mean over the classes that are there or
    are predicted, mIoU, is what the best checkpoint is chosen by.
    """

    best = "miou"
    higher_is_better = True
    per_pixel = True
    of_classes = True

    def __init__(self, config: ml_collections.ConfigDict, class_names: Sequence[str]) -> None:
        super().__init__(config, class_names)
        if config.model.readout not in DENSE:
            raise ValueError(
                f"config.model.readout is {config.model.readout!r}; expected one of {DENSE}, for the task"
                " 'segmentation'"
            )
        check_masks_follow(config.augment)
        self.class_names = tuple(class_names)

    @property
    def num_outputs(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    def loss(
        self, outputs: Float[Array, "b y x classes"], targets: UInt8[Array, "b y x"]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Return the cross-entropy of the labelled pixels in nats, summed and divided by the number of all pixels.

        So that each labelled pixel weighs as much, whatever slices the batch is computed in. And "pixel_accuracy", the
        fraction of the labelled pixels that is right, as a mean over the images.
        """
        losses, labelled = self._losses(outputs, targets)
        right = labelled & (_predicted(outputs) == targets)
        count = jnp.sum(labelled, axis=(1, 2), dtype=jnp.int32)
        accuracy = jnp.sum(right, axis=(1, 2), dtype=jnp.int32) / jnp.maximum(count, 1)
        return jnp.mean(losses), {"pixel_accuracy": jnp.mean(accuracy, dtype=jnp.float32)}

    def evaluate(self, outputs: Float[Array, "b y x classes"], batch: Batch) -> dict[str, Array]:
        """Return each image's confusion, and its cross-entropy summed over the labelled pixels."""
        losses, _ = self._losses(outputs, batch["label"])
        return {
            "confusion": confusion(batch["label"], _predicted(outputs), self.num_outputs),
            "cross_entropy": jnp.sum(losses, axis=(1, 2)),
        }

    def metrics(self, means: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Return mIoU and pixel accuracy as fractions, the loss in nats a labelled pixel, and "iou/NAME" of each class.

        A class that is nowhere, neither in the labels nor in the predictions, has no IoU.
        """
        counts = np.asarray(means["confusion"], np.float64)
        iou, labelled = intersection_over_union(counts), counts.sum()
        there = ~np.isnan(iou)
        return {
            "miou": float(iou[there].mean()) if there.any() else float("nan"),
            "pixel_accuracy": float(np.trace(counts) / labelled) if labelled else float("nan"),
            "loss": float(means["cross_entropy"] / labelled) if labelled else float("nan"),
            **{f"iou/{name}": float(iou[k]) for k, name in enumerate(self.class_names) if there[k]},
        }

    def columns(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Return the metrics as text, without those of each class."""
        return {
            "mIoU": f"{metrics['miou']:.2%}",
            "pixel accuracy": f"{metrics['pixel_accuracy']:.2%}",
            "loss": f"{metrics['loss']:.4f}",
        }

    def _losses(
        self, outputs: Float[Array, "b y x classes"], labels: UInt8[Array, "b y x"]
    ) -> tuple[Float[Array, "b y x"], Bool[Array, "b y x"]]:
        """Return the cross-entropy of each pixel, 0 of those without a label, and which have one."""
        labelled = labels != IGNORED
        # Not a gather: XLA cannot split one over an axis of the mesh within a `shard_map` over another.
        own = labels[..., None] == jnp.arange(self.num_outputs, dtype=jnp.int32)
        losses = jax.nn.logsumexp(outputs, axis=-1) - jnp.sum(outputs, axis=-1, where=own)
        return jnp.where(labelled, losses, 0.0), labelled


def _predicted(outputs: Float[Array, "b y x classes"]) -> Int[Array, "b y x"]:
    return jax.lax.argmax(outputs, axis=3, index_dtype=jnp.int32)


def confusion(
    labels: UInt8[Array, "b y x"], predicted: Int[Array, "b y x"], classes: int
) -> Float[Array, "b classes classes"]:
    """Count the pixels of each class (row) that were taken for each (column), image by image.

    Pixels labelled `IGNORED` are in no row. As a product of matrices, which every platform computes fast and splits
    over devices; counts are exact.
    """
    of_label, of_prediction = (
        jax.nn.one_hot(numbers.reshape(numbers.shape[0], -1), classes, dtype=jnp.float32)
        for numbers in (labels, predicted)
    )
    return jnp.einsum("bnk,bnl->bkl", of_label, of_prediction, precision=jax.lax.Precision.HIGHEST)


def intersection_over_union(counts: Float[np.ndarray, "classes classes"]) -> Float[np.ndarray, " classes"]:
    """Return the IoU of each class; NaN of one without pixels, true or predicted.

    Args:
      counts: of pixels of each class (row) that were taken for each (column).
    """
    right = np.diag(counts)
    union = counts.sum(axis=0) + counts.sum(axis=1) - right
    return np.divide(right, union, out=np.full(len(counts), np.nan), where=union > 0)


def check_segments(task: Task) -> None:
    """Check that a run's outputs are the logits of each pixel's class, for whoever writes masks.

    Raises:
      ValueError: its task is another.
    """
    if not isinstance(task, Segmentation):
        raise ValueError(
            f"the run's task is {type(task).__name__}, which gives no class to each pixel; expected segmentation"
        )
