"""Matrix products that accumulate in fp32 whatever their operands are."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


def matmul_precision(*inputs: Float[Array, "..."]) -> jax.lax.Precision:
    """The precision that makes the products as exact as the inputs are.

    An fp32 input asks for fp32 products: HIGHEST, because an accelerator's default would round fp32 operands to
    bf16 (TPU) or TF32 (GPU). With 16-bit inputs the hardware's default loses nothing that the inputs had; scores
    and states are still stored and summed in fp32, so that fp16 does not overflow. On a CPU all products are fp32.
    """
    is_full = any(x.dtype == jnp.float32 for x in inputs)
    return jax.lax.Precision.HIGHEST if is_full else jax.lax.Precision.DEFAULT


def contract(
    equation: str, x: Float[Array, "..."], y: Float[Array, "..."], precision: jax.lax.Precision
) -> Float32[Array, "..."]:
    """einsum(equation, x, y), summed in fp32."""
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)
