"""Activations over a mesh of simulated devices, and functions that the partitioner cannot split."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.models.helpers import images, lively, run
from tests.ops.cases import NEEDS
from vir_jax.models.sharding import constrain, on_each_device
from vir_jax.parallel.mesh import make_mesh

HEADS, STATE = ("batch", None, "heads"), ("batch", "heads")


def plain(x, state):
    """Of heads and a state that may be None."""
    return jnp.cumsum(x, axis=1) ** 2, None if state is None else state + x.sum(1)


def noting(seen):
    """`plain` on each device; the shapes that it works on are appended to `seen`."""

    def function(x, state):
        seen.append(x.shape)
        return plain(x, state)

    return on_each_device(function, (HEADS, STATE), (HEADS, STATE))


@pytest.mark.parametrize("with_state", [True, False])
def test_each_device_sees_its_part(with_state):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 5, 4)), jnp.float32)
    state = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32) if with_state else None
    seen = []
    split = noting(seen)

    def gradients(function):
        def run(x, state):
            results, pull_back = jax.vjp(function, x, state)
            return results, pull_back(results)

        return run

    mesh = make_mesh(2, 2, 2)
    placed = jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"), None, "tensor")))
    placed_state = (
        state if state is None else jax.device_put(state, NamedSharding(mesh, P(("data", "fsdp"), "tensor")))
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(gradients(split)).lower(placed, placed_state).compile()
    assert set(seen) == {(2, 5, 2)}
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", compiled.as_text())
    expected = gradients(plain)(x, state)
    jax.tree.map(np.testing.assert_allclose, compiled(placed, placed_state), expected)


def test_without_a_mesh_it_is_the_function_itself():
    seen = []
    out, none = noting(seen)(jnp.ones((8, 5, 4)), None)
    assert (out.shape, none, seen) == ((8, 5, 4), None, [(8, 5, 4)])


def mesh_of(**axes):
    devices = jax.devices()[: math.prod(axes.values())]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes), devices=devices)


@pytest.mark.parametrize(
    ("axes", "part"),
    [
        ({"data": 1, "fsdp": 1, "tensor": 1}, (8, 5, 4)),
        ({"x": 1}, (8, 5, 4)),
        ({"data": 4}, (2, 5, 4)),
        ({"fsdp": 2, "tensor": 2, "x": 1}, (4, 5, 2)),
    ],
)
def test_axes_that_are_missing_or_of_one_device(axes, part):
    seen = []
    with jax.set_mesh(mesh_of(**axes)):
        out, _ = jax.jit(noting(seen))(jnp.ones((8, 5, 4)), None)
    assert set(seen) == {part}
    np.testing.assert_array_equal(out, plain(jnp.ones((8, 5, 4)), None)[0])


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        (
            {"data": 2, "fsdp": 4},
            (12, 5, 4),
            r"its part of batch=12, which the mesh axes \{'data': 2, 'fsdp': 4\} do not divide; expected a "
            r"multiple of 8.*implementation='xla'",
        ),
        ({"data": 2, "tensor": 2}, (8, 5, 3), r"heads=3, which the mesh axes \{'tensor': 2\} do not divide"),
        (
            {"data": 2, "model": 4},
            (8, 5, 4),
            r"the mesh axes \{'model': 4\} split nothing.*names \{'batch': \('data', 'fsdp'\), "
            r"'heads': \('tensor',\)\}",
        ),
    ],
)
def test_no_device_computes_what_another_does(axes, shape, message):
    with jax.set_mesh(mesh_of(**axes)), pytest.raises(ValueError, match=message):
        jax.jit(noting([]))(jnp.ones(shape), None)


@pytest.mark.parametrize("implementation", [pytest.param("cpp_cpu", marks=NEEDS["cpu"])])
@pytest.mark.parametrize("retention", ["1d", "2d"])
def test_a_kernel_over_devices_gives_the_same_model(retention, implementation):
    x = images((4, 3, 4, 3))
    with jax.set_mesh(mesh_of(data=2, tensor=2)):
        split = run(lively(retention=retention, implementation=implementation), x)
    np.testing.assert_allclose(split, run(lively(retention=retention), x), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("kernels_run")
def test_a_model_with_a_kernel_says_what_the_mesh_does_not_divide():
    model = lively(implementation="pallas_tpu")
    with jax.set_mesh(mesh_of(data=8)), pytest.raises(ValueError, match=r"batch=4.*expected a multiple of 8"):
        model(images((4, 3, 4, 3)))


def test_constrain_leaves_alone_what_the_mesh_does_not_divide():
    with jax.set_mesh(mesh_of(data=2, tensor=2)):
        whole = jax.jit(lambda x: constrain(x, "batch", "heads"))(jnp.ones((4, 3)))
        other = jax.jit(lambda x: constrain(x, "batch", "heads"))(jnp.ones((3, 3)))
    assert whole.sharding.shard_shape(whole.shape) == (2, 3)
    assert other.sharding.shard_shape(other.shape) == (3, 3)


def test_inside_shard_map_it_is_the_function_itself():
    seen = []
    mesh = make_mesh(2, 2, 2)
    split = noting(seen)
    with jax.set_mesh(mesh):
        jax.jit(jax.shard_map(lambda x: split(x, None)[0], in_specs=P("data"), out_specs=P("data")))(
            jnp.ones((8, 5, 4))
        )
    assert set(seen) == {(4, 5, 4)}
