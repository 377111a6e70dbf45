"""Activations over a mesh of simulated devices, and functions that the partitioner cannot split."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vir_jax.models.sharding import on_each_device
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
@pytest.mark.parametrize(
    ("heads", "part"),
    [(4, (2, 5, 2)), (3, (2, 5, 3))],
    ids=["heads split", "heads that the mesh does not divide"],
)
def test_each_device_sees_its_part(heads, part, with_state):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 5, heads)), jnp.float32)
    state = jnp.asarray(rng.normal(size=(8, heads)), jnp.float32) if with_state else None
    seen = []
    split = noting(seen)

    def gradients(function):
        def run(x, state):
            results, pull_back = jax.vjp(function, x, state)
            return results, pull_back(results)

        return run

    mesh = make_mesh(2, 2, 2)
    over = ("data", "fsdp"), "tensor" if heads == 4 else None
    placed = jax.device_put(x, NamedSharding(mesh, P(over[0], None, over[1])))
    placed_state = state if state is None else jax.device_put(state, NamedSharding(mesh, P(*over)))
    with jax.set_mesh(mesh):
        compiled = jax.jit(gradients(split)).lower(placed, placed_state).compile()
    assert set(seen) == {part}
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", compiled.as_text())
    expected = gradients(plain)(x, state)
    jax.tree.map(np.testing.assert_allclose, compiled(placed, placed_state), expected)


def test_without_a_mesh_it_is_the_function_itself():
    seen = []
    out, none = noting(seen)(jnp.ones((8, 5, 4)), None)
    assert (out.shape, none, seen) == ((8, 5, 4), None, [(8, 5, 4)])


def test_inside_shard_map_it_is_the_function_itself():
    seen = []
    mesh = make_mesh(2, 2, 2)
    split = noting(seen)
    with jax.set_mesh(mesh):
        jax.jit(jax.shard_map(lambda x: split(x, None)[0], in_specs=P("data"), out_specs=P("data")))(
            jnp.ones((8, 5, 4))
        )
    assert set(seen) == {(4, 5, 4)}
