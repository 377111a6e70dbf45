"""Retention over a grid, chunkwise form: parallel inside a band of rows, recurrent from band to band."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from vir_jax.ops.grid_parallel import band, parallel
from vir_jax.ops.grid_state import along_columns


def chunkwise(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    log_decay: Float32[Array, "h"],
    arriving: Float32[Array, "b h x d e"] | None,
    *,
    grid: tuple[int, int],
    band_rows: int,
    reverse: bool,
) -> tuple[Float[Array, "b n h e"], Float32[Array, "b h x d e"]]:
    """A scan over bands of `band_rows` rows. See `gradient` for the signature every form shares."""
    (rows, cols), (b, n, h, d), e = grid, q.shape, v.shape[-1]
    if rows <= band_rows:
        return parallel(q, k, v, log_decay, arriving, grid=grid, reverse=reverse)
    bands = (rows - 1) // band_rows
    rest = rows - bands * band_rows  # what is left for the last band in time, ragged or whole
    gamma = jnp.exp(log_decay)[:, None, None, None]

    def one_band(arriving, start_row, rows):
        tokens = (jax.lax.dynamic_slice_in_dim(t, start_row * cols, rows * cols, axis=1) for t in (q, k, v))
        return band(*tokens, log_decay, arriving, grid=(rows, cols), reverse=reverse)

    def step(arriving, start_row):
        out, state = one_band(arriving, start_row, band_rows)
        return gamma * state, out

    if arriving is None:
        arriving = jnp.zeros([b, h, cols, d, e], jnp.float32)
    start_rows = (rest if reverse else 0) + band_rows * jnp.arange(bands)
    arriving, out = jax.lax.scan(step, arriving, start_rows, reverse=reverse)
    out = jnp.moveaxis(out, 0, 1).reshape(b, bands * band_rows * cols, h, e)
    last, own = one_band(arriving, 0 if reverse else rows - rest, rest)
    out = jnp.concatenate([last, out] if reverse else [out, last], axis=1)
    return out, along_columns(own, log_decay, reverse=reverse)
