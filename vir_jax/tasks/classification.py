"""Classification: one class an image; cross-entropy on soft targets, and how often the class is among the best."""

import copy
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from vir_jax.models.readout import DENSE
from vir_jax.tasks.mixing import mix, smooth_labels
from vir_jax.tasks.task import Batch, Task

# The logit of a class that cannot be chosen. No infinity: 0 times that is no number.
NEVER = -1e9


class Classification(Task):
    """Which of the data's classes an image shows, with label smoothing, mixup and cutmix."""

    best = "top1"
    higher_is_better = True
    of_classes = True
    fields = ("label_smoothing", "bce_loss", "mixing.mixup_alpha", "mixing.cutmix_alpha")

    def __init__(self, config: ml_collections.ConfigDict, class_names: Sequence[str]) -> None:
        super().__init__(config, class_names)
        if config.model.readout in DENSE:
            raise ValueError(
                f"config.model.readout is {config.model.readout!r}, which gives logits to each pixel; expected"
                " one that reads the image, such as 'class_token', for a task of classes of images"
            )
        self._class_names, self._num_classes = tuple(class_names), len(class_names)
        self._allowed: np.ndarray | None = None  # Of each class, whether it can be chosen; None: all.
        self._label_smoothing = config.label_smoothing
        self._mixing = dict(config.mixing)
        self._binary = config.bce_loss

    @property
    def num_outputs(self) -> int:
        """The number of classes."""
        return self._num_classes

    def training_inputs(
        self, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, "b y x c"], Float[Array, "b classes"]]:
        """Return mixed images and distributions over the classes."""
        targets = smooth_labels(batch["label"], self._num_classes, self._label_smoothing)
        return mix(key, self.inputs(batch), targets, **self._mixing)

    def loss(
        self, outputs: Float[Array, "b classes"], targets: Float[Array, "b classes"]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Return the cross-entropy in nats, and top-1 and top-5 as fractions."""
        losses = binary_cross_entropy if self._binary else optax.softmax_cross_entropy
        loss = jnp.mean(losses(outputs, targets))
        # A mixed image counts as the class that it holds most of.
        labels = jax.lax.argmax(targets, axis=1, index_dtype=jnp.int32)
        return loss, {f"top{k}": jnp.mean(in_top_k(outputs, labels, k), dtype=jnp.float32) for k in (1, 5)}

    def among(self, class_names: Sequence[str]) -> "Classification":
        """Return the task in which the model chooses among these classes alone."""
        task = copy.copy(self)
        task._allowed = np.isin(self._class_names, list(class_names))
        return task

    def scores(self, outputs: Float[Array, "b classes"]) -> Float[Array, "b classes"]:
        """Return the logits, but `NEVER` of the classes that cannot be chosen."""
        return outputs if self._allowed is None else jnp.where(self._allowed, outputs, NEVER)

    def probabilities(self, outputs: Float[Array, "b classes"]) -> Float[Array, "b classes"]:
        """Return how probable each class is: of one of them by the softmax, with bce_loss of each by itself."""
        scores = self.scores(outputs)
        return jax.nn.sigmoid(scores) if self._binary else jax.nn.softmax(scores)

    def evaluate(self, outputs: Float[Array, "b classes"], batch: Batch) -> dict[str, Array]:
        """Return whether the label is the best class, or among the best five, and the cross-entropy in nats."""
        outputs, labels = self.scores(outputs), batch["label"]
        if self._binary:
            loss = binary_cross_entropy(outputs, smooth_labels(labels, self._num_classes, 0.0))
        else:
            loss = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
        return {
            "top1": in_top_k(outputs, labels, 1),
            "top5": in_top_k(outputs, labels, 5),
            "loss": loss,
        }

    def metrics(self, means: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Return top-1 and top-5 as fractions, and the loss in nats."""
        return {name: float(means[name]) for name in ("top1", "top5", "loss")}

    def columns(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Return the metrics as text."""
        return {
            "top-1": f"{metrics['top1']:.2%}",
            "top-5": f"{metrics['top5']:.2%}",
            "loss": f"{metrics['loss']:.4f}",
        }


def binary_cross_entropy(
    logits: Float[Array, "b classes"], targets: Float[Array, "b classes"]
) -> Float[Array, " b"]:
    """Return the cross-entropy of whether an image shows each class, summed over the classes.

    So a mixed image shows two, and none lessens the other (Beyer et al. 2020, arXiv 2006.07159; Wightman et al. 2021,
    arXiv 2110.00476, who take the mean over classes: a learning rate of theirs for SGD is to be divided by their
    number).
    """
    return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, targets), axis=-1)


def check_classifies(task: Task) -> None:
    """Check that a run's outputs are the logits of classes, for whoever names the classes.

    Raises:
      ValueError: its task is another.
    """
    if not isinstance(task, Classification):
        raise ValueError(
            f"the run's task is {type(task).__name__}, whose outputs are no classes; expected classification"
        )


def in_top_k(logits: Float[Array, "b classes"], labels: Int[Array, " b"], k: int) -> Bool[Array, " b"]:
    """Return whether the label is among the k best classes; of equal scores the lower class wins, as in argmax.

    NaN is never right: a score that is not at most the label's counts as ahead of it.
    """
    classes = jnp.arange(logits.shape[1], dtype=jnp.int32)
    # Not a gather: XLA cannot split one over an axis of the mesh within a `shard_map` over another.
    score = jnp.sum(logits, axis=1, keepdims=True, where=classes == labels[:, None])
    lower = classes < labels[:, None]
    ahead = ~(logits <= score) | ((logits == score) & lower)
    return jnp.sum(ahead, axis=1, dtype=jnp.int32) < k
