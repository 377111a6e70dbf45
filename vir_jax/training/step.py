"""The training step, a pure function of (state, batch), and the sums that evaluation adds up."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from vir_jax.models.pixels import normalize
from vir_jax.runs.state import Params, TrainState, update_ema
from vir_jax.training.mixing import mix, smooth_labels

Batch = dict[str, Array]
Metrics = dict[str, Array]
# (params, normalised images, key of drop path or None) -> logits.
Apply = Callable[[Params, Array, Key[Array, ""] | None], Float[Array, "b classes"]]


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What a step needs to know besides model and optimiser; see `default_config` for the meaning."""

    seed: int
    num_classes: int
    mean: Sequence[float]
    std: Sequence[float]
    label_smoothing: float
    mixup_alpha: float
    cutmix_alpha: float
    switch_probability: float
    accumulation_steps: int
    ema_decay: float


def in_top_k(logits: Float[Array, "b classes"], labels: Int[Array, " b"], k: int) -> Bool[Array, " b"]:
    """Whether the label is among the k best classes; of equal scores the lower class wins, as in argmax.

    NaN is never right: a score that is not at most the label's counts as ahead of it.
    """
    score = jnp.take_along_axis(logits, labels[:, None], axis=1)
    lower = jnp.arange(logits.shape[1], dtype=jnp.int32) < labels[:, None]
    ahead = ~(logits <= score) | ((logits == score) & lower)
    return jnp.sum(ahead, axis=1, dtype=jnp.int32) < k


def make_train_step(
    apply: Apply,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: StepConfig,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step: (state, {"image": uint8 [b y x 3], "label": int32 [b]}) -> (state, metrics).

    All randomness is folded from (seed, step), and the learning rate is the schedule's at the same step. A step whose
    loss, gradients or updates are not finite changes nothing but the step counter, and says so in metrics["finite"];
    the caller decides what becomes of the run. Its learning rate is not made up for: the schedule ends with the run.

    Args:
      apply: the model.
      optimizer: gives the updates of learning rate 1; `make_optimizer` makes one.
      schedule: learning rate by step, counted from 0.
      config: the rest.
    """

    def loss_function(
        params: Params, images: Array, targets: Array, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        logits = apply(params, images, key).astype(jnp.float32)
        loss = jnp.mean(optax.softmax_cross_entropy(logits, targets))
        # A mixed image counts as the class that it holds most of.
        labels = jax.lax.argmax(targets, axis=1, index_dtype=jnp.int32)
        accuracies = {f"top{k}": jnp.mean(in_top_k(logits, labels, k), dtype=jnp.float32) for k in (1, 5)}
        return loss, {"loss": loss, **accuracies}

    def gradients(
        params: Params, images: Array, targets: Array, key: Key[Array, ""]
    ) -> tuple[Params, Metrics]:
        """Means over the batch, computed in `accumulation_steps` slices."""
        slices = config.accumulation_steps
        gradient = jax.grad(loss_function, has_aux=True)
        if slices == 1:
            return gradient(params, images, targets, key)

        def accumulate(total: Any, inputs: tuple[Array, Array, Key[Array, ""]]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, *inputs)), None

        # Every slices-th example makes a slice, so that each device slices its own part of the batch.
        images, targets = (jnp.swapaxes(x.reshape(-1, slices, *x.shape[1:]), 0, 1) for x in (images, targets))
        inputs = (images, targets, jax.random.split(key, slices))
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(gradient, params, *jax.tree.map(lambda x: x[0], inputs)),
        )
        total, _ = jax.lax.scan(accumulate, zeros, inputs)
        return jax.tree.map(lambda x: x / slices, total)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        mix_key, drop_path_key = jax.random.split(key)
        images = normalize(batch["image"], config.mean, config.std)
        targets = smooth_labels(batch["label"], config.num_classes, config.label_smoothing)
        images, targets = mix(
            mix_key,
            images,
            targets,
            mixup_alpha=config.mixup_alpha,
            cutmix_alpha=config.cutmix_alpha,
            switch_probability=config.switch_probability,
        )
        grads, metrics = gradients(state.params, images, targets, drop_path_key)

        learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updates = optax.tree.scale(learning_rate, updates)
        params = optax.apply_updates(state.params, updates)
        ema = None
        if state.ema is not None:
            ema = update_ema(state.ema, params, state.step, config.ema_decay)

        metrics["gradient_norm"] = optax.tree.norm(grads)
        metrics["update_norm"] = optax.tree.norm(updates)
        metrics["parameter_norm"] = optax.tree.norm(params)
        metrics["learning_rate"] = learning_rate
        watched = (metrics[name] for name in ("loss", "gradient_norm", "update_norm", "parameter_norm"))
        finite = jnp.all(jnp.isfinite(jnp.stack(list(watched))))
        metrics["finite"] = finite

        stepped = TrainState(step=state.step, params=params, opt_state=opt_state, ema=ema)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stepped, state)
        return dataclasses.replace(kept, step=state.step + 1), metrics

    return train_step


def evaluation_sums(
    logits: Float[Array, "b classes"],
    labels: Int[Array, " b"],
    mask: Bool[Array, " b"],
    reference: Float[Array, "b classes"],
) -> Metrics:
    """Sums over the examples whose mask is True.

    Returns:
      loss, top1, top5, count; squared_difference of the logits from `reference`, and squared_reference
      (float32: counts are exact up to 2**24 examples a batch).
    """
    values = {
        "loss": optax.softmax_cross_entropy_with_integer_labels(logits, labels),
        "top1": in_top_k(logits, labels, 1),
        "top5": in_top_k(logits, labels, 5),
        "count": jnp.ones_like(mask),
        "squared_difference": jnp.sum(jnp.square(logits - reference), axis=1),
        "squared_reference": jnp.sum(jnp.square(reference), axis=1),
    }
    # where, not a product: a NaN in the padding must not reach the sum.
    return {name: jnp.sum(jnp.where(mask, value.astype(jnp.float32), 0)) for name, value in values.items()}
