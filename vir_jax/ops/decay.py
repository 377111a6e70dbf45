"""Decay rates and decay masks, in fp32 log space.

A decay is carried as `log_decay = log(gamma)`, one per head: bf16 rounds 1 - 1/512 to 1, and a product
gamma^n * gamma^-m overflows where gamma^(n - m) does not. Exponents are clipped *before* `exp`, so that
neither a value nor a gradient behind `where` is ever infinite.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int

Decays = Float32[Array, "h"] | Float32[Array, "b n h"]
"""log(gamma): one per head, or one per head and token, which decays the state that meets the token."""

Position = tuple[Int[Array, "_"], Int[Array, "_"]]  # y and x of some tokens


def vir_log_decay(num_heads: int) -> Float32[Array, "h"]:
    """Return ViR's decays, the same in every layer: gamma = 1 - exp(linspace(log 1/32, log 1/512, num_heads)).

    Returns log(gamma), shape [num_heads], fp32 (docs/method.md, section 1).

    Raises:
        ValueError: num_heads is not positive.
    """
    _check_heads(num_heads)
    return jnp.asarray(
        np.log1p(-np.exp(np.linspace(np.log(1 / 32), np.log(1 / 512), num_heads))), jnp.float32
    )


def retnet_log_decay(num_heads: int) -> Float32[Array, "h"]:
    """Return RetNet's decays: gamma = 1 - 2^(-5 - i) for head i = 0 .. num_heads - 1 (arXiv 2307.08621).

    Returns log(gamma), shape [num_heads], fp32.

    Raises:
        ValueError: num_heads is not positive.
    """
    _check_heads(num_heads)
    return jnp.asarray(np.log1p(-np.exp2(-5.0 - np.arange(num_heads))), jnp.float32)


def _check_heads(num_heads: int) -> None:
    if num_heads < 1:
        raise ValueError(f"num_heads is {num_heads}; expected at least 1, for one decay per head")


def decay_power(log_decay: Float32[Array, "h"], exponent: Int[Array, "*t"]) -> Float32[Array, "h *t"]:
    """Compute gamma^exponent per head; an exponent below zero counts as zero."""
    per_head = jnp.expand_dims(log_decay, tuple(range(1, exponent.ndim + 1)))
    return jnp.exp(per_head * jnp.maximum(exponent, 0))


def _masked_power(
    log_decay: Float32[Array, "h"], exponent: Int[Array, "n m"], visible: Bool[Array, "n m"]
) -> Float32[Array, "h n m"]:
    return jnp.where(visible, decay_power(log_decay, exponent), 0.0)


def decay_between(
    log_decay: Float32[Array, "h"], query_time: Int[Array, "n"], key_time: Int[Array, "m"]
) -> Float32[Array, "h n m"]:
    """Compute gamma^(query_time - key_time) where the key is not later than the query, else 0."""
    elapsed = query_time[:, None] - key_time[None, :]
    return _masked_power(log_decay, elapsed, elapsed >= 0)


def decay_between_2d(
    log_decay: Float32[Array, "h"], query_position: Position, key_position: Position
) -> Float32[Array, "h n m"]:
    """Compute gamma^(dy + dx) where dy >= 0 and dx >= 0, else 0; a position is every token's (y, x)."""
    dy, dx = (q[:, None] - k[None, :] for q, k in zip(query_position, key_position, strict=True))
    return _masked_power(log_decay, dy + dx, (dy >= 0) & (dx >= 0))


def running_sum(x: Float32[Array, "*b n"]) -> tuple[Float32[Array, "*b n"], Float32[Array, "*b n"]]:
    """Compute the sums of x[0] .. x[n], rounded to fp32, and what rounding took off them."""

    def add(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        (x, x_rest), (y, y_rest) = first, second
        total = x + y
        of_y = total - x
        return total, x_rest + y_rest + ((x - (total - of_y)) + (y - of_y))  # Knuth's two-sum.

    return jax.lax.associative_scan(add, (x, jnp.zeros_like(x)), axis=-1)


def decay_between_tokens(log_decay: Float32[Array, "b n h"]) -> Float32[Array, "b h n m"]:
    """Compute gamma[m+1] .. gamma[n] for n >= m, else 0, of decays per token.

    The exponent is the difference of two sums from the first token on, which may be far larger than it: they are kept
    with what rounding takes off them.
    """
    total, rest = running_sum(jnp.moveaxis(log_decay, 1, 2))
    elapsed = (total[..., :, None] - total[..., None, :]) + (rest[..., :, None] - rest[..., None, :])
    time = jnp.arange(total.shape[-1], dtype=jnp.int32)
    visible = time[:, None] >= time[None, :]
    return jnp.where(visible, jnp.exp(jnp.where(visible, elapsed, 0.0)), 0.0)


def decay_mask(n: int, log_decay: Float32[Array, "h"]) -> Float32[Array, "h n n"]:
    """Compute the 1-D decay mask D[n, m] = gamma^(n - m) for n >= m, else 0, per head (docs/method.md, section 1)."""
    time = jnp.arange(n, dtype=jnp.int32)
    return decay_between(log_decay, time, time)


def grid_positions(grid: tuple[int, int], trailing: int = 0) -> Position:
    """Return row y and column x of every token: the grid in row-major order, then the trailing tokens.

    Trailing token j stands at (y = rows + j, x = cols - 1): alone, in the last column of a further row.
    """
    rows, cols = grid
    patch, extra = (jnp.arange(count, dtype=jnp.int32) for count in (rows * cols, trailing))
    y = jnp.concatenate([patch // cols, rows + extra])
    x = jnp.concatenate([patch % cols, jnp.full_like(extra, cols - 1)])
    return y, x


def decay_mask_2d(
    grid: tuple[int, int], log_decay: Float32[Array, "h"], trailing: int = 0
) -> Float32[Array, "h n n"]:
    """Compute the 2-D decay mask gamma^(dx + dy) for dx >= 0 and dy >= 0, else 0, per head (docs/method.md, section 2).

    n = rows * cols + trailing; `grid_positions` says where each token stands.
    """
    position = grid_positions(grid, trailing)
    return decay_between_2d(log_decay, position, position)
