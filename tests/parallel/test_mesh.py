from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from vir_jax.parallel.mesh import (
    batch_sharding,
    check_divides,
    local_rows,
    make_mesh,
    mesh_shape,
    over_slices,
    put_batch,
)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((-1, 1, 1), (8, 1, 1)), ((1, -1, 2), (1, 4, 2)), ((2, 2, 2), (2, 2, 2)), ((2, 2, -1), (2, 2, 2))],
)
def test_shape(sizes, shape):
    data, fsdp, tensor = sizes
    assert mesh_shape(8, data=data, fsdp=fsdp, tensor=tensor) == shape


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((-1, 3, 1), "data=-1 x fsdp=3 x tensor=1 does not fit 8 devices"),
        ((4, 1, 1), "data=4 x fsdp=1 x tensor=1 does not fit 8 devices"),
        ((-1, -1, 1), "at most one of them is -1"),
        ((0, 1, 1), "sizes are positive"),
    ],
)
def test_shapes_that_do_not_fit(sizes, message):
    data, fsdp, tensor = sizes
    with pytest.raises(ValueError, match=message):
        mesh_shape(8, data=data, fsdp=fsdp, tensor=tensor)


def test_batches_are_split_over_data_and_fsdp():
    mesh = make_mesh(2, 2, 2)
    assert local_rows(mesh, 8) == tuple(range(8))
    values = np.arange(8 * 3).reshape(8, 3)
    batch = put_batch({"x": values}, mesh, 8)["x"]
    np.testing.assert_array_equal(batch, values)
    assert batch.sharding.shard_shape(batch.shape) == (2, 3)


def test_rows_of_a_process_need_not_be_in_one_piece(monkeypatch):
    """As on a ring of chips: the devices of this process hold the first and the last quarter."""
    mesh = make_mesh(4, devices=jax.devices()[:4])
    first, *_, last = mesh.devices.flat
    everyone = batch_sharding(mesh).devices_indices_map((8,))
    own = {device: everyone[device] for device in (first, last)}
    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", lambda self, shape: own)
    assert local_rows(mesh, 8) == (0, 1, 6, 7)


def fake_devices(count, *, per_slice):
    """Enough of devices for laying out a mesh."""
    return [
        mock.Mock(spec=jax.Device, platform="gpu", device_kind="fake", id=i, slice_index=i // per_slice)
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("sizes", "over"), [((4, 2, 2), (2, 1, 1)), ((1, 8, 2), (1, 2, 1)), ((2, 4, 2), (2, 1, 1))]
)
def test_slices_are_crossed_by_data_then_fsdp(sizes, over):
    assert over_slices(sizes, 2) == over
    mesh = make_mesh(*sizes, devices=fake_devices(16, per_slice=8))
    assert mesh.devices.shape == sizes
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    crossed = over.index(2)
    for half in (0, 1):
        part = np.split(slices, 2, axis=crossed)[half]
        assert (part == half).all()


def test_the_tensor_axis_stays_inside_a_slice():
    with pytest.raises(ValueError, match=r"does not fit 4 slices .* must be a multiple of 4"):
        make_mesh(2, 1, 4, devices=fake_devices(8, per_slice=2))


def test_batches_that_the_mesh_does_not_divide():
    with pytest.raises(ValueError, match=r"config.batch_size is 12.* multiple of data \* fsdp = 8$"):
        check_divides("config.batch_size", 12, make_mesh())
    with pytest.raises(ValueError, match="times accumulation_steps = 4"):
        check_divides("config.batch_size", 16, make_mesh(), slices=4)
    check_divides("config.batch_size", 12, make_mesh(1, devices=jax.devices()[:1]))
