"""Linear layers in bfloat16: products by the form that the platform computes fast, sums of gradients in float32."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, BFloat16, Float, Float32

Pair = tuple[Sequence[int], Sequence[int]]


class Linear(nnx.LinearGeneral):
    """Flax's linear layer, over the last axes of what it reads."""

    def __call__(self, inputs: Float[Array, "..."]) -> Float[Array, "..."]:  # type: ignore[override]
        """Compute x W + b in the layer's dtype; how it is split over devices is left to the compiler."""
        x, kernel = (y.astype(self.dtype) for y in (inputs, self.kernel[...]))
        out = product(x, kernel, len(self.in_features))
        return out if self.bias is None else add_bias(out, self.bias[...])


def product(x: Float[Array, "..."], w: Float[Array, "..."], axes: int = 1) -> Float[Array, "..."]:
    """Multiply x and w, which have one dtype, and sum over the last axes of x and the first of w.

    CPUs with instructions for bfloat16 multiply it several times as fast as float32, but XLA uses them only where the
    result is float32: asked for bfloat16 it widens both operands first. So on a CPU the result is float32 and then
    rounded, in the gradients too. Elsewhere, and in other dtypes, the product is XLA's own. In bfloat16 forward
    differentiation (`jax.jvp`) is not defined.
    """
    if x.dtype == jnp.bfloat16:
        return _bfloat16_product(x, w, axes)
    return jax.lax.dot_general(x, w, (_last_and_first(x, axes), ((), ())))


def add_bias(x: Float[Array, "..."], bias: Float32[Array, "..."]) -> Float[Array, "..."]:
    """Add a bias to the last axes of x, in its dtype; the bias's gradient is summed in float32."""
    return x + bias if x.dtype == bias.dtype else _add_rounded(x, bias)


def _last_and_first(x: Float[Array, "..."], axes: int) -> Pair:
    return range(x.ndim - axes, x.ndim), range(axes)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _bfloat16_product(
    x: BFloat16[Array, "..."], w: BFloat16[Array, "..."], axes: int
) -> BFloat16[Array, "..."]:
    return _multiply(x, w, _last_and_first(x, axes))


def _forward(
    x: BFloat16[Array, "..."], w: BFloat16[Array, "..."], axes: int
) -> tuple[BFloat16[Array, "..."], tuple[BFloat16[Array, "..."], BFloat16[Array, "..."]]]:
    return _bfloat16_product(x, w, axes), (x, w)


def _backward(
    axes: int,
    operands: tuple[BFloat16[Array, "..."], BFloat16[Array, "..."]],
    gradient: BFloat16[Array, "..."],
) -> tuple[BFloat16[Array, "..."], BFloat16[Array, "..."]]:
    x, w = operands
    tokens, outputs = range(x.ndim - axes), range(x.ndim - axes, gradient.ndim)
    of_x = _multiply(gradient, w, (outputs, range(axes, w.ndim)))
    of_w = _multiply(x, gradient, (tokens, tokens))
    return of_x, of_w


_bfloat16_product.defvjp(_forward, _backward)


def _multiply(
    x: BFloat16[Array, "..."], y: BFloat16[Array, "..."], contracting: Pair
) -> BFloat16[Array, "..."]:
    dimensions = contracting, ((), ())
    return jax.lax.platform_dependent(
        x,
        y,
        cpu=lambda x, y: jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32).astype(
            x.dtype
        ),
        default=lambda x, y: jax.lax.dot_general(x, y, dimensions),
    )


@jax.custom_vjp
def _add_rounded(x: Float[Array, "..."], bias: Float32[Array, "..."]) -> Float[Array, "..."]:
    return x + bias.astype(x.dtype)


_add_rounded.defvjp(
    lambda x, bias: (_add_rounded(x, bias), bias),
    lambda bias, gradient: (
        gradient,
        jnp.sum(gradient, axis=range(gradient.ndim - bias.ndim), dtype=bias.dtype),
    ),
)
