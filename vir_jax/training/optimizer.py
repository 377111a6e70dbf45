"""Optimiser and learning-rate schedule.

They are apart: an optimiser gives the update of learning rate 1, and the step multiplies it by the schedule's value at
its own counter. So there is one count of steps, and the learning rate that is logged is the one applied.
"""

import inspect
from typing import Any

import jax.numpy as jnp
import ml_collections
import optax

from vir_jax.runs.validate import OPTIMIZERS
from vir_jax.training import transfer
from vir_jax.training.optimizers import MAKERS
from vir_jax.training.transfer import scale_by_layer

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
    """Return the keywords of `make_optimizer`: what the optimiser reads of `config.optim`, not the schedule."""
    unread = set().union(*OPTIMIZERS.values()) - set(OPTIMIZERS.get(optim.name, ()))
    return {name: value for name, value in optim.items() if name not in {*SCHEDULE_FIELDS, *unread}}


def make_optimizer(
    name: str, *, clip_norm: float = 0.0, layer_decay: float = 1.0, freeze: str = "", **options: Any
) -> optax.GradientTransformation:
    """Make an optimiser by name: clipping by global norm, then what `name` does, at a learning rate of 1.

    Args:
      name: one of `vir_jax.training.optimizers.MAKERS`.
      clip_norm: global norm that gradients are clipped to; 0 turns clipping off.
      layer_decay: see `scale_by_layer`; 1 turns it off.
      freeze: names of parameters that stay as they are, separated by commas; see `transfer.freeze`.
      **options: keywords of the optimiser: of b1, b2, eps those that it has, and weight_decay, which applies to
        `decay_mask`.

    Returns:
      A transformation whose updates are to be multiplied by the learning rate and added to the parameters.

    Raises:
      ValueError: an unknown name, or an option that this optimiser does not have.
    """
    if name not in MAKERS:
        raise ValueError(f"config.optim.name is {name!r}; expected one of {sorted(MAKERS)}")
    known = inspect.signature(MAKERS[name]).parameters
    for option, value in options.items():
        if option not in known:
            raise ValueError(
                f"config.optim.{option} is {value!r}, and {name!r} has no such option; it has {sorted(known)}"
            )
    optimizer = MAKERS[name](**options)
    if clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)
    if layer_decay != 1:
        optimizer = optax.chain(optimizer, scale_by_layer(layer_decay))
    patterns = transfer.frozen_names(freeze)
    return transfer.freeze(optimizer, patterns) if patterns else optimizer
