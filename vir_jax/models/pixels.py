"""From stored pixels to what a model reads."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


def normalize(
    images: UInt8[Array, "b y x 3"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "b y x 3"]:
    """Colours from 0..255 to (colour / 255 - mean) / std, in float32."""
    mean_, std_ = (jnp.asarray(values, jnp.float32) for values in (mean, std))
    return (images.astype(jnp.float32) / 255 - mean_) / std_
