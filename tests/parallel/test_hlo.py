import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vir_jax.parallel.hlo import estimated_cycles, read_computations
from vir_jax.training.compile_report import topology_devices

# Several processes of tests may compile for TPUs at a time.
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

NESTED = """HloModule m

%inner_body (p: (s32[])) -> (s32[]) {
  %x = f32[8]{0} fusion(%p), backend_config={"window_config":{"estimated_cycles":"100"}}
}

%inner_end (p: (s32[])) -> pred[] {
  %bound = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%outer_body (p: (s32[])) -> (s32[]) {
  %loop = (s32[]) while(%p), condition=%inner_end, body=%inner_body
  %y = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"10"}
}

%outer_end (p: (s32[])) -> pred[] {
  %bound = s32[]{:T(128)} constant(4)
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%never_called (p: (s32[])) -> (s32[]) {
  %z = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"1000000"}
}

ENTRY %main (p: (s32[])) -> (s32[]) {
  %loop = (s32[]) while(%p), condition=%outer_end, body=%outer_body
  %w = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"1"}
}
"""


def test_loops_count_as_often_as_they_run():
    _, runs = read_computations(NESTED)
    assert {name: runs.get(name, 0) for name in ("main", "outer_body", "inner_body", "never_called")} == {
        "main": 1,
        "outer_body": 4,
        "inner_body": 12,
        "never_called": 0,
    }
    assert estimated_cycles(NESTED) == 1 + 4 * 10 + 12 * 100


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs requirements-compile.txt"
)
def test_twice_as_many_steps_for_a_tpu_take_twice_as_long():
    mesh = Mesh(np.array(topology_devices("v5e:2x2")[:1]), ("device",))
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))

    def cycles(steps):
        def step(y, _):
            return jnp.tanh(y @ y), None

        return estimated_cycles(
            jax.jit(lambda y: jax.lax.scan(step, y, length=steps)[0]).lower(x).compile().as_text()
        )

    assert cycles(80) == pytest.approx(2 * cycles(40), rel=0.05)


def test_a_program_without_estimates_is_refused():
    with pytest.raises(
        ValueError, match="says no estimated_cycles: expected one that was compiled for a TPU"
    ):
        estimated_cycles(jax.jit(jnp.sin).lower(1.0).compile().as_text())


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="it has no ENTRY computation"):
        estimated_cycles("nothing")
