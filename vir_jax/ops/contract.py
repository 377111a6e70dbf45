"""Matrix products that are summed in fp32 whatever their operands are."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


def matmul_precision(*inputs: Float[Array, "..."]) -> jax.lax.Precision:
    """Return the precision that makes products as exact as the inputs are.

    With an fp32 input products are fp32: HIGHEST, for an accelerator's default would round fp32 operands to bf16
    (TPU) or TF32 (GPU). With 16-bit inputs alone that default is as fine as they are. In both cases scores and states
    stay fp32 in memory, so fp16 inputs do not overflow in them. A CPU multiplies in fp32 always.
    """
    full = any(x.dtype == jnp.float32 for x in inputs)
    return jax.lax.Precision.HIGHEST if full else jax.lax.Precision.DEFAULT


def contract(
    equation: str, x: Float[Array, "..."], y: Float[Array, "..."], precision: jax.lax.Precision
) -> Float32[Array, "..."]:
    """Compute einsum(equation, x, y), summed in fp32."""
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)


def empty_state(k: Float[Array, "b n h d"], v: Float[Array, "b n h e"]) -> Float32[Array, "b h d e"]:
    """Return the state after no token at all: zero, and laid out over devices as k and v are."""
    return contract("bnhd,bnhe->bhde", k[:, :0], v[:, :0], jax.lax.Precision.DEFAULT)
