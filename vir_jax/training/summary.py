"""What is printed before the first step: parameters, mesh, and memory as compiled."""

import math
from typing import Any

import jax
from jax.sharding import Mesh

from vir_jax.training.sharding import unsplit
from vir_jax.training.state import Params, TrainState


def count_parameters(params: Params) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def bytes_per_device(state: Any) -> int:
    """Bytes of a tree of shapes with shardings that one device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
    )


def compiled_memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes on each device of a compiled step: arguments, outputs not aliased to them, temporaries, sum.

    Empty where the backend does not tell.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        return {}
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
    return {**parts, "total": sum(parts.values())}


def summarize(state: TrainState, mesh: Mesh, compiled: jax.stages.Compiled, *, flops: int | None) -> str:
    """A text of the parameters by top-level module, the mesh, and the memory of one device.

    Args:
      state: shapes with shardings.
      mesh: of the run.
      compiled: the train step.
      flops: of the model on one image, forward and backward; None where they are not counted.
    """
    rows = [(name, count_parameters(part)) for name, part in state.params.items()]
    memory = compiled_memory(compiled)
    device = jax.devices()[0]
    return "\n".join(
        [
            "parameters",
            *(f"  {name:<24}{size:>14,}" for name, size in rows),
            f"  {'total':<24}{count_parameters(state.params):>14,}",
            f"devices    {mesh.size} x {device.device_kind} ({device.platform}),"
            f" {jax.process_count()} process(es)",
            "mesh       " + ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
            *(f"not split  {line}" for line in unsplit(state.params, mesh)),
            "compute    "
            + (
                "not counted" if flops is None else f"{flops / 1e9:.3g} GFLOP per image, forward and backward"
            ),
            f"memory     train state {_mib(bytes_per_device(state))} per device; compiled step: "
            + (
                ", ".join(f"{name} {_mib(size)}" for name, size in memory.items())
                or "not told by this backend"
            ),
        ]
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
