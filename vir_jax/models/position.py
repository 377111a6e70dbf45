"""Position embeddings: learned ones on an explicit grid and their resampling to others, sine-cosine ones, and none."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from vir_jax.models.rope import Rope

Lookup = Callable[[Int[Array, " n"], Int[Array, " n"]], Float[Array, "n c"]]
"""The embeddings of patches in given rows and columns of a piece of an image."""


class LearnedPosition(nnx.Module):
    """A vector for each patch of a grid, `embedding [1, rows, cols, c]`, resampled to the grids of other images."""

    needs_height = True
    embeds = True

    def __init__(self, grid: tuple[int, int], dim: int, *, rngs: nnx.Rngs) -> None:
        normal = nnx.initializers.normal(0.02)
        self.embedding = nnx.Param(
            normal(rngs.params(), (1, *grid, dim), jnp.float32), axes=(None, None, None, "embed")
        )

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches that the embeddings were made for."""
        _, rows, cols, _ = self.embedding.shape
        return rows, cols

    def of_grid(self, grid: tuple[int, int]) -> Float[Array, "1 rows cols c"]:
        """Return the embeddings of a whole image's patches."""
        return resample_position_embedding(self.embedding[...], grid)

    def lookup(
        self, first_row: Int[Array, ""], grid: tuple[int, int], rows: int | Int[Array, ""] | None
    ) -> Lookup:
        """Return a function of the rows and columns of `grid`, which begins in row `first_row` of the image.

        Args:
            first_row: row of the image.
            grid: (rows, columns) of the piece.
            rows: of patches in the whole image.

        Raises:
            ValueError: the image's height is not known.
        """
        if rows is None:
            raise ValueError(
                "learned position embeddings are resampled to the whole image's grid, so its height must be known "
                "before the first row is read. Give it, or use a model made with position='sincos'."
            )
        (arriving, cols), (own_rows, own_cols) = grid, self.grid
        if isinstance(rows, int) and (rows, cols) == self.grid:
            return lambda y, x: self.embedding[...][0, first_row + y, x]
        by_row = resampling_weights(own_rows, rows, start=first_row, count=arriving)
        by_col = resampling_weights(own_cols, cols, count=cols)
        embedding = self.embedding[...][0]

        def resampled(y: Int[Array, " n"], x: Int[Array, " n"]) -> Float[Array, "n c"]:
            return jnp.einsum(
                "ni,nj,ijc->nc", by_row[y], by_col[x], embedding, precision=jax.lax.Precision.HIGHEST
            )

        return resampled


class SincosPosition(nnx.Module):
    """Fixed embeddings of rows and columns: no parameter, any grid, and no need to know an image's height."""

    needs_height = False
    embeds = True

    def __init__(self, grid: tuple[int, int], dim: int, *, rngs: nnx.Rngs) -> None:
        if dim % 4:
            raise ValueError(f"position='sincos' needs a width divisible by 4; got {dim}")
        self.dim = dim

    def of_grid(self, grid: tuple[int, int]) -> Float[Array, "1 rows cols c"]:
        """Return the embeddings of a whole image's patches."""
        rows, cols = grid
        y, x = jnp.divmod(jnp.arange(rows * cols, dtype=jnp.int32), cols)
        return sincos_position_embedding(y, x, self.dim).reshape(1, rows, cols, self.dim)

    def lookup(
        self, first_row: Int[Array, ""], grid: tuple[int, int], rows: int | Int[Array, ""] | None
    ) -> Lookup:
        """Return a function of the rows and columns of a piece that begins in row `first_row` of the image."""
        return lambda y, x: sincos_position_embedding(first_row + y, x, self.dim)


class NoPosition(nnx.Module):
    """Nothing is added to the tokens, the class token neither: mixers tell them apart by themselves, or not at all."""

    needs_height = False
    embeds = False

    def __init__(self, grid: tuple[int, int], dim: int, *, rngs: nnx.Rngs) -> None:
        self.dim = dim

    def of_grid(self, grid: tuple[int, int]) -> Float[Array, "1 rows cols c"]:
        """Return zeros."""
        return jnp.zeros((1, *grid, self.dim), jnp.float32)

    def lookup(
        self, first_row: Int[Array, ""], grid: tuple[int, int], rows: int | Int[Array, ""] | None
    ) -> Lookup:
        """Return a function whose values are zeros."""
        return lambda y, x: jnp.zeros((*y.shape, self.dim), jnp.float32)


ROPE: dict[str, Rope] = {"rope": "1d", "rope_2d": "2d"}
"""Positions that are not added to the tokens, but turn queries and keys."""

POSITIONS: dict[str, type[LearnedPosition] | type[SincosPosition] | type[NoPosition]] = {
    "learned": LearnedPosition,
    "sincos": SincosPosition,
    "none": NoPosition,
    **dict.fromkeys(ROPE, NoPosition),
}


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
    """Return what `resample_position_embedding` does along one axis, as a matrix, and of that the rows asked for.

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
    """Compute fixed embeddings of the patches in rows y and columns x (as in MoCo v3, arXiv 2104.02057), of any grid.

    A quarter of the channels each for sin(w y), cos(w y), sin(w x), cos(w x), with w = 10000^(-4 i / dim) for
    i = 0 .. dim / 4 - 1. Dim is divisible by 4.
    """
    frequency = jnp.asarray(10_000.0 ** (-4 * np.arange(dim // 4) / dim), jnp.float32)
    angles = (position[:, None] * frequency for position in (y, x))
    return jnp.concatenate([f(angle) for angle in angles for f in (jnp.sin, jnp.cos)], axis=-1)
