"""Learned position embeddings on an explicit grid, and their resampling to other grids."""

import jax
from jaxtyping import Array, Float


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
    return jax.image.resize(embedding, (1, *grid, embedding.shape[3]), method="bicubic", antialias=True)
