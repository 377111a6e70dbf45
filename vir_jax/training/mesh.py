"""The device mesh: which devices split the batch, the parameters and the heads."""

import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: list[jax.Device] | None = None
) -> Mesh:
    """A mesh with the axes data, fsdp and tensor; one size may be -1 and takes the devices left over.

    Args:
      data: devices that split the batch alone.
      fsdp: devices that split the batch, the parameters and the optimiser state.
      tensor: devices that split heads and hidden units.
      devices: all devices of all processes by default.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_shape(len(devices), data=data, fsdp=fsdp, tensor=tensor)
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_shape(num_devices: int, *, data: int, fsdp: int, tensor: int) -> tuple[int, int, int]:
    """The sizes of the axes, with -1 filled in; see `make_mesh`."""
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    described = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh {described}: sizes are positive, and at most one of them is -1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and num_devices % fixed == 0:
        sizes[free[0]] = num_devices // fixed
    elif fixed != num_devices:
        raise ValueError(
            f"mesh {described} does not fit {num_devices} devices: the sizes must multiply to that number,"
            " or divide it where one of them is -1"
        )
    return sizes["data"], sizes["fsdp"], sizes["tensor"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis of a batch over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_divides(name: str, size: int, mesh: Mesh, *, slices: int = 1) -> None:
    """Checks that the mesh divides a batch, each of its `slices`.

    Raises:
      ValueError: with the numbers, under the name that the user knows the size by.
    """
    shards = batch_shards(mesh)
    if size % (shards * slices):
        raise ValueError(
            f"{name} is {size}, which the mesh {dict(mesh.shape)} does not divide: it must be a multiple of"
            f" data * fsdp = {shards}" + (f" times accumulation_steps = {slices}" if slices > 1 else "")
        )


def process_part(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process feeds, and how many parts there are."""
    shards = batch_shards(mesh)
    indices = batch_sharding(mesh).devices_indices_map((shards,))
    rows: dict[int, set[int]] = {}
    for device in mesh.devices.flat:
        (row,) = indices[device]
        rows.setdefault(device.process_index, set()).add(row.indices(shards)[0])
    return part_of_process(rows, jax.process_index(), shards)


def part_of_process(rows: Mapping[int, set[int]], process: int, shards: int) -> tuple[int, int]:
    """(index of a process's part, number of parts), from the shards of a batch that each process holds.

    A part need not be in one piece: devices are laid out by the network, not by process. Processes that hold the
    same shards (a tensor axis that spans them) feed the same part.

    Raises:
      ValueError: the parts overlap or are of unequal size, so that no process could feed its own.
    """
    parts = sorted({tuple(sorted(part)) for part in rows.values()})
    if (
        sorted(row for part in parts for row in part) != list(range(shards))
        or len({len(p) for p in parts}) > 1
    ):
        raise ValueError(
            f"the processes hold overlapping or unequal parts of a batch, {parts}; choose mesh axis sizes that give"
            " each process whole shards of its own"
        )
    return parts.index(tuple(sorted(rows[process]))), len(parts)


def put_batch(batch: Mapping[str, object], mesh: Mesh, parts: int) -> dict[str, jax.Array]:
    """Assembles the global batch from this process's part (NumPy arrays); nothing moves between processes.

    Args:
      batch: this process's part, rows in the order of its shards.
      mesh: over which batches are split.
      parts: of `process_part`.
    """
    sharding = batch_sharding(mesh)

    def put(local: np.ndarray) -> jax.Array:
        shape = (local.shape[0] * parts, *local.shape[1:])
        return jax.make_array_from_process_local_data(sharding, local, shape)

    return {name: put(np.asarray(local)) for name, local in batch.items()}
