"""The state of retention over a grid: one [d, e] matrix per column."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from vir_jax.ops.contract import contract, empty_state
from vir_jax.ops.decay import decay_between, decay_power

# Columns summed one after the other, in one pass over them; of more by one product, whose cost grows with their square;
# of more than BLOCK the blocks are summed first.
FEW = 8
BLOCK = 32


def empty_grid_state(
    k: Float[Array, "b n h d"], v: Float[Array, "b n h e"], cols: int
) -> Float32[Array, "b h x d e"]:
    """Return the state above the first row: zero, and laid out over devices as k and v are."""
    return jnp.repeat(empty_state(k, v)[:, :, None], cols, axis=2)


def along_columns(
    own: Float32[Array, "b h x d e"],
    log_decay: Float32[Array, "h"],
    *,
    before: Float32[Array, "b h d e"] | None = None,
    reverse: bool = False,
) -> Float32[Array, "b h x d e"]:
    """Turn each column's own sums into the states: S[x] = sum over x' <= x of gamma^(x - x') own[x'].

    `before` is the state of the column before the first. Of rows in place of columns it is the same sum.
    """
    if reverse:
        return jnp.flip(along_columns(jnp.flip(own, axis=2), log_decay, before=before), axis=2)
    if own.shape[2] <= FEW:
        return _one_by_one(own, log_decay, before)
    if own.shape[2] > BLOCK:
        return _along_blocks(own, log_decay, before)
    x = jnp.arange(own.shape[2], dtype=jnp.int32)
    # One mask for each of the batch, laid out over devices as the state is, moves no axis of the far larger state.
    nothing = jnp.sum(own[:, :, :0], axis=(2, 3, 4))
    mask = decay_between(log_decay, x, x) + nothing[..., None, None]
    sums = contract("bhxz,bhzde->bhxde", mask, own, jax.lax.Precision.HIGHEST)
    return sums if before is None else sums + _carried(before, log_decay, own.shape[2])


def _one_by_one(
    own: Float32[Array, "b h x d e"], log_decay: Float32[Array, "h"], before: Float32[Array, "b h d e"] | None
) -> Float32[Array, "b h x d e"]:
    gamma = jnp.exp(log_decay)[:, None, None]
    states = [own[:, :, 0] if before is None else own[:, :, 0] + gamma * before]
    for x in range(1, own.shape[2]):
        states.append(gamma * states[-1] + own[:, :, x])
    return jnp.stack(states, axis=2)


def _carried(
    before: Float32[Array, "b h d e"], log_decay: Float32[Array, "h"], cols: int
) -> Float32[Array, "b h x d e"]:
    """Compute what is left of the state of the column before the first at each of so many columns."""
    decay = decay_power(log_decay, 1 + jnp.arange(cols, dtype=jnp.int32))
    return decay[:, :, None, None] * before[:, :, None]


def _along_blocks(
    own: Float32[Array, "b h x d e"], log_decay: Float32[Array, "h"], before: Float32[Array, "b h d e"] | None
) -> Float32[Array, "b h x d e"]:
    """Sum inside blocks of columns, and add to each what arrives from the blocks before: sums of their sums."""
    b, h, cols, d, e = own.shape
    blocks = -(-cols // BLOCK)
    padded = jnp.pad(own, ((0, 0), (0, 0), (0, blocks * BLOCK - cols), (0, 0), (0, 0)))
    inside = jax.vmap(partial(along_columns, log_decay=log_decay), in_axes=2, out_axes=2)(
        padded.reshape(b, h, blocks, BLOCK, d, e)
    )
    sums = along_columns(inside[:, :, :, -1], BLOCK * log_decay, before=before)
    first = jnp.zeros_like(sums[:, :, 0]) if before is None else before
    arriving = jnp.concatenate([first[:, :, None], sums[:, :, :-1]], axis=2)
    decay = decay_power(log_decay, 1 + jnp.arange(BLOCK, dtype=jnp.int32))[:, None, :, None, None]
    return (inside + decay * arriving[:, :, :, None]).reshape(b, h, -1, d, e)[:, :, :cols]


def between_columns(
    state: Float32[Array, "b h x d e"], log_decay: Float32[Array, "h"]
) -> Float32[Array, "b h x d e"]:
    """Invert `along_columns`: own[x] = S[x] - gamma S[x - 1]."""
    left = jnp.pad(state[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0), (0, 0)))
    return state - jnp.exp(log_decay)[:, None, None, None] * left
