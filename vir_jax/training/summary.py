"""What is printed before the first step: parameters, mesh, and memory as compiled."""

import math

import jax
from jax.sharding import Mesh

from vir_jax.parallel.memory import bytes_per_device, compiled_memory
from vir_jax.parallel.sharding import Axes, unsplit
from vir_jax.runs.state import Params, TrainState


def count_parameters(params: Params) -> int:
    """Return the number of scalars in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def summarize(
    parameters: Params,
    state: TrainState,
    mesh: Mesh,
    axes: Axes,
    compiled: jax.stages.Compiled,
    *,
    flops: int | None,
) -> str:
    """Return a text of the parameters by top-level module, the mesh, and the memory of one device.

    Args:
      parameters: shapes; those of `state` have a model's statistics among them.
      state: shapes with shardings.
      mesh: of the run.
      axes: how the parameters name their dimensions.
      compiled: the train step.
      flops: of the model on one image, forward and backward; None where they are not counted.
    """
    rows = [(name, count_parameters(part)) for name, part in parameters.items()]
    memory = compiled_memory(compiled)
    device = jax.devices()[0]
    return "\n".join(
        [
            "parameters",
            *(f"  {name:<24}{size:>14,}" for name, size in rows),
            f"  {'total':<24}{count_parameters(parameters):>14,}",
            f"devices    {mesh.size} x {device.device_kind} ({device.platform}),"
            f" {jax.process_count()} process(es)",
            "mesh       " + ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
            *(f"not split  {line}" for line in unsplit(state.params, mesh, axes)),
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
