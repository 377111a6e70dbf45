"""Retention over a grid, recurrent form.

    S[y,x] = gamma S[y,x-1] + gamma S[y-1,x] - gamma^2 S[y-1,x-1] + k^T v,    o[y,x] = q S[y,x]

runs here in two steps that need no subtraction. R[y,x] = S[y,x] - gamma S[y-1,x] is the row's own part of the state:

    R[y,x] = gamma R[y,x-1] + k^T v,    S[y,x] = gamma S[y-1,x] + R[y,x]

Backward in time, where the states handed on are the columns' own (see `grid_parallel`), the two axes change places:
with the column's own part of the state, C[y,x] = S[y,x] - gamma S[y,x-1],

    C[y,x] = gamma C[y-1,x] + k^T v,    S[y,x] = gamma S[y,x-1] + C[y,x]
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from vir_jax.ops.contract import contract, empty_state, matmul_precision
from vir_jax.ops.grid_state import empty_grid_state
from vir_jax.ops.storage import from_bits, to_bits


def recurrent(
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
    """Scan over rows, and in each over columns. See `gradient` and `grid_parallel` for the signature."""
    (rows, cols), (b, n, h, _), e = grid, q.shape, v.shape[-1]
    precision = matmul_precision(q, k, v)
    gamma = jnp.exp(log_decay)[:, None, None]

    def row(above: Array, tokens: tuple[Array, ...]) -> tuple[Array, Array]:
        def column(beside: Array, token: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
            q, k, v, above = token
            new = k[..., :, None].astype(jnp.float32) * v[..., None, :]
            if reverse:
                own = above + new
                state = beside = gamma * beside + own
                onward = gamma * own
            else:
                beside = gamma * beside + new
                state = onward = gamma * above + beside
            out = contract("bhd,bhde->bhe", q, state, precision).astype(v.dtype)
            return beside, (onward, to_bits(out))

        _, (onward, out) = jax.lax.scan(column, empty_state(k, v), (*tokens, above), reverse=reverse)
        return onward, out

    tokens = (jnp.moveaxis(t, 1, 0).reshape(rows, cols, b, h, -1) for t in (q, k, v))
    above = empty_grid_state(k, v, cols) if arriving is None else arriving
    final, out = jax.lax.scan(row, jnp.moveaxis(above, 2, 0), tuple(tokens), reverse=reverse)
    out = jnp.moveaxis(from_bits(out, v.dtype).reshape(n, b, h, e), 0, 1)
    return out, jnp.moveaxis(final, 0, 2) if with_final else None
