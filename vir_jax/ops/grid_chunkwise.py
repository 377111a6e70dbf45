"""Retention over a grid, chunkwise form: parallel inside a band of rows, recurrent from band to band."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from vir_jax.ops.contract import contract, matmul_precision
from vir_jax.ops.decay import decay_between_2d, decay_power, grid_positions
from vir_jax.ops.grid_state import along_columns


def chunkwise(
    q: Float[Array, "b h n d"],
    k: Float[Array, "b h n d"],
    v: Float[Array, "b h n e"],
    log_decay: Float32[Array, "h"],
    arriving: Float32[Array, "b h x d e"] | None,
    *,
    grid: tuple[int, int],
    band: int,
    reverse: bool,
) -> tuple[Float[Array, "b h n e"], Float32[Array, "b h x d e"]]:
    """Bands of `band` rows, the last one ragged. See `gradient` for the signature every form shares.

    What passes from band to band is each column's own decayed sum of k^T v; summed along the columns it is
    what the tokens below see.
    """
    (rows, cols), (b, h, n, d), e = grid, q.shape, v.shape[-1]
    precision = matmul_precision(q, k, v)
    band = min(band, rows)
    bands = -(-rows // band)
    pad = bands * band - rows

    # Time inside each band counts rows; the padding of the last band is before its start or after its end.
    length = jnp.full([bands, 1], band).at[-1].add(-pad)
    time = jnp.broadcast_to(jnp.arange(band), [bands, band])
    time = length - 1 - time if reverse else time
    to_end = jnp.moveaxis(decay_power(log_decay, length - 1 - time), 1, 0)[..., None, None]
    from_start = jnp.moveaxis(decay_power(log_decay, time), 1, 0)[..., None, None]
    across = decay_power(log_decay, length[:, 0] - 1).T[..., None, None, None]
    gamma = jnp.exp(log_decay)[:, None, None, None]

    y, x = grid_positions((band, cols))
    position = (-y, -x) if reverse else (y, x)
    mask = decay_between_2d(log_decay, position, position)

    def by_rows(tokens):
        return tokens.reshape(b, h, band, cols, -1)

    def step(carry, tokens):
        arriving, _ = carry
        q, k, v, to_end, from_start, across = tokens
        scores = contract("bhnd,bhmd->bhnm", q, k, precision) * mask
        inside = contract("bhnm,bhme->bhne", scores, v, precision)
        above = along_columns(arriving, log_decay, reverse=reverse)
        before = contract("bhyxd,bhxde->bhyxe", by_rows(q) * from_start, above, precision)
        state = across * arriving + contract("bhyxd,bhyxe->bhxde", by_rows(k) * to_end, by_rows(v), precision)
        out = inside + before.reshape(b, h, band * cols, e)
        return (gamma * state, state), out.astype(v.dtype)

    def by_band(tokens):
        tokens = jnp.pad(tokens, ((0, 0), (0, 0), (0, pad * cols), (0, 0)))
        return jnp.moveaxis(tokens.reshape(b, h, bands, band * cols, -1), 2, 0)

    nothing = jnp.zeros([b, h, cols, d, e], jnp.float32)
    start = nothing if arriving is None else arriving
    xs = (by_band(q), by_band(k), by_band(v), to_end, from_start, across)
    (_, state), out = jax.lax.scan(step, (start, nothing), xs, reverse=reverse)
    out = jnp.moveaxis(out, 0, 2).reshape(b, h, bands * band * cols, e)[:, :, :n]
    return out, along_columns(state, log_decay, reverse=reverse)
