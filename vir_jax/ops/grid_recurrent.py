"""Retention over a grid, recurrent form.

    S[y,x] = gamma S[y,x-1] + gamma S[y-1,x] - gamma^2 S[y-1,x-1] + k^T v,      o[y,x] = q S[y,x]

is carried in two steps without a subtraction, with R[y,x] = S[y,x] - gamma S[y-1,x], the row's own part of the state:

    R[y,x] = gamma R[y,x-1] + k^T v,      S[y,x] = gamma S[y-1,x] + R[y,x]
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from vir_jax.ops.contract import contract, matmul_precision
from vir_jax.ops.grid_state import along_columns


def recurrent(
    q: Float[Array, "b h n d"],
    k: Float[Array, "b h n d"],
    v: Float[Array, "b h n e"],
    log_decay: Float32[Array, "h"],
    arriving: Float32[Array, "b h x d e"] | None,
    *,
    grid: tuple[int, int],
    reverse: bool,
) -> tuple[Float[Array, "b h n e"], Float32[Array, "b h x d e"]]:
    """A scan over rows of a scan over columns. See `gradient` for the signature every form shares."""
    (rows, cols), (b, n, h, d), e = grid, q.shape, v.shape[-1]
    precision = matmul_precision(q, k, v)
    gamma = jnp.exp(log_decay)[:, None, None]
    # What arrives has been decayed already, so the first row meets it with a decay of one.
    decay = jnp.ones([rows, 1, 1, 1]) * gamma
    decay = decay.at[-1 if reverse else 0].set(1.0)

    def row(above, tokens):
        *qkv, decay = tokens

        def column(own, token):
            q, k, v, above = token
            own = gamma * own + k[..., :, None].astype(jnp.float32) * v[..., None, :]
            state = decay * above + own
            return own, (state, contract("bhd,bhde->bhe", q, state, precision).astype(v.dtype))

        nothing = jnp.zeros([b, h, d, e], jnp.float32)
        _, (state, out) = jax.lax.scan(column, nothing, (*qkv, above), reverse=reverse)
        return state, out

    tokens = (jnp.moveaxis(t, 1, 0).reshape(rows, cols, b, h, -1) for t in (q, k, v))
    if arriving is None:
        above = jnp.zeros([cols, b, h, d, e], jnp.float32)
    else:
        above = jnp.moveaxis(along_columns(arriving, log_decay, reverse=reverse), 2, 0)
    state, out = jax.lax.scan(row, above, (*tokens, decay), reverse=reverse)
    return jnp.moveaxis(out.reshape(n, b, h, e), 0, 1), jnp.moveaxis(state, 0, 2)
