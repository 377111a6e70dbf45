"""Parameters that hold a vector for each patch, for a model of another image size."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vir_jax.models.mixers.linformer import resample_patch_kernel
from vir_jax.models.position import resample_position_embedding

_RESAMPLE: dict[str, Callable[..., Array]] = {
    "position.embedding": resample_position_embedding,
    "compression.patch_kernel": resample_patch_kernel,
}
"""By how the parameter's dotted name ends."""


def fit_grid(
    name: str, parameter: Float[Array | np.ndarray, "..."], shape: Sequence[int]
) -> Float[np.ndarray, "..."]:
    """Return a parameter for a model whose images have another grid of patches.

    Args:
        name: of the parameter, dotted.
        parameter: where it holds a vector for each patch `[1, rows, cols, c]`, or one for each block and patch
            `[l, 1, rows, cols, c]`.
        shape: that it has in the new model.

    Returns:
        The parameter resampled as the model itself does it to read images of that size, any other as it is; in NumPy.
    """
    resample = next((function for ending, function in _RESAMPLE.items() if name.endswith(ending)), None)
    if resample is None or parameter.shape == tuple(shape):
        return np.asarray(parameter)
    to_grid = functools.partial(resample, grid=(shape[-3], shape[-2]))
    resampled = (to_grid if parameter.ndim == 4 else jax.vmap(to_grid))(jnp.asarray(parameter))
    return np.asarray(resampled)
