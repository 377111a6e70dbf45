"""Optimiser and learning-rate schedule.

They are apart: an optimiser gives the update of learning rate 1, and the step multiplies it by the schedule's value at
its own counter. So there is one count of steps, and the learning rate that is logged is the one applied.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array

from vir_jax.parallel.sharding import dotted
from vir_jax.runs.state import Params

SCHEDULE_FIELDS = ("lr", "warmup_lr", "final_lr", "warmup_epochs", "cooldown_epochs")


def learning_rate_schedule(config: ml_collections.ConfigDict, *, steps_per_epoch: float) -> optax.Schedule:
    """Return linear warm-up, then a cosine, then constant: a function of the step, counted from 0.

    Args:
      config: the run's `optim` section and `epochs`.
      steps_per_epoch: steps per pass over the training data.
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


def optimizer_options(optim: ml_collections.ConfigDict) -> dict[str, Any]:
    """Return the keywords of `make_optimizer`: all of `config.optim` that the schedule does not read."""
    return {name: value for name, value in optim.items() if name not in SCHEDULE_FIELDS}


def make_optimizer(name: str, *, clip_norm: float = 0.0, **options: Any) -> optax.GradientTransformation:
    """Make an optimiser by name: clipping by global norm, then what `name` does, at a learning rate of 1.

    Args:
      name: "adamw" or "lamb".
      clip_norm: global norm that gradients are clipped to; 0 turns clipping off.
      **options: keywords of `optax.adamw` or `lamb`: b1, b2, eps, weight_decay. Weight decay applies to `decay_mask`.

    Returns:
      A transformation whose updates are to be multiplied by the learning rate and added to the parameters.

    Raises:
      ValueError: an unknown name, or an option that this optimiser does not have.
    """
    makers: dict[str, Callable[..., optax.GradientTransformation]] = {"adamw": _adamw, "lamb": lamb}
    if name not in makers:
        raise ValueError(f"config.optim.name is {name!r}; expected one of {sorted(makers)}")
    known = inspect.signature(makers[name]).parameters
    for option, value in options.items():
        if option not in known:
            raise ValueError(
                f"config.optim.{option} is {value!r}, and {name!r} has no such option; it has {sorted(known)}"
            )
    optimizer = makers[name](**options)
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer) if clip_norm else optimizer


def decay_mask(params: Any) -> Any:
    """Return True for the leaves that weight decay applies to: kernels alone.

    Biases, norms, LayerScale, position embedding and class token are left out.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: dotted(path).endswith("kernel"), params)


def _adamw(
    *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 1e-4
) -> optax.GradientTransformation:
    return optax.adamw(1.0, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask)


def lamb(
    *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Return LAMB (You et al., 2020, arXiv 1904.00962) as timm has it, whose trust ratio is for kernels alone.

    A kernel moves by the learning rate times its own norm. Everything that weight decay leaves out (biases, norms,
    LayerScale, embeddings, class token) moves as under Adam: a ratio would let a LayerScale of 1e-5 or a bias that
    begins at 0 grow by a factor of (1 + lr) a step at most, and the blocks behind it would stay silent.
    `optax.lamb` applies the ratio to every array. As in timm's `Lamb` at its defaults (`always_adapt=False`,
    `trust_clip=False`, `grad_averaging=True`, `bias_correction=True`), the ratio is not clipped, and 1 where parameter
    or update is zero; decay is added to the update before the ratio.

    Ours: a kernel keeps its ratio where `weight_decay` is 0 (timm then drops all ratios, which leaves Adam); and there
    is no clipping in here, while timm's `Lamb` clips gradients to a global norm of 1 on top of what else clips them
    (`max_grad_norm=1.0`): `make_optimizer` clips once, to what is asked for.
    """
    return optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
        optax.masked(for_each_array(optax.scale_by_trust_ratio()), decay_mask),
        optax.scale_by_learning_rate(1.0),
    )


def for_each_array(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Apply a transformation without state to each parameter by itself, and of stacked blocks to each block's."""

    def alone(update: Array, param: Array) -> Array:
        return transform.update(update, transform.init(param), param)[0]

    def apply(path: tuple[Any, ...], update: Array, param: Array) -> Array:
        return (jax.vmap(alone) if "blocks" in dotted(path).split(".") else alone)(update, param)

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        return jax.tree_util.tree_map_with_path(apply, updates, params), state

    return optax.GradientTransformation(transform.init, update)
