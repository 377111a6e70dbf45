"""How a loop holds an array of which each step writes a part.

XLA for CPUs cannot write into an array of 16-bit floats: it makes float32 of the whole array, and 16 bits of it again,
at every step, so that a loop over n tokens takes time in proportion to n^2. Integers of 16 bits are written in place.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from vir_jax.ops.platform import platform


def to_bits(x: Float[Array, "..."]) -> Shaped[Array, "..."]:
    """Return, on a CPU, 16-bit floats as integers of the same bits; elsewhere, and others, as they are."""
    if platform() == "cpu" and x.dtype.itemsize == 2:
        return jax.lax.bitcast_convert_type(x, jnp.uint16)
    return x


def from_bits(bits: Shaped[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """Return the floats of which `to_bits` made these."""
    return bits if bits.dtype == dtype else jax.lax.bitcast_convert_type(bits, dtype)
