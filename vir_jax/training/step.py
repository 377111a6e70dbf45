"""The training step, a pure function of (state, batch)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from vir_jax.runs.state import Params, TrainState, update_ema, with_statistics
from vir_jax.tasks import Task
from vir_jax.tasks.task import Batch
from vir_jax.training.gradients import mean_gradients

Metrics = dict[str, Array]
# (params, inputs, key of drop path) -> outputs, and the model's statistics, {} where it has none.
Apply = Callable[[Params, Array, Key[Array, ""]], tuple[Float[Array, "b ..."], Params]]


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What a step needs to know besides model, task and optimiser; see `default_config` for the meaning."""

    seed: int
    accumulation_steps: int
    reduce_dtype: str
    ema_decay: float


def make_train_step(
    apply: Apply,
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: StepConfig,
    *,
    apart: bool = True,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Return the step: (state, batch) -> (state, metrics), the task's among them.

    All randomness is folded from (seed, step), and the learning rate is the schedule's at the same step. A step whose
    loss, gradients or updates are not finite changes nothing but the step counter, and says so in metrics["finite"];
    the caller decides what becomes of the run. Its learning rate is not made up for: the schedule ends with the run.

    Args:
      apply: the model.
      task: what is learned.
      optimizer: gives the updates of learning rate 1; `make_optimizer` makes one.
      schedule: learning rate by step, counted from 0.
      config: the rest.
      apart: whether no example of a batch looks at another; see `mean_gradients`.
    """

    def loss_function(
        params: Params, inputs: Array, targets: Array, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], tuple[Metrics, Params]]:
        outputs, statistics = apply(params, inputs, key)
        loss, metrics = task.loss(outputs.astype(jnp.float32), targets)
        return loss, ({**metrics, "loss": loss}, statistics)

    def gradients(
        params: Params, inputs: Array, targets: Array, key: Key[Array, ""]
    ) -> tuple[Params, tuple[Metrics, Params]]:
        return mean_gradients(
            jax.grad(loss_function, has_aux=True),
            params,
            (inputs, targets),
            key,
            slices=config.accumulation_steps,
            reduce_dtype=config.reduce_dtype,
            apart=apart,
        )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed, impl="threefry2x32"), state.step)
        task_key, drop_path_key = jax.random.split(key)
        inputs, targets = task.training_inputs(batch, task_key)
        grads, (metrics, statistics) = gradients(state.params, inputs, targets, drop_path_key)

        learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updates = optax.tree.scale(learning_rate, updates)
        params = with_statistics(optax.apply_updates(state.params, updates), statistics)
        ema = None
        if state.ema is not None:
            ema = update_ema(state.ema, params, state.step, config.ema_decay)

        metrics["gradient_norm"] = optax.tree.norm(grads)
        metrics["update_norm"] = optax.tree.norm(updates)
        # Without running variances, which are squares of activations, and may be any size.
        no_statistics = jax.tree.map(jnp.zeros_like, statistics)
        metrics["parameter_norm"] = optax.tree.norm(with_statistics(params, no_statistics))
        metrics["learning_rate"] = learning_rate
        watched = [metrics[name] for name in ("loss", "gradient_norm", "update_norm")]
        finite = jnp.all(jnp.isfinite(jnp.stack([*watched, optax.tree.norm(params)])))
        metrics["finite"] = finite

        stepped = TrainState(step=state.step, params=params, opt_state=opt_state, ema=ema)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stepped, state)
        return dataclasses.replace(kept, step=state.step + 1), metrics

    return train_step
