"""Retention over a grid of patches: one function for every mode."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from vir_jax.ops import grid_chunkwise, grid_parallel, grid_recurrent
from vir_jax.ops.checks import (
    check_chunk,
    check_grid,
    check_log_decay,
    check_mode,
    check_scale,
    check_state,
    check_tokens,
)
from vir_jax.ops.gradient import Form, differentiable
from vir_jax.ops.grid_state import empty_grid_state
from vir_jax.ops.kernels import GRID_KERNELS, PLATFORMS, grid_kernel_form
from vir_jax.ops.platform import platform
from vir_jax.ops.sequence import check_implementation, choose_form, scaled

# By platform, with 12 heads of 64. CPU: measured on two cores (benchmarks/results/retention.md); one masked einsum is
# the faster on a 24 x 24 grid, tiles on 32 x 32 and above. TPU: estimated by the compiler (docs/speed.md); the einsum
# would still be the faster on 64 x 64, but its scores take 200 MB an image there. GPU: not known, as on a CPU.
PARALLEL_UP_TO = {"cpu": 768, "gpu": 768, "tpu": 2048}
# Rows and columns of a tile, by the same table for TPUs. CPU: the least time of 8 x 8, 8 x 16, 16 x 8 and 16 x 16, with
# 6 heads of 64, at 64 and 512 columns.
TILES = {"cpu": 8, "gpu": 8, "tpu": 16}


def retention_2d(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    log_decay: Float32[Array, "h"],
    *,
    grid: tuple[int, int],
    mode: str = "auto",
    chunk_rows: int | None = None,
    initial_state: Float32[Array, "b h x d e"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "b n h e"], Float32[Array, "b h x d e"]]:
    """Compute retention over a grid (docs/method.md, section 2), which decays by gamma^(dx + dy).

    A token sees those above it and to the left:

        S[y,x] = gamma S[y,x-1] + gamma S[y-1,x] - gamma^2 S[y-1,x-1] + k^T v,    o[y,x] = scale q S[y,x]

    Tokens are the grid in row-major order, then any trailing ones. A trailing token (the class token) stands one row
    below what comes before it, in the last column, the row being empty but for it: it sees every patch and the
    trailing tokens before it, and no patch sees it. n - rows * cols tokens are trailing.

    Modes, all one function: "parallel" (masked einsum), "recurrent" (the recurrence above), "chunkwise" (parallel
    inside tiles of at most `chunk_rows` rows and `tile_side()` columns, recurrent from tile to tile); "auto" is
    parallel up to PARALLEL_UP_TO tokens, which the platform decides; chunkwise beyond, wherever `chunk_rows` is given,
    and with an initial state, which that form updates in place.

    Args:
        q: Queries [b, n, h, d]; dtypes are those of `retention`.
        k: Keys [b, n, h, d].
        v: Values [b, n, h, e].
        log_decay: log(gamma) per head, [h] fp32, at most 0: of a step to the right and of a step down.
        grid: (rows, cols) of these tokens; (0, cols) where trailing tokens come alone.
        mode: One of MODES, or "auto".
        chunk_rows: Rows in a tile, at most, in the modes "chunkwise" and "auto". None is `tile_side()`.
        initial_state: The state after the rows above, as a call with those returned it, trailing rows counted; None is
            zero. So rows may come in any number at a time.
        scale: What multiplies q. None is d^-1/2.
        implementation: "xla", or "cpp_cpu", the kernel for the chunkwise mode on CPUs, as in `retention`. None is
            "xla".

    Returns:
        The output [b, n, h, e] in v's dtype, and the state, which is the last row's, S[y, :], one [d, e] matrix per
        column: [b, h, cols, d, e] fp32. Dtypes, cost and gradients are as in `retention`.

    Raises:
        ValueError: as in `retention`; a grid that does not fit the tokens; a kernel for 1-D alone.
        RuntimeError: as in `retention`.
    """
    check_mode(mode)
    check_chunk("chunk_rows", chunk_rows, mode)
    check_implementation(implementation, mode, chunk_rows=chunk_rows)
    if implementation in PLATFORMS and implementation not in GRID_KERNELS:
        raise ValueError(f"{implementation!r} computes 1-D retention alone; use implementation='xla'")
    check_scale(scale)
    check_tokens(q, k, v)
    b, n, h, d = q.shape
    check_grid(grid, n)
    check_log_decay(log_decay, h)
    check_state(initial_state, (b, h, grid[1], d, v.shape[-1]))
    kernel = implementation if implementation in GRID_KERNELS else None
    return _retention_2d(q, k, v, log_decay, initial_state, mode, chunk_rows, tuple(grid), scale, kernel)


@partial(jax.jit, static_argnums=(5, 6, 7, 8, 9))
def _retention_2d(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    log_decay: Float32[Array, "h"],
    initial_state: Float32[Array, "b h x d e"] | None,
    mode: str,
    chunk_rows: int | None,
    grid: tuple[int, int],
    scale: float | None,
    kernel: str | None,
) -> tuple[Float[Array, "b n h e"], Float32[Array, "b h x d e"]]:
    q, k = scaled(q, k, scale)
    if kernel:
        return _grid_then_trailing(
            q, k, v, log_decay, initial_state, "chunkwise", grid_kernel_form(kernel, grid), grid
        )
    if mode == "auto":
        short = q.shape[1] <= PARALLEL_UP_TO[platform()] and chunk_rows is None and initial_state is None
        mode = "parallel" if short else "chunkwise"
    if mode != "parallel":
        form = _grid_form(mode, chunk_rows, grid)
        return _grid_then_trailing(q, k, v, log_decay, initial_state, mode, form, grid)
    form = partial(grid_parallel.parallel, grid=grid)
    return differentiable(form, q, k, v, log_decay, initial_state)


def _grid_then_trailing(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    log_decay: Float32[Array, "h"],
    state: Float32[Array, "b h x d e"] | None,
    mode: str,
    grid_form: Form,
    grid: tuple[int, int],
) -> tuple[Float[Array, "b n h e"], Float32[Array, "b h x d e"]]:
    rows, cols = grid
    trailing = q.shape[1] - rows * cols
    (q, q_below), (k, k_below), (v, v_below) = (jnp.split(t, [rows * cols], axis=1) for t in (q, k, v))

    out = v  # of no tokens, if there are no rows
    if rows:
        out, state = differentiable(grid_form, q, k, v, log_decay, state)
    elif state is None:
        state = empty_grid_state(k, v, cols)
    if not trailing:
        return out, state

    # Below the grid there is one token a row: a sequence that continues the last column.
    arriving = jnp.exp(log_decay)[:, None, None] * state[:, :, -1]
    form = choose_form(mode, trailing)
    more, last = differentiable(form, q_below, k_below, v_below, log_decay, arriving)
    out = jnp.concatenate([out, more], axis=1)
    others = jnp.exp(trailing * log_decay)[:, None, None, None] * state[:, :, :-1]
    return out, jnp.concatenate([others, last[:, :, None]], axis=2)


def tile_side() -> int:
    """Return the rows and columns of a tile in the chunkwise mode, where no others are named, on this platform."""
    return TILES[platform()]


def _grid_form(mode: str, chunk_rows: int | None, grid: tuple[int, int]) -> Form:
    if mode == "recurrent":
        return partial(grid_recurrent.recurrent, grid=grid)
    tile_size = chunk_rows or tile_side(), tile_side()
    return partial(grid_chunkwise.chunkwise, grid=grid, tile_size=tile_size)
