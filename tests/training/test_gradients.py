"""Means over a batch, on one device or many, in one slice or several, and the dtype they are summed in."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from vir_jax.parallel.mesh import make_mesh
from vir_jax.training.gradients import check_reduce_dtype, mean_gradients
from vir_jax.training.plan import check_on_mesh

KEY = jax.random.key(0, impl="threefry2x32")
PARAMS = {"kernel": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2)}
EXAMPLES = tuple(
    jax.random.normal(key, (16, width)) for key, width in zip(jax.random.split(KEY), (3, 2), strict=True)
)


def loss(params, x, y, key):
    """With noise by example."""
    outputs = x @ params["kernel"] * jax.random.bernoulli(key, 0.5, (x.shape[0], 1))
    value = jnp.mean(jnp.square(outputs - y))
    return value, {"loss": value}


def means(devices, slices):
    with jax.set_mesh(make_mesh(*devices, devices=jax.devices()[: int(np.prod(devices))])):
        gradient = jax.grad(loss, has_aux=True)
        return jax.jit(
            lambda p, e: mean_gradients(gradient, p, e, KEY, slices=slices, reduce_dtype="float32")
        )(PARAMS, EXAMPLES)


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("devices", [(1, 1, 1), (8, 1, 1), (4, 1, 2), (2, 2, 2), (1, 8, 1)], ids=str)
def test_they_are_the_same_on_any_mesh_in_any_number_of_slices(devices, slices):
    expected = means((1, 1, 1), 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), means(devices, slices), expected)


def test_the_sum_over_devices_has_the_dtype_asked_for(monkeypatch):
    """Traced alone: XLA cannot compile it for CPUs."""
    monkeypatch.setattr("vir_jax.training.gradients.platform", lambda: "gpu")
    gradient = jax.grad(loss, has_aux=True)

    def summed(dtype):
        with jax.set_mesh(make_mesh(8)):
            traced = jax.make_jaxpr(
                lambda p, e: mean_gradients(gradient, p, e, KEY, slices=2, reduce_dtype=dtype)
            )(PARAMS, EXAMPLES)
        return re.findall(r"(\w+)\[3,2\] = psum", str(traced))

    assert summed("float32") == ["f32"]
    assert summed("bfloat16") == ["bf16"]


def test_what_cannot_be_summed_in_16_bits_is_refused(digits_config):
    digits_config.reduce_dtype = "bfloat16"
    check_on_mesh(digits_config, make_mesh(devices=jax.devices()[:1]))
    with pytest.raises(
        ValueError, match=r"config.reduce_dtype is 'bfloat16', in which XLA does not sum over CPU"
    ):
        check_on_mesh(digits_config, make_mesh(8))
    with pytest.raises(ValueError, match="which a model with batch statistics does not use"):
        check_reduce_dtype("bfloat16", apart=False)


def test_a_mesh_without_a_data_axis_is_left_alone():
    gradient = jax.grad(loss, has_aux=True)
    with jax.set_mesh(Mesh(np.array(jax.devices()[:2]), ("other",))):
        found = mean_gradients(gradient, PARAMS, EXAMPLES, KEY, slices=1, reduce_dtype="float32")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, means((1, 1, 1), 1))
