"""The state of retention over a grid: one [d, e] matrix per column."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from vir_jax.ops.contract import contract
from vir_jax.ops.decay import decay_between


def along_columns(
    state: Float32[Array, "b h x d e"], log_decay: Float32[Array, "h"], *, reverse: bool = False
) -> Float32[Array, "b h x d e"]:
    """Decayed sum over the columns up to each: S[x] = sum over x' <= x of gamma^(x - x') U[x']."""
    x = jnp.arange(state.shape[2])
    x = x[::-1] if reverse else x
    mask = decay_between(log_decay, x, x)
    return contract("hxz,bhzde->bhxde", mask, state, jax.lax.Precision.HIGHEST)


def between_columns(
    state: Float32[Array, "b h x d e"], log_decay: Float32[Array, "h"]
) -> Float32[Array, "b h x d e"]:
    """The inverse of `along_columns`: U[x] = S[x] - gamma S[x - 1]."""
    left = jnp.pad(state[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0), (0, 0)))
    return state - jnp.exp(log_decay)[:, None, None, None] * left
