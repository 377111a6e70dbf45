"""The device mesh: which devices split the batch, the parameters and the heads."""

import bisect
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Return a mesh with the axes data, fsdp and tensor; one size may be -1 and takes the devices left over.

    Devices are laid out by the network: neighbours on the tensor axis are neighbours on the chip's links, and the data
    axis, then fsdp, crosses from one slice (TPUs) or node (GPUs) to the next.

    Args:
      data: devices that split the batch alone.
      fsdp: devices that split the batch, the parameters and the optimiser state.
      tensor: devices that split heads and hidden units.
      devices: all devices of all processes by default.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or the tensor axis would have to cross slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_shape(len(devices), data=data, fsdp=fsdp, tensor=tensor)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        layout = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        over = over_slices(sizes, slices)
        within = [size // factor for size, factor in zip(sizes, over, strict=True)]
        layout = mesh_utils.create_hybrid_device_mesh(within, over, devices, allow_split_physical_axes=True)
    return Mesh(layout, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def over_slices(sizes: tuple[int, int, int], slices: int) -> tuple[int, int, int]:
    """Return how many slices each mesh axis crosses: data as many as it can, then fsdp; tensor stays inside a slice."""
    data, fsdp, tensor = sizes
    data_over = math.gcd(data, slices)
    fsdp_over = math.gcd(fsdp, slices // data_over)
    if data_over * fsdp_over != slices:
        raise ValueError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor} does not fit {slices} slices (or nodes): data * fsdp"
            f" must be a multiple of {slices}, as the tensor axis does not cross the network between them"
        )
    return data_over, fsdp_over, 1


def mesh_shape(num_devices: int, *, data: int, fsdp: int, tensor: int) -> tuple[int, int, int]:
    """Return the sizes of the axes, with -1 filled in; see `make_mesh`."""
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
    """Split the leading axis of a batch over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Return into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_divides(name: str, size: int, mesh: Mesh, *, slices: int = 1) -> None:
    """Check that the mesh divides a batch, each of its `slices`.

    Raises:
      ValueError: with the numbers, under the name that the user knows the size by.
    """
    shards = batch_shards(mesh)
    if size % (shards * slices):
        raise ValueError(
            f"{name} is {size}, which the mesh {dict(mesh.shape)} does not divide: it must be a multiple of"
            f" data * fsdp = {shards}" + (f" times accumulation_steps = {slices}" if slices > 1 else "")
        )


@functools.cache
def local_rows(mesh: Mesh, batch_size: int) -> tuple[int, ...]:
    """Return the rows of a global batch that the devices of this process hold, ascending.

    They need not be in one piece, as devices are laid out by the network and not by process; and processes may hold
    the same rows, where a tensor axis spans them.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return tuple(sorted({row for index in indices.values() for row in _rows(index, batch_size)}))


def _rows(index: Any, batch_size: int) -> range:
    """Return the rows that an index (a tuple of slices) of an array takes."""
    return range(*index[0].indices(batch_size))


def put_batch(batch: Mapping[str, object], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """Assemble a global batch from this process's `local_rows` of it; nothing moves between processes.

    Args:
      batch: NumPy arrays, their first axis the local rows.
      mesh: over which batches are split.
      batch_size: of the global batch.
    """
    sharding = batch_sharding(mesh)
    rows = local_rows(mesh, batch_size)

    def put(local: np.ndarray) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            wanted = _rows(index, batch_size)
            first = bisect.bisect_left(rows, wanted.start)
            return local[first : first + len(wanted)]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, shard)

    return {name: put(np.asarray(local)) for name, local in batch.items()}
