"""Decay rates and decay masks, in fp32 log space.

A decay is carried as `log_decay = log(gamma)`, one per head: bf16 rounds 1 - 1/512 to 1, and gamma^i overflows
where the difference of two exponents does not. Exponents are clipped *before* `exp`, so that neither a value nor
a gradient behind `where` is ever infinite.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int


def vir_log_decay(num_heads: int) -> Float32[Array, "h"]:
    """ViR's decays, the same in every layer: gamma = 1 - exp(linspace(log 1/32, log 1/512, h)).

    Returns log(gamma) in fp32, shape [num_heads]. Source: the ViR reviewer release; raises ValueError if
    num_heads is not positive.
    """
    _check_heads(num_heads)
    return jnp.asarray(
        np.log1p(-np.exp(np.linspace(np.log(1 / 32), np.log(1 / 512), num_heads))), jnp.float32
    )


def retnet_log_decay(num_heads: int) -> Float32[Array, "h"]:
    """RetNet's decays: gamma = 1 - 2^(-5 - i) for head i = 0 .. num_heads - 1 (arXiv 2307.08621, section 3.1).

    Returns log(gamma) in fp32, shape [num_heads]; raises ValueError if num_heads is not positive.
    """
    _check_heads(num_heads)
    return jnp.asarray(np.log1p(-np.exp2(-5.0 - np.arange(num_heads))), jnp.float32)


def _check_heads(num_heads: int) -> None:
    if num_heads < 1:
        raise ValueError(f"num_heads is {num_heads}; a decay per head needs at least one head")


def decay_power(log_decay: Float32[Array, "h"], exponent: Int[Array, "*t"]) -> Float32[Array, "h *t"]:
    """gamma^exponent per head, exponents below zero counting as zero."""
    exponent = jnp.maximum(exponent, 0)
    return jnp.exp(jnp.expand_dims(log_decay, tuple(range(1, exponent.ndim + 1))) * exponent)


def _masked_power(
    log_decay: Float32[Array, "h"], exponent: Int[Array, "n m"], visible: Bool[Array, "n m"]
) -> Float32[Array, "h n m"]:
    return jnp.where(visible, decay_power(log_decay, exponent), 0.0)


def decay_between(
    log_decay: Float32[Array, "h"], query_time: Int[Array, "n"], key_time: Int[Array, "m"]
) -> Float32[Array, "h n m"]:
    """gamma^(query_time - key_time) where the key is not later than the query, else 0."""
    elapsed = query_time[:, None] - key_time[None, :]
    return _masked_power(log_decay, elapsed, elapsed >= 0)


def decay_mask(n: int, log_decay: Float32[Array, "h"]) -> Float32[Array, "h n n"]:
    """The 1-D decay mask D[n, m] = gamma^(n - m) for n >= m, else 0 (PAPER section 1), per head."""
    time = jnp.arange(n)
    return decay_between(log_decay, time, time)


def grid_positions(grid: tuple[int, int], trailing: int = 0) -> tuple[Int[Array, "n"], Int[Array, "n"]]:
    """Row y and column x of every token: the grid in row-major order, then the trailing tokens.

    Trailing token j stands at (x = cols - 1, y = rows + j): each alone in the last column of a further row.
    """
    rows, cols = grid
    patch, extra = jnp.arange(rows * cols), jnp.arange(trailing)
    y = jnp.concatenate([patch // max(cols, 1), rows + extra])
    x = jnp.concatenate([patch % max(cols, 1), jnp.full(trailing, cols - 1)])
    return y, x


def decay_between_2d(
    log_decay: Float32[Array, "h"],
    query_position: tuple[Int[Array, "n"], Int[Array, "n"]],
    key_position: tuple[Int[Array, "m"], Int[Array, "m"]],
) -> Float32[Array, "h n m"]:
    """gamma^(dy + dx) where dy >= 0 and dx >= 0, else 0; a position is (y, x) of every token."""
    dy, dx = (q[:, None] - k[None, :] for q, k in zip(query_position, key_position, strict=True))
    return _masked_power(log_decay, dy + dx, (dy >= 0) & (dx >= 0))


def decay_mask_2d(
    grid: tuple[int, int], log_decay: Float32[Array, "h"], trailing: int = 0
) -> Float32[Array, "h n n"]:
    """The 2-D decay mask gamma^(dx + dy) for dx, dy >= 0, else 0 (PAPER section 2), per head.

    n = rows * cols + trailing tokens; `grid_positions` says where each stands.
    """
    position = grid_positions(grid, trailing)
    return decay_between_2d(log_decay, position, position)
