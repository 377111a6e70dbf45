"""Retention over a grid, parallel form: O = (Q K^T .* D) V with D = gamma^(dx + dy) for dx, dy >= 0."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from vir_jax.ops.contract import contract, matmul_precision
from vir_jax.ops.decay import decay_between_2d, decay_power, grid_positions
from vir_jax.ops.grid_state import along_columns


def parallel(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    log_decay: Float32[Array, "h"],
    arriving: Float32[Array, "b h x d e"] | None,
    *,
    grid: tuple[int, int],
    reverse: bool,
    with_final: bool,
) -> tuple[Float[Array, "b n h e"], Float32[Array, "b h x d e"] | None]:
    """Compute the masked einsum over the grid and its trailing tokens. See `gradient` for the signature of every form.

    Over a grid states are, forward in time, those of `retention_2d`: sums over a column and all to the left of it, of
    the row above and of the last row, so that they decay when they arrive. Backward in time they are each column's own
    sums, which count as they arrive into k^T v of the first row's tokens, and have decayed when they leave. That makes
    reverse retention the transpose of retention, states included.
    """
    (rows, cols), n = grid, q.shape[1]
    trailing = n - rows * cols
    last_row = rows + trailing - 1
    precision = matmul_precision(q, k, v)
    q, k, v = (jnp.swapaxes(t, 1, 2) for t in (q, k, v))
    y, x = grid_positions(grid, trailing)
    if reverse:
        y, x = last_row - y, cols - 1 - x

    scores = contract("bhnd,bhmd->bhnm", q, k, precision) * decay_between_2d(log_decay, (y, x), (y, x))
    out = contract("bhnm,bhme->bhne", scores, v, precision)

    # A state meets tokens column by column; there a trailing token is a row empty but for its last column.
    if arriving is not None:
        above = along_columns(arriving, log_decay, reverse=True) if reverse else arriving
        met = contract("bhyxd,bhxde->bhyxe", _as_rows(q, grid), above, precision)
        elapsed = y if reverse else y + 1
        out += decay_power(log_decay, elapsed)[..., None] * _as_tokens(met, grid, trailing)
    out = jnp.swapaxes(out.astype(v.dtype), 1, 2)
    if not with_final:
        return out, None
    end = last_row + 1 if reverse else last_row
    to_end = k * decay_power(log_decay, end - y)[..., None]
    final = contract("bhyxd,bhyxe->bhxde", _as_rows(to_end, grid), _as_rows(v, grid), precision)
    final = final if reverse else along_columns(final, log_decay)
    if arriving is not None:
        final += decay_power(log_decay, jnp.int32(last_row + 1))[:, None, None, None] * arriving
    return out, final


def _as_rows(tokens: Float[Array, "b h n c"], grid: tuple[int, int]) -> Float[Array, "b h y x c"]:
    (rows, cols), (b, h, _, c) = grid, tokens.shape
    patches = tokens[:, :, : rows * cols].reshape(b, h, rows, cols, c)
    trailing = tokens[:, :, rows * cols :, None, :]
    return jnp.concatenate([patches, jnp.pad(trailing, ((0, 0),) * 3 + ((cols - 1, 0), (0, 0)))], axis=2)


def _as_tokens(
    by_rows: Float[Array, "b h y x c"], grid: tuple[int, int], trailing: int
) -> Float[Array, "b h n c"]:
    (rows, cols), (b, h, _, _, c) = grid, by_rows.shape
    patches = by_rows[:, :, :rows].reshape(b, h, rows * cols, c)
    return jnp.concatenate([patches, by_rows[:, :, rows : rows + trailing, -1]], axis=2)
