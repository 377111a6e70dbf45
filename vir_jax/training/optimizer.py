"""Optimiser and learning-rate schedule."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from vir_jax.parallel.sharding import dotted
from vir_jax.runs.state import Params


def learning_rate_schedule(config: ml_collections.ConfigDict, *, steps_per_epoch: float) -> optax.Schedule:
    """Linear warm-up, then a cosine, then constant: a function of the step (docs/method.md, section 4).

    Args:
      config: the run's `optim` section and `epochs`.
      steps_per_epoch: optimiser steps per pass over the training data.
    """
    optim = config.optim
    warmup_steps = round(optim.warmup_epochs * steps_per_epoch)
    decay_steps = round(config.epochs * steps_per_epoch)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=optim.warmup_lr if warmup_steps else optim.lr,
        peak_value=optim.lr,
        warmup_steps=warmup_steps,
        decay_steps=max(decay_steps, warmup_steps + 1),
        end_value=optim.final_lr,
    )
    return lambda step: schedule(jnp.asarray(step, jnp.float32))


def decay_mask(params: Any) -> Any:
    """True for the leaves that weight decay applies to: kernels alone.

    Biases, norms, LayerScale, position embedding and class token are left out.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: dotted(path).endswith("kernel"), params)


def make_optimizer(
    optim: ml_collections.ConfigDict, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """AdamW or LAMB after clipping by global norm.

    Raises:
      ValueError: an unknown name.
    """
    makers = {"adamw": optax.adamw, "lamb": lamb}
    if optim.name not in makers:
        raise ValueError(f"config.optim.name is {optim.name!r}; expected one of {sorted(makers)}")
    optimizer = makers[optim.name](
        schedule,
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        mask=decay_mask,
    )
    if optim.clip_norm:
        return optax.chain(optax.clip_by_global_norm(optim.clip_norm), optimizer)
    return optimizer


def lamb(
    learning_rate: optax.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    mask: Callable[[Params], Any],
) -> optax.GradientTransformation:
    """`optax.lamb` for a model whose blocks share their arrays: each block has trust ratios of its own.

    The trust ratio applies to every parameter, as published (You et al., 2020).
    """
    return optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask=mask),
        for_each_block(optax.scale_by_trust_ratio()),
        optax.scale_by_learning_rate(learning_rate),
    )


def for_each_block(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies a transformation without state to the parameters of each block, and to the others, by itself."""

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        def apply(updates: Params, params: Params) -> Params:
            return transform.update(updates, state, params)[0]

        assert params is not None
        return {
            name: (jax.vmap(apply) if name == "blocks" else apply)(part, params[name])
            for name, part in updates.items()
        }, state

    return optax.GradientTransformation(transform.init, update)
