"""The convolution that CPUs compute as a product is XLA's own, and so are its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.helpers import images
from vir_jax.models.convolution import convolve


@pytest.mark.parametrize(
    ("size", "window", "stride", "padding"),
    [
        ((6, 8), (3, 3), (1, 1), ((1, 1), (1, 1))),
        ((6, 8), (3, 3), (2, 2), ((1, 0), (1, 1))),
        ((7, 5), (2, 3), (2, 1), ((0, 0), (2, 0))),
    ],
)
def test_values_and_gradients_are_those_of_xla(size, window, stride, padding):
    x, kernel = images((2, *size, 3)), images((*window, 3, 5))

    def of_xla(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, stride, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def ours(x, kernel):
        return convolve(x, kernel, stride, padding)

    expected, pull_back = jax.vjp(of_xla, x, kernel)
    found, pull_back_ours = jax.vjp(ours, x, kernel)
    cotangent = jnp.cos(jnp.arange(expected.size, dtype=jnp.float32)).reshape(expected.shape)
    pairs = zip((found, *pull_back_ours(cotangent)), (expected, *pull_back(cotangent)), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_elsewhere_it_is_xlas_own():
    shapes = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((3, 3, 3, 5), jnp.float32)
    traced = jax.jit(lambda x, kernel: convolve(x, kernel, (1, 1), ((1, 1), (1, 1)))).trace(*shapes)
    assert "stablehlo.convolution" in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.convolution" not in traced.lower(lowering_platforms=("cpu",)).as_text()
