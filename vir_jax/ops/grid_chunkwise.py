"""Retention over a grid, chunkwise form: parallel inside a band of rows, recurrent from band to band.

    O_Y = (Q_Y K_Y^T .* D) V_Y + gamma^(y+1) q C[x],    C[x] = sum over x' <= x of gamma^(x-x') own[x'],

for band Y with its rows y = 0, 1, ..., `own` being each column's decayed sum of k^T v over the rows above. A band
of one row is the form by rows of docs/method.md, section 2.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from vir_jax.ops.grid_parallel import band, parallel
from vir_jax.ops.grid_state import along_columns, empty_grid_state


def chunkwise(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    log_decay: Float32[Array, "h"],
    arriving: Float32[Array, "b h x d e"] | None,
    *,
    grid: tuple[int, int],
    chunk_rows: int,
    reverse: bool,
    with_final: bool,
) -> tuple[Float[Array, "b n h e"], Float32[Array, "b h x d e"] | None]:
    """Scan over bands of `chunk_rows` rows. See `gradient` and `grid_parallel` for the signature."""
    rows, cols = grid
    if rows <= chunk_rows:
        return parallel(q, k, v, log_decay, arriving, grid=grid, reverse=reverse, with_final=with_final)
    bands = (rows - 1) // chunk_rows
    rest = rows - bands * chunk_rows  # left for the last band in time, ragged or whole
    gamma = jnp.exp(log_decay)[:, None, None, None]

    def one_band(own: Array, out: Array, row: Array | int, rows: int) -> tuple[Array, Array]:
        start, size = row * cols, rows * cols
        part = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=1)
        here, own = band(part(q), part(k), part(v), log_decay, own, grid=(rows, cols), reverse=reverse)
        return own, jax.lax.dynamic_update_slice_in_dim(out, here, start, axis=1)

    def step(carry: tuple[Array, Array], row: Array) -> tuple[tuple[Array, Array], None]:
        own, out = one_band(*carry, row, chunk_rows)
        return (gamma * own, out), None

    own = empty_grid_state(k, v, cols) if arriving is None else arriving
    first_rows = (rest if reverse else 0) + chunk_rows * jnp.arange(bands, dtype=jnp.int32)
    # The output begins as v, all of which is overwritten: it has the shape, the dtype and the devices it needs.
    (own, out), _ = jax.lax.scan(step, (own, v), first_rows, reverse=reverse)
    own, out = one_band(own, out, 0 if reverse else rows - rest, rest)
    return out, along_columns(own, log_decay, reverse=reverse) if with_final else None
