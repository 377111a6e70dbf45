"""The train state, and its moving average of the parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Params = (
    Any  # Nested dict of arrays, float32: parameters, and a model's statistics at their places among them.
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step reads and writes.

    A pytree, so that its leaves may be shapes or shardings as well as arrays.
    """

    step: Any  # int32 []: steps done, those skipped as not finite among them; the schedule's count.
    params: Params
    opt_state: optax.OptState
    ema: Params | None  # None where no average is kept.


def create_train_state(params: Params, optimizer: optax.GradientTransformation, *, ema: bool) -> TrainState:
    """Return the state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=params if ema else None,
    )


def with_statistics(params: Params, statistics: Params) -> Params:
    """Return the parameters with a model's statistics put in their places, a nested dict of these alone."""
    if not isinstance(statistics, dict):
        return statistics
    return params | {name: with_statistics(params[name], part) for name, part in statistics.items()}


def update_ema(ema: Params, params: Params, step: Int[Array, ""], decay: float) -> Params:
    """Return ema + (1 - d) (params - ema), with d = min(decay, (1 + step) / (10 + step)).

    The smaller d of the first steps forgets the random initial parameters; after 9 / (1 - decay) steps it
    is `decay` itself.
    """
    return optax.incremental_update(params, ema, 1 - ema_decay(step, decay))


def ema_decay(step: Int[Array, ""], decay: float) -> Float[Array, ""]:
    """Return min(decay, (1 + step) / (10 + step)), step counted from 0."""
    steps = step.astype(jnp.float32)
    return jnp.minimum(decay, (1 + steps) / (10 + steps))
