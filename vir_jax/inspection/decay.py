"""What the decays make of an image: rows of the decay mask, folded back on the grid of patches, and half-lives.

Everywhere in this package `grid` is the (rows, columns) of patches, and a token's index counts in raster order. The
class token comes after all patches; in 2-D it stands one row below them, in the last column (docs/method.md,
section 2).
"""

import math
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from vir_jax.ops.decay import decay_between, decay_between_2d, decay_power, grid_positions

RetentionKind = Literal["1d", "2d"]


def half_life(log_decay: Float32[Array, "h"]) -> Float32[Array, "h"]:
    """Return steps after which a head remembers half: gamma^steps = 1/2; infinite where nothing is forgotten.

    A step is a token in 1-D, and in 2-D a row or a column, for each of which the decay is gamma.
    """
    return math.log(2) / jnp.abs(log_decay)


def half_life_in_rows(log_decay: Float32[Array, "h"], cols: int, kind: RetentionKind) -> Float32[Array, "h"]:
    """Return rows of patches after which a head remembers half of what stood right above.

    In 1-D a row is `cols` tokens away, so that this depends on the image's width; in 2-D it is one step.
    """
    return half_life(log_decay) / (cols if _is_1d(kind) else 1)


def decay_row(
    log_decay: Float32[Array, "h"], query: int, grid: tuple[int, int], kind: RetentionKind
) -> Float32[Array, "h n"]:
    """Return row `query` of the decay mask over patches and class token: what is left of each token when this one
    reads.

    `query` is a token's index: a patch's, or rows * cols, or -1, for the class token. n = rows * cols + 1.

    Raises:
        ValueError: no such token.
    """
    n = math.prod(grid) + 1
    if not -n <= query < n:
        raise ValueError(
            f"query is {query}; a grid of {grid} has tokens 0 to {n - 1}, the last the class token"
        )
    at = query % n
    if _is_1d(kind):
        time = jnp.arange(n, dtype=jnp.int32)
        return decay_between(log_decay, time[at : at + 1], time)[:, 0]
    y, x = grid_positions(grid, trailing=1)
    return decay_between_2d(log_decay, (y[at : at + 1], x[at : at + 1]), (y, x))[:, 0]


def on_grid(per_token: Float[Array, "*lead n"], grid: tuple[int, int]) -> Float[Array, "*lead rows cols"]:
    """Return values per token as maps over the image; the class token, which has no place on it, is left out.

    A bidirectional model reads every patch twice, forwards, then backwards: both values are added.

    Raises:
        ValueError: the number of tokens is neither that of one pass over the grid nor that of two.
    """
    patches = math.prod(grid)
    n = per_token.shape[-1]
    if n not in (patches + 1, 2 * patches + 1):
        raise ValueError(
            f"{n} tokens do not fold on a grid of {grid}; expected {patches + 1}, or {2 * patches + 1} in both "
            "directions: every patch, then the class token"
        )
    folded = per_token[..., :patches]
    if n > patches + 1:
        folded = folded + per_token[..., patches:-1][..., ::-1]
    return folded.reshape(*per_token.shape[:-1], *grid)


def decay_at_arrival(
    log_decay: Float32[Array, "h"], patches: int, grid: tuple[int, int], kind: RetentionKind
) -> Float32[Array, "h t m"]:
    """Return what is left of patch m in the state once t patches have been read; t = 0 .. patches.

    In 1-D the state S_t is that of the recurrence: gamma^(t-1-m) for m < t, for any number of patches (a bidirectional
    model reads each twice). In 2-D it is the state in the last column of the row that is being read, what is
    unread being absent. In both the class token, were it to come next, would read gamma times this state.
    """
    read = jnp.arange(patches + 1, dtype=jnp.int32)[:, None]
    patch = jnp.arange(patches, dtype=jnp.int32)[None, :]
    if _is_1d(kind):
        age: Int[Array, "t m"] = read - 1 - patch
    else:
        rows_begun = -(-read // grid[1])
        age = (rows_begun - 1 - patch // grid[1]) + (grid[1] - 1 - patch % grid[1])
    return jnp.where(patch < read, decay_power(log_decay, age), 0.0)


def _is_1d(kind: RetentionKind) -> bool:
    if kind not in ("1d", "2d"):
        raise ValueError(f"kind is {kind!r}; expected '1d' (raster order) or '2d' (rows and columns)")
    return kind == "1d"
