"""Linear layers: products in bfloat16 and their gradients, against float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.helpers import images
from vir_jax.models.linear import Linear, add_bias, product

ROUNDING = 2.0**-8
"""Of bfloat16: half a unit in the last place, relative."""


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "axes"),
    [((5, 6), (6, 7), 1), ((2, 5, 6), (6, 7), 1), ((2, 5, 6), (6, 3, 4), 1), ((2, 5, 3, 4), (3, 4, 6), 2)],
)
def test_products_in_bfloat16_and_their_gradients_are_rounded_once(x_shape, w_shape, axes):
    x, w = (images(shape).astype(jnp.bfloat16) for shape in (x_shape, w_shape))
    out, gradients = jax.vjp(lambda x, w: product(x, w, axes), x, w)
    g = images(out.shape).astype(jnp.bfloat16)
    of_x, of_w = gradients(g)

    x, w, g = (np.asarray(y, np.float64) for y in (x, w, g))
    outputs, tokens = range(-(w.ndim - axes), 0), range(x.ndim - axes)
    expected = (
        np.tensordot(x, w, axes),
        np.tensordot(g, w, (outputs, range(axes, w.ndim))),
        np.tensordot(x, g, (tokens, tokens)),
    )
    for result, exact in zip((out, of_x, of_w), expected, strict=True):
        assert result.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(result, np.float64), exact, rtol=ROUNDING, atol=1e-5)


@pytest.mark.parametrize(("platform", "dtype"), [("cpu", "f32"), ("tpu", "bf16"), ("cuda", "bf16")])
def test_a_cpu_alone_asks_for_float32(platform, dtype):
    x, w = jnp.ones((2, 5, 6), jnp.bfloat16), jnp.ones((6, 7), jnp.bfloat16)
    step = jax.jit(jax.grad(lambda x, w: jnp.sum(product(x, w).astype(jnp.float32) ** 2), argnums=(0, 1)))
    text = step.trace(x, w).lower(lowering_platforms=(platform,)).as_text()
    assert re.findall(r"dot_general.*-> tensor<[\dx]+x(\w+)>", text) == [dtype] * 3


def test_the_gradient_of_a_bias_is_summed_in_float32():
    # bfloat16 has 8 bits: 1,001 is none of its numbers.
    x, bias = jnp.zeros((7, 143, 3), jnp.bfloat16), jnp.zeros(3)
    gradient = jax.grad(lambda bias: jnp.sum(add_bias(x, bias).astype(jnp.float32)))(bias)
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, 1001.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_in_other_dtypes_it_is_the_layer_of_flax(dtype):
    ours, flax = (kind(6, (3, 4), dtype=dtype, rngs=nnx.Rngs(0)) for kind in (Linear, nnx.LinearGeneral))
    x = images((2, 5, 6))
    np.testing.assert_array_equal(ours(x), flax(x))
    assert ours(x).dtype == dtype
