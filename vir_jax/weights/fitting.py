"""Weights of one model in the shapes of another: other images, patches, colours, classes."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from vir_jax.models.position import resampling_weights

Resampling = Callable[[int, int], np.ndarray]
"""Of (size, new size): the matrix that resamples a side."""


def fit_positions(
    embedding: Float[np.ndarray, "1 rows cols c"], grid: tuple[int, int], resampling: Resampling
) -> Float[np.ndarray, "1 new_rows new_cols c"]:
    """Return position embeddings of another grid, itself where it is the same."""
    rows, cols = embedding.shape[1:3]
    if (rows, cols) == grid:
        return embedding
    by_row, by_col = resampling(rows, grid[0]), resampling(cols, grid[1])
    resampled = np.einsum("yi,xj,bijc->byxc", by_row, by_col, embedding, optimize=True)
    return resampled.astype(embedding.dtype)


def fit_patch(kernel: Float[np.ndarray, "p p channels c"], patch: int) -> Float[np.ndarray, "q q channels c"]:
    """Return the kernel for patches of another size that gives of resized patches what this one gives of them.

    As FlexiViT does (Beyer et al. 2023, arXiv 2212.08013, section 3.4): with B x the pixels x of a patch resized, the
    kernel w' of least squares is (B^T)^+ w, which is exact for enlarged patches: <w', B x> = <w, x>.
    """
    if kernel.shape[0] == patch:
        return kernel
    resize = np.asarray(resampling_weights(kernel.shape[0], patch, count=patch), np.float64)
    inverse = np.linalg.pinv(resize.T)
    fitted = np.einsum("yi,xj,ijkc->yxkc", inverse, inverse, kernel, optimize=True)
    return fitted.astype(kernel.dtype)


def fit_colours(kernel: Float[np.ndarray, "*p old c"], channels: int) -> Float[np.ndarray, "*p channels c"]:
    """Return a kernel for images of other channels: 1 (grey), 3 (RGB) or 4 (RGB and another).

    From RGB to grey its colours are summed, so that it gives of grey images what it gave of them as RGB, where these
    were normalised alike; from grey to RGB each colour has a third of the weight. A fourth channel begins as the mean
    of the colours, and is taken as absent where there is none.
    """
    old = kernel.shape[-2]
    if old == channels:
        return kernel
    rgb = np.repeat(kernel / 3, 3, axis=-2) if old == 1 else kernel[..., :3, :]
    if channels == 1:
        return rgb.sum(axis=-2, keepdims=True)
    return rgb if channels == 3 else np.concatenate([rgb, rgb.mean(axis=-2, keepdims=True)], axis=-2)


def fit_statistics(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return means or deviations of colours for images of other channels: averages, or the same for each."""
    if len(values) == channels:
        return tuple(values)
    rgb = tuple(values)[:3] if len(values) > 1 else tuple(values) * 3
    average = (sum(rgb) / 3,)
    return {1: average, 3: rgb, 4: rgb + average}[channels]


def matching_classes(old: Sequence[str] | None, new: Sequence[str] | None) -> dict[int, int]:
    """Return for classes by their numbers in `new` those of the same name in `old`; none where names are not known."""
    numbers = {name: i for i, name in enumerate(old or ())}
    return {i: numbers[name] for i, name in enumerate(new or ()) if name in numbers}


def bicubic_of_torch(size: int, new_size: int) -> Float[np.ndarray, "new_size size"]:
    """Return PyTorch's bicubic interpolation of a side as a matrix: a = -3/4, edges repeated, no antialiasing.

    Ours (`resampling_weights`), timm's and PIL's has a = -1/2, leaves out what lies beyond an edge, and widens the
    kernel where the side shrinks.
    """
    a = -0.75
    centres = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    first = np.floor(centres).astype(int) - 1
    weights = np.zeros((new_size, size))
    for tap in range(4):
        x = np.abs(centres - (first + tap))
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((x - 5) * x + 8) * x * a - 4 * a
        np.add.at(
            weights, (np.arange(new_size), np.clip(first + tap, 0, size - 1)), np.where(x <= 1, near, far)
        )
    return weights
