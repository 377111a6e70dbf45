"""Retention over a grid of patches: one function, every mode."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from vir_jax.ops import grid_chunkwise, grid_parallel, grid_recurrent
from vir_jax.ops.checks import check_grid, check_log_decay, check_mode, check_state, check_tokens
from vir_jax.ops.gradient import differentiable
from vir_jax.ops.grid_state import between_columns
from vir_jax.ops.sequence import choose_form, prepare

BAND_TOKENS = 64
PARALLEL_UP_TO = 1024


def retention_2d(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    log_decay: Float32[Array, "h"],
    *,
    grid: tuple[int, int],
    mode: str = "auto",
    initial_state: Float32[Array, "b h x d e"] | None = None,
    return_state: bool = False,
    scale: float | None = None,
) -> Float[Array, "b n h e"] | tuple[Float[Array, "b n h e"], Float32[Array, "b h x d e"]]:
    """Retention over a grid (PAPER section 2); trailing token j stands at (x = cols - 1, y = rows + j).

    The state is S[y, :] of the recurrence for the last row, [b, h, cols, d, e] fp32.
    """
    check_mode(mode)
    check_tokens(q, k, v)
    b, n, h, d = q.shape
    check_grid(grid, n)
    check_log_decay(log_decay, h)
    check_state("initial_state", initial_state, (b, h, grid[1], d, v.shape[-1]))
    out, state = _retention_2d(q, k, v, log_decay, initial_state, mode, grid, return_state, scale)
    return (out, state) if return_state else out


def retention_2d_step(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    log_decay: Float32[Array, "h"],
    state: Float32[Array, "b h x d e"],
    *,
    grid: tuple[int, int],
    scale: float | None = None,
) -> tuple[Float[Array, "b n h e"], Float32[Array, "b h x d e"]]:
    """The next rows of an image, grid = (rows arriving, cols), given the state after those above."""
    return retention_2d(q, k, v, log_decay, grid=grid, initial_state=state, return_state=True, scale=scale)


@partial(jax.jit, static_argnums=(5, 6, 7, 8))
def _retention_2d(q, k, v, log_decay, initial_state, mode, grid, return_state, scale):
    q, k = prepare(q, k, scale)
    rows, cols = grid
    patches = rows * cols
    gamma = jnp.exp(log_decay)[:, None, None]
    arriving = None
    if initial_state is not None:
        arriving = gamma[:, None] * between_columns(initial_state, log_decay)
    if mode == "auto":
        mode = "parallel" if q.shape[1] <= PARALLEL_UP_TO else "chunkwise"

    if mode == "parallel":
        form = partial(grid_parallel.parallel, grid=grid)
        out, state = differentiable(form, q, k, v, log_decay, arriving, with_final=return_state)
        return out, state

    form = {
        "recurrent": partial(grid_recurrent.recurrent, grid=grid),
        "chunkwise": partial(grid_chunkwise.chunkwise, grid=grid, band_rows=max(1, BAND_TOKENS // cols)),
    }[mode]
    trailing = q.shape[1] - patches
    on_grid, beyond = zip(*(jnp.split(x, [patches], axis=1) for x in (q, k, v)), strict=True)
    out, state = differentiable(form, *on_grid, log_decay, arriving, with_final=return_state or trailing > 0)
    if trailing:
        # Below the grid there is one token a row: a sequence that continues the last column.
        form = choose_form(mode, trailing, None)
        last = gamma * state[:, :, -1]
        more, last = differentiable(form, *beyond, log_decay, last, with_final=return_state)
        out = jnp.concatenate([out, more], axis=1)
        if return_state:
            left = jnp.exp(trailing * log_decay)[:, None, None, None] * state[:, :, :-1]
            state = jnp.concatenate([left, last[:, :, None]], axis=2)
    return out, state
