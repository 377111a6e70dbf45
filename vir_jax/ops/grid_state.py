"""The state of retention over a grid: one [d, e] matrix per column."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from vir_jax.ops.contract import contract, empty_state
from vir_jax.ops.decay import decay_between, decay_power

# Columns summed by one product, whose cost grows with their square; of more the blocks are summed first.
BLOCK = 32


def empty_grid_state(
    k: Float[Array, "b n h d"], v: Float[Array, "b n h e"], cols: int
) -> Float32[Array, "b h x d e"]:
    """Return the state above the first row: zero, and laid out over devices as k and v are."""
    return jnp.repeat(empty_state(k, v)[:, :, None], cols, axis=2)


def along_columns(
    own: Float32[Array, "b h x d e"], log_decay: Float32[Array, "h"], *, reverse: bool = False
) -> Float32[Array, "b h x d e"]:
    """Turn each column's own sums into the states: S[x] = sum over x' <= x of gamma^(x - x') own[x']."""
    if own.shape[2] > BLOCK:
        return _along_blocks(own, log_decay, reverse=reverse)
    x = jnp.arange(own.shape[2], dtype=jnp.int32)
    x = x[::-1] if reverse else x
    # One mask for each of the batch, laid out over devices as the state is, moves no axis of the far larger state.
    nothing = jnp.sum(own[:, :, :0], axis=(2, 3, 4))
    mask = decay_between(log_decay, x, x) + nothing[..., None, None]
    return contract("bhxz,bhzde->bhxde", mask, own, jax.lax.Precision.HIGHEST)


def _along_blocks(
    own: Float32[Array, "b h x d e"], log_decay: Float32[Array, "h"], *, reverse: bool
) -> Float32[Array, "b h x d e"]:
    """Sum inside blocks of columns, and add to each what arrives from the blocks before: sums of their sums."""
    if reverse:
        return jnp.flip(_along_blocks(jnp.flip(own, axis=2), log_decay, reverse=False), axis=2)
    b, h, cols, d, e = own.shape
    blocks = -(-cols // BLOCK)
    padded = jnp.pad(own, ((0, 0), (0, 0), (0, blocks * BLOCK - cols), (0, 0), (0, 0)))
    inside = jax.vmap(partial(along_columns, log_decay=log_decay), in_axes=2, out_axes=2)(
        padded.reshape(b, h, blocks, BLOCK, d, e)
    )
    sums = along_columns(inside[:, :, :, -1], BLOCK * log_decay)
    arriving = jnp.pad(sums[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0), (0, 0)))
    decay = decay_power(log_decay, 1 + jnp.arange(BLOCK, dtype=jnp.int32))[:, None, :, None, None]
    return (inside + decay * arriving[:, :, :, None]).reshape(b, h, -1, d, e)[:, :, :cols]


def between_columns(
    state: Float32[Array, "b h x d e"], log_decay: Float32[Array, "h"]
) -> Float32[Array, "b h x d e"]:
    """Invert `along_columns`: own[x] = S[x] - gamma S[x - 1]."""
    left = jnp.pad(state[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0), (0, 0)))
    return state - jnp.exp(log_decay)[:, None, None, None] * left
