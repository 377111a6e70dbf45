"""Maps between places: bilinear interpolation to more of them, averages over fewer."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def enlarge(
    x: Float[Array, "b rows cols k"], size: Sequence[int], factor: int | float | Sequence[float]
) -> Float[Array, "b _rows _cols k"]:
    """Interpolate bilinearly; beyond the outermost centres stand their values.

    Args:
        x: a map. Each of its places covers `factor` new ones each way; its value stands at the centre of these.
        size: rows and columns of the result; less than all that the map covers: what is below and to the right is
            left out.
        factor: new places to an old one, in rows and columns or the same in both; below 1, too, where nothing is
            averaged.
    """
    # As `jax.image.resize`, which would compute the weights in float64 where that is on.
    return jax.image.scale_and_translate(
        x,
        (x.shape[0], *size, x.shape[-1]),
        spatial_dims=(1, 2),
        scale=jnp.broadcast_to(jnp.asarray(factor, jnp.float32), (2,)),
        translation=jnp.zeros(2, jnp.float32),
        method="bilinear",
        antialias=False,
    )


def average_pool(x: Float[Array, "b rows cols c"], side: int) -> Float[Array, "b side side c"]:
    """Average over side x side bins that cover a map of any size, as PyTorch's adaptive pooling has them.

    Bin i of n places reaches from floor(i n / side) to ceil((i + 1) n / side); bins overlap where `side` does not
    divide n. A map of fewer places than bins has the same place in several.
    """
    rows, cols = (_bins(size, side) for size in x.shape[1:3])
    return jnp.einsum("yi,xj,bijc->byxc", rows, cols, x, precision=jax.lax.Precision.HIGHEST)


def _bins(size: int, side: int) -> Float[np.ndarray, "side size"]:
    """Return how much of each bin is of each place."""
    start = np.arange(side)[:, None] * size // side
    end = -(-(np.arange(side)[:, None] + 1) * size // side)
    inside = (np.arange(size) >= start) & (np.arange(size) < end)
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)
