"""Position embeddings: learned ones on an explicit grid and their resampling to other grids, and sine-cosine ones."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def resample_position_embedding(
    embedding: Float[Array, "1 rows cols c"], grid: tuple[int, int]
) -> Float[Array, "1 new_rows new_cols c"]:
    """Resample position embeddings to another grid of patches (bicubic, antialiased when the grid shrinks).

    Args:
        embedding: one vector per patch of the grid the model was made for.
        grid: (rows, columns) of patches wanted; each at least 1, not necessarily square.

    Returns:
        `embedding` itself where the grid is already the one wanted, else its resampling, same dtype.
    """
    if embedding.shape[1:3] == grid:
        return embedding
    # As `jax.image.resize`, which would compute the weights in float64 where that is on.
    return jax.image.scale_and_translate(
        embedding,
        (1, *grid, embedding.shape[3]),
        spatial_dims=(1, 2),
        scale=jnp.asarray(
            [new / old for new, old in zip(grid, embedding.shape[1:3], strict=True)], jnp.float32
        ),
        translation=jnp.zeros(2, jnp.float32),
        method="bicubic",
        antialias=True,
    )


def resampling_weights(
    size: int, new_size: int | Int[Array, ""], *, start: int | Int[Array, ""] = 0, count: int
) -> Float[Array, "count size"]:
    """What `resample_position_embedding` does along one axis, as a matrix, and of that the rows asked for.

    Row i holds the weights with which the `size` old points make point start + i of `new_size` new ones. So a
    part of a grid is resampled without the rest of it: E'[y, x] = sum_ij W_rows[y, i] W_cols[x, j] E[i, j].

    Args:
        size: points there are.
        new_size: points there would be; may be traced, and `start` too.
        start: the first of the new points wanted.
        count: how many of them.
    """
    return jax.image.scale_and_translate(
        jnp.eye(size, dtype=jnp.float32),
        (count, size),
        spatial_dims=(0,),
        scale=jnp.asarray(new_size, jnp.float32)[None] / size,
        translation=-jnp.asarray(start, jnp.float32)[None],
        method="bicubic",
        antialias=True,
    )


def sincos_position_embedding(y: Int[Array, "n"], x: Int[Array, "n"], dim: int) -> Float[Array, "n dim"]:
    """Fixed embeddings of the patches in rows y and columns x (as in MoCo v3, arXiv 2104.02057), of any grid.

    A quarter of the channels each for sin(w y), cos(w y), sin(w x), cos(w x), with w = 10000^(-4 i / dim) for
    i = 0 .. dim / 4 - 1. Dim is divisible by 4.
    """
    frequency = jnp.asarray(10_000.0 ** (-4 * np.arange(dim // 4) / dim), jnp.float32)
    angles = (position[:, None] * frequency for position in (y, x))
    return jnp.concatenate([f(angle) for angle in angles for f in (jnp.sin, jnp.cos)], axis=-1)
