import jax
import numpy as np
import pytest

from vir_jax.training.mesh import (
    check_divides,
    make_mesh,
    mesh_shape,
    part_of_process,
    process_part,
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
    assert process_part(mesh) == (0, 1)
    values = np.arange(8 * 3).reshape(8, 3)
    batch = put_batch({"x": values}, mesh, parts=1)["x"]
    np.testing.assert_array_equal(batch, values)
    assert batch.sharding.shard_shape(batch.shape) == (2, 3)


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ({0: {0, 1}, 1: {2, 3}}, [(0, 2), (1, 2)]),
        ({0: {0, 3}, 1: {1, 2}}, [(0, 2), (1, 2)]),  # Laid out as a ring over the chips.
        ({0: {0}, 1: {0}, 2: {1}, 3: {1}}, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # Tensor over two processes.
    ],
)
def test_parts_of_processes(rows, parts):
    shards = len(set().union(*rows.values()))
    assert [part_of_process(rows, process, shards) for process in rows] == parts


@pytest.mark.parametrize("rows", [{0: {0, 1}, 1: {1, 2}}, {0: {0, 1, 2}, 1: {3}}])
def test_parts_that_overlap_or_differ_in_size(rows):
    with pytest.raises(ValueError, match="overlapping or unequal parts of a batch"):
        part_of_process(rows, 0, len(set().union(*rows.values())))


def test_batches_that_the_mesh_does_not_divide():
    with pytest.raises(ValueError, match=r"config.batch_size is 12.* multiple of data \* fsdp = 8$"):
        check_divides("config.batch_size", 12, make_mesh())
    with pytest.raises(ValueError, match="times accumulation_steps = 4"):
        check_divides("config.batch_size", 16, make_mesh(), slices=4)
    check_divides("config.batch_size", 12, make_mesh(1, devices=jax.devices()[:1]))
