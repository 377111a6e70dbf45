"""A small training state, and a checkpoint of it."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from vir_jax.runs.config import default_config
from vir_jax.runs.state import create_train_state

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_state(step=0, ema=True):
    params = {"blocks": {0: {"kernel": jnp.arange(32.0).reshape(8, 4)}, 1: {"kernel": jnp.ones((8, 4))}}}
    state = jax.jit(lambda params: create_train_state(params, OPTIMIZER, ema=ema))(params)
    return dataclasses.replace(state, step=jnp.int32(step))


def save(checkpoints, state):
    progress = {"data": str(int(state.step))}
    checkpoints.save(state, progress=progress, config=default_config(), metadata={"a": 1})
