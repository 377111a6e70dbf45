import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vir_jax.parallel.collectives import Traffic, collectives
from vir_jax.parallel.mesh import make_mesh
from vir_jax.tasks import make_task
from vir_jax.training.plan import make_plan


def compiled_text(function, *specs, out):
    mesh = make_mesh(8)
    shapes = [
        jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, spec)) for spec in specs
    ]
    return jax.jit(function, out_shardings=NamedSharding(mesh, out)).lower(*shapes).compile().as_text()


def step_traffic(config, slices):
    config.accumulation_steps = slices
    mesh = make_mesh(2, devices=jax.devices()[:2])
    plan = make_plan(config, mesh, task=make_task(config, "0123456789"), steps_per_epoch=10.0)
    return sum(traffic.bytes for traffic in collectives(plan.compile().as_text()).values())


def test_accumulation_sums_over_devices_once(digits_config):
    assert step_traffic(digits_config, 4) <= 1.05 * step_traffic(digits_config, 1)


def test_nothing_is_sent():
    assert collectives(compiled_text(lambda x: 2 * x, P("data"), out=P("data"))) == {}


def test_a_gather_counts_the_whole_array():
    found = collectives(compiled_text(lambda x: 2 * x, P("data"), out=P()))
    assert found == {"all-gather": Traffic(count=1, bytes=16 * 64 * 4, dtypes={"f32": 16 * 64 * 4})}


def test_a_sum_over_devices():
    found = collectives(compiled_text(lambda x: x.sum(0), P("data"), out=P()))
    assert found == {"all-reduce": Traffic(count=1, bytes=64 * 4, dtypes={"f32": 64 * 4})}


def test_a_loop_counts_as_often_as_it_runs():
    def function(x):
        def step(total, _):
            return total + (total[:, None] * x).sum(0)[:16], None

        return jax.lax.scan(step, jnp.ones(16), None, length=5)[0]

    found = collectives(compiled_text(function, P("data"), out=P()))
    assert found["all-reduce"].count == 5


ADD = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %r = f32[] add(%a, %b)
}

"""


def test_scattered_and_asynchronous_forms():
    text = """
ENTRY %main (x: f32[8,4]) -> f32[2,4] {
  %s = f32[2,4]{1,0} reduce-scatter(%x), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
  %t = f32[2]{0} reduce-scatter(%x), replica_groups=mesh['a'=2,'b'=4], device_ids=([8]) {'b'}, to_apply=%add
  %g = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%y), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %d = bf16[8,4]{1,0} all-gather-done(%g)
  %p = (s8[6], s8[6], u32[], u32[]) collective-permute-start(%z), source_target_pairs={{0,1}}
}
"""
    assert collectives(ADD + text) == {
        "all-gather": Traffic(1, 8 * 4 * 2, {"bf16": 8 * 4 * 2}),
        "collective-permute": Traffic(1, 6, {"s8": 6}),
        "reduce-scatter": Traffic(2, 4 * (2 * 4 + 2) * 4, {"f32": 4 * (2 * 4 + 2) * 4}),
    }


def test_parts_of_one_collective_count_once():
    part = "  %g = bf16[8]{0} all-gather(%x), channel_id=7, replica_groups={{0,1}}, dimensions={0}\n}\n\n"
    text = (
        f"%begin (x: bf16[4]) -> bf16[8] {{\n{part}%end (x: bf16[4]) -> bf16[8] {{\n{part}"
        "ENTRY %main (x: bf16[4]) -> bf16[8] {\n"
        "  %a = bf16[8] fusion(%x), kind=kCustom, calls=%begin\n"
        "  ROOT %b = bf16[8] fusion(%a), kind=kCustom, calls=%end\n}\n"
    )
    assert collectives(ADD + text) == {"all-gather": Traffic(1, 16, {"bf16": 16})}


def test_collectives_of_one_channel_that_stand_side_by_side_count_each():
    """What XLA for TPUs makes of a `psum` of many arrays: some together, all in one channel."""
    text = """
ENTRY %main (x: f32[4]) -> f32[4] {
  %a = (f32[4]{0:T(8)}, /*index=1*/bf16[8]{0:T(8)}) all-reduce(%x, %y), channel_id=1, to_apply=%add
  %b = f32[6]{0:T(8)} all-reduce(%z), channel_id=1, to_apply=%add
  ROOT %c = f32[6]{0:T(8)} all-reduce(%w), channel_id=1, to_apply=%add
}
"""
    assert collectives(ADD + text) == {"all-reduce": Traffic(3, 80, {"f32": 64, "bf16": 16})}


def test_a_loop_of_a_tpu_runs_up_to_the_bound_of_its_condition():
    text = """
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = f32[4]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1}}, to_apply=%add
}

%up_to_24 (p: (s32[], f32[4])) -> pred[] {
  %end = s32[]{:T(128)} constant(24)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %end), direction=LT
}

%until_it_is_small (p: (s32[], f32[4])) -> pred[] {
  ROOT %gt = pred[]{:T(512)} compare(%y, %z), direction=GT
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%CONDITION, body=%body
}
"""
    for condition, times in (("up_to_24", 24), ("until_it_is_small", 1)):
        found = collectives(ADD + text.replace("CONDITION", condition))
        assert found == {"all-reduce": Traffic(times, times * 16, {"f32": times * 16})}


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        collectives("hello")
