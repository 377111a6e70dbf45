"""Batch and heads over a mesh of simulated devices: every device works on its own, and nothing is gathered."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.ops.cases import assert_close, in_mode, random_case
from vir_jax.ops import retention, retention_2d

TOKENS, HEADS = P("data", None, "tensor"), P("tensor")
OPS = {
    "sequence": lambda mode: partial(retention, **in_mode(mode, chunk_size=8)),
    "grid": lambda mode: partial(retention_2d, grid=(5, 4), **in_mode(mode, chunk_rows=2)),
}
CASE = random_case(b=4, n=21, h=4)


def _mesh(axis_type):
    return jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(axis_type,) * 2)


def _placed(mesh):
    specs = (TOKENS, TOKENS, TOKENS, HEADS)
    return [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(CASE.arguments, specs, strict=False)]


def _collectives(compiled):
    """The name of every collective in the program, with the shapes it yields."""
    names = "all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
    found = re.findall(rf"= (.*?) ((?:{names})(?:-start)?)\(", compiled.as_text())
    return {(name, shape) for shapes, name in found for shape in re.findall(r"\w+\[[\d,]*\]", shapes)}


@pytest.mark.parametrize("mode", ["parallel", "chunkwise"])
@pytest.mark.parametrize("op", OPS)
def test_nothing_is_gathered(op, mode):
    arguments = _placed(_mesh(AxisType.Auto))

    def loss(q, k, v, log_decay):
        return OPS[op](mode)(q, k, v, log_decay)

    forward = jax.jit(loss).lower(*arguments).compile()
    assert _collectives(forward) == set()

    def gradients(*arguments):
        results, pull_back = jax.vjp(loss, *arguments)
        return pull_back(results)

    backward = jax.jit(gradients).lower(*arguments).compile()
    # The decay's gradient is summed over the batch: two of the four heads on each device.
    assert _collectives(backward) == {("all-reduce", "f32[2]")}
    expected = jax.jit(gradients)(*CASE.arguments[:4])
    assert_close(backward(*arguments), expected, 3e-6)


@pytest.mark.parametrize("result", [0, 1], ids=["output", "state"])
@pytest.mark.parametrize("op", OPS)
def test_shard_map_and_explicit_sharding(op, result):
    def loss(q, k, v, log_decay):
        return jnp.sum(jnp.sin(OPS[op]("chunkwise")(q, k, v, log_decay)[result]))

    by = range(result, 4)  # A state does not depend on q.
    expected = jax.jit(jax.grad(loss, by))(*CASE.arguments[:4])

    mesh = _mesh(AxisType.Auto)
    specs = {"in_specs": (TOKENS, TOKENS, TOKENS, HEADS), "out_specs": P()}
    total = jax.shard_map(lambda *x: jax.lax.psum(loss(*x), ("data", "tensor")), mesh=mesh, **specs)
    assert_close(jax.jit(jax.grad(total, by))(*CASE.arguments[:4]), expected, 3e-6)

    mesh = _mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        explicit = jax.jit(jax.grad(loss, by))(*_placed(mesh))
        assert_close(jax.tree.map(np.asarray, explicit), expected, 3e-6)
