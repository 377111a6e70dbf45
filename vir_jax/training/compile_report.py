"""Compiles a recipe's training step for machines that are not there: memory, FLOPs and communication per chip.

TPU slices (v4, v5e, v5p, v6e) need the package libtpu (`pip install "vir-jax[compile]"`), and no TPU. The command is
`vir-compile`, `vir_jax/commands/compile.py`.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import ml_collections
from jax.experimental import topologies

from vir_jax.parallel.collectives import Traffic, collectives
from vir_jax.parallel.hardware import CHIPS, GIB
from vir_jax.parallel.memory import bytes_per_device, compiled_memory
from vir_jax.parallel.mesh import make_mesh
from vir_jax.parallel.sharding import unsplit
from vir_jax.runs.validate import validate
from vir_jax.tasks import make_task
from vir_jax.training.plan import make_plan

IMAGENET_EXAMPLES = 1_281_167


@dataclasses.dataclass(frozen=True)
class Report:
    """A compiled training step, seen from one device.

    Attributes:
      mesh: sizes of the axes.
      device_kind: of the devices.
      memory: bytes of arguments, outputs, temporaries, and their total; empty where the compiler gave up.
      capacity: bytes that the device has; None where that is not known.
      overflow: what the compiler said when the step did not fit.
      state: bytes of the train state.
      model_flops: of the model in a step (forward and backward, recomputation not counted); None where not counted.
      collectives: by kind.
      unsplit: dimensions that the rules would split and the mesh does not divide.
    """

    mesh: dict[str, int]
    device_kind: str
    memory: dict[str, int]
    capacity: int | None
    overflow: str | None
    state: int
    model_flops: float | None
    collectives: dict[str, Traffic]
    unsplit: list[str]

    @property
    def fits(self) -> bool:
        """Whether the step fits the device's memory, as far as is known."""
        return self.overflow is None and (self.capacity is None or self.memory["total"] <= self.capacity)


def compile_report(
    config: ml_collections.ConfigDict,
    topology: str,
    *,
    num_classes: int = 1000,
    num_examples: int = IMAGENET_EXAMPLES,
) -> Report:
    """Compile the training step of a config for a topology.

    Args:
      config: see `default_config`.
      topology: see `topology_devices`.
      num_classes: of the data.
      num_examples: of the training data; the schedule depends on it.

    Raises:
      ValueError: a config that cannot be run, or an unknown topology.
    """
    validate(config)
    devices = topology_devices(topology)
    mesh = make_mesh(**config.mesh, devices=devices)
    plan = make_plan(
        config,
        mesh,
        task=make_task(config, [str(number) for number in range(num_classes)]),
        steps_per_epoch=num_examples / config.batch_size,
    )
    chip = CHIPS.get(devices[0].device_kind)
    flops = plan.model.flops(plan.image_size)
    memory, overflow, traffic = {}, None, {}
    try:
        compiled = plan.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        overflow = str(error).splitlines()[0]
    else:
        memory = compiled_memory(compiled)
        traffic = collectives(compiled.as_text() or "")
    return Report(
        mesh=dict(mesh.shape),
        device_kind=devices[0].device_kind,
        memory=memory,
        capacity=None if chip is None else chip.memory,
        overflow=overflow,
        state=bytes_per_device(plan.state),
        model_flops=flops and 3 * flops * config.batch_size / mesh.size,
        collectives=traffic,
        unsplit=unsplit(plan.state.params, mesh, plan.model.axes),
    )


def topology_devices(topology: str) -> list[Any]:
    """Return the devices of a machine by name.

    Args:
      topology: "cpu:8" for eight of this machine's simulated devices, or a TPU slice as "v5e:4x4"; several slices
        joined by the data-centre network as "2*v5e:4x4".

    Raises:
      ValueError: an unknown name, or more CPU devices than JAX was told to simulate.
      RuntimeError: a TPU without the package libtpu.
    """
    match = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", topology)
    if match is None:
        raise ValueError(f"topology {topology!r}: expected such as 'cpu:8', 'v5e:16x16' or '2*v5e:4x4'")
    slices, kind, shape = int(match.group(1) or 1), match.group(2), match.group(3)
    if kind == "cpu":
        count = int(shape) if shape.isdigit() else 0
        devices = jax.devices("cpu")
        if not 0 < count <= len(devices) or slices > 1:
            raise ValueError(
                f"topology {topology!r}: expected cpu:N with N up to the {len(devices)} devices that JAX simulates"
                " (jax_num_cpu_devices)"
            )
        return devices[:count]
    try:
        return list(
            topologies.get_topology_desc(f"{kind}:{shape}", platform="tpu", num_slices=slices).devices
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology {topology!r}: {error}") from error


def format_report(report: Report) -> str:
    """Return the report as text for people."""
    lines = [
        f"devices        {math.prod(report.mesh.values())} x {report.device_kind}",
        "mesh           " + ", ".join(f"{axis}={size}" for axis, size in report.mesh.items()),
        *(f"not split      {line}" for line in report.unsplit),
        f"train state    {_size(report.state)} per device",
    ]
    if report.overflow is not None:
        return "\n".join([*lines, f"does not fit   {report.overflow}"])
    capacity = "what it has is not known" if report.capacity is None else f"it has {_size(report.capacity)}"
    lines.append(
        "memory         "
        + ", ".join(f"{name} {_size(size)}" for name, size in report.memory.items())
        + f"; {capacity}: {'fits' if report.fits else 'DOES NOT FIT'}"
    )
    if report.model_flops is not None:
        lines.append(f"model          {report.model_flops / 1e9:,.1f} GFLOP per device and step")
    lines.append("communication  per device and step" if report.collectives else "communication  none")
    lines += [
        f"  {kind:<22}{traffic.count:>7,} x {_size(traffic.bytes):>14} in all, of {', '.join(traffic.dtypes)}"
        for kind, traffic in report.collectives.items()
    ]
    return "\n".join(lines)


def _size(size: int) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.2f} MiB"
