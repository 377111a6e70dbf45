"""Initialisation statistics, and the parts of a block that do not mix tokens."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.helpers import fresh, images, initial_parameters, initialise, parameters
from vir_jax.models.layers import drop_path, gelu


@pytest.mark.parametrize("name", ["vir_pico1", "vit_pico1"])
def test_initialisation_statistics(name):
    deviations = {
        "qkv.kernel": 0.02,
        "out.kernel": 0.02,
        "up.kernel": 0.02,
        "down.kernel": 0.02,
        "head.kernel": 0.02,
        "embedding.conv.kernel": 1 / 3,  # Of U(-1/sqrt(3), 1/sqrt(3)).
        "class_position_embedding": 0.02,
        "position.embedding": 0.02,
        "class_token": 1e-6,
    }
    constants = {"bias": 0.0, "norm1.scale": 1.0, "norm2.scale": 1.0, "readout.norm.scale": 1.0}
    constants |= {"layer_scale1.scale": 1e-5, "layer_scale2.scale": 1e-5}
    for path, value in parameters(fresh(name)).items():
        value = np.asarray(value, np.float64)
        suffix = next((suffix for suffix in constants if path.endswith(suffix)), None)
        if suffix is not None:
            np.testing.assert_array_equal(value, np.float64(np.float32(constants[suffix])), err_msg=path)
            continue
        deviation = next(deviation for suffix, deviation in deviations.items() if path.endswith(suffix))
        # Five standard errors of a normal sample's mean and deviation; the others have less.
        assert abs(value.mean()) < 5 * deviation / value.size**0.5, path
        assert abs(value.std() / deviation - 1) < 5 / (2 * value.size) ** 0.5, path
        if deviation == 0.02 and path.endswith("kernel"):
            assert abs(value).max() <= 2 * 0.02 / 0.87962566, f"{path} is not truncated"


def test_initialisation_is_drawn_from_the_seed_and_differs_from_block_to_block():
    first, other = initial_parameters("vir_pico1"), initial_parameters("vir_pico1", seed=1)
    for leaf, other_leaf in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
        is_constant = jnp.all(leaf == leaf.ravel()[0])
        assert is_constant or jnp.any(leaf != other_leaf)
    jax.tree.map(np.testing.assert_array_equal, first, initialise("vir_pico1", jax.random.key(0)))
    kernels = first["stage"]["blocks"]["mlp"]["up"]["kernel"][...]
    assert all(jnp.any(kernels[0] != kernel) for kernel in kernels[1:])


def test_drop_path_drops_whole_samples_and_keeps_the_expectation():
    rate, samples = 0.3, 20_000
    out = np.asarray(drop_path(jnp.ones((samples, 2, 3)), rate, jax.random.key(0)))
    assert np.all(out == out[:, :1, :1])
    kept = out[:, 0, 0] > 0
    np.testing.assert_allclose(out[kept], 1 / (1 - rate), rtol=1e-6)
    standard_error = (rate * (1 - rate) / samples) ** 0.5
    assert abs(kept.mean() - (1 - rate)) < 4 * standard_error


def test_drop_path_does_nothing_without_a_key_or_a_rate():
    x = images((4, 2, 3))
    assert drop_path(x, 0.5, None) is x
    np.testing.assert_array_equal(drop_path(x, 0.0, jax.random.key(0)), x)


def test_drop_path_keeps_the_dtype():
    assert drop_path(jnp.ones((4, 2, 3), jnp.bfloat16), 0.5, jax.random.key(0)).dtype == jnp.bfloat16


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-7), (jnp.bfloat16, 2.0**-8)])
def test_gelu_and_its_derivative(dtype, tolerance):
    """As x Phi(x) in float64; where that is nearly zero, to the absolute error of 1 + erf."""
    x = jnp.linspace(-6, 6, 1001).astype(dtype)
    found, slope = jax.vmap(jax.value_and_grad(gelu))(x)
    assert found.dtype == slope.dtype == dtype
    exact = np.asarray(x, np.float64)
    phi = np.array([0.5 * math.erfc(-each / math.sqrt(2)) for each in exact])
    density = np.exp(-(exact**2) / 2) / math.sqrt(2 * math.pi)
    for value, wanted in ((found, exact * phi), (slope, phi + exact * density)):
        np.testing.assert_allclose(np.asarray(value, np.float64), wanted, rtol=tolerance, atol=1e-6)
