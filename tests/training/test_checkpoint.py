import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vir_jax.training.checkpoint import Checkpoints
from vir_jax.training.config import default_config
from vir_jax.training.mesh import make_mesh
from vir_jax.training.state import create_train_state

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_state(step=0, ema=True):
    params = {"blocks": {0: {"kernel": jnp.arange(32.0).reshape(8, 4)}, 1: {"kernel": jnp.ones((8, 4))}}}
    state = jax.jit(lambda params: create_train_state(params, OPTIMIZER, ema=ema))(params)
    return dataclasses.replace(state, step=jnp.int32(step))


def shapes(state, mesh, spec):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec if x.ndim == 2 else PartitionSpec())
        ),
        state,
    )


def save(checkpoints, state, **kwargs):
    checkpoints.save(
        state, progress={"data": str(int(state.step))}, config=default_config(), metadata={"a": 1}, **kwargs
    )


def test_newest_and_best_are_kept(tmp_path):
    top1 = {2: 0.5, 4: 0.9, 8: 0.7}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        for step in range(1, 10):
            save(checkpoints, make_state(step), metrics={"top1": top1[step]} if step in top1 else None)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest_step() == checkpoints.resolve("last") == 9
        assert checkpoints.resolve("best") == 4
        assert checkpoints.resolve("8") == 8
        assert checkpoints.metrics(4) == {"top1": 0.9}
        assert checkpoints.metrics(9) is None
        with pytest.raises(ValueError, match=r"no checkpoint '3' .* steps there: \[4, 8, 9\]"):
            checkpoints.resolve("3")
        with pytest.raises(ValueError, match="expected 'last', 'best' or the number of a step"):
            checkpoints.resolve("newest")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ((2, 2, 2), (1, 1, 1)),
        ((1, 1, 1), (2, 2, 2)),
        ((1, 8, 1), (2, 1, 4)),
    ],
)
def test_restored_on_another_mesh(tmp_path, written, read):
    def place(sizes):
        return make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])

    state = make_state(3)
    sharded = jax.tree.map(
        lambda x, s: jax.device_put(x, s.sharding),
        state,
        shapes(state, place(written), PartitionSpec("fsdp")),
    )
    target = shapes(state, place(read), PartitionSpec("tensor"))
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, sharded)
    with Checkpoints(tmp_path) as checkpoints:
        restored, progress = checkpoints.restore(target, 3)
    assert progress == {"data": "3"}
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, restored), jax.tree.map(np.asarray, state))
    chex.assert_trees_all_equal_structs(restored, state)
    assert restored.params["blocks"][0]["kernel"].sharding == target.params["blocks"][0]["kernel"].sharding


def test_weights_alone(tmp_path):
    state = make_state(1)
    state = dataclasses.replace(state, ema=jax.tree.map(lambda x: x + 1, state.params))
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, state)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.has_ema(1)
        config, metadata = checkpoints.restore_config(1)
        for weights, expected in (("raw", state.params), ("ema", state.ema)):
            params = checkpoints.restore_params(1, weights=weights)
            np.testing.assert_array_equal(params["blocks"]["0"]["kernel"], expected["blocks"][0]["kernel"])
        with pytest.raises(ValueError, match="'average': expected one of"):
            checkpoints.restore_params(1, weights="average")
    assert metadata == {"a": 1}
    assert config.model.name == default_config().model.name


def test_no_average_kept(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, make_state(1, ema=False))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert not checkpoints.has_ema(1)
        with pytest.raises(ValueError, match="holds no EMA: the run had ema_decay = 0"):
            checkpoints.restore_params(1, weights="ema")


def test_no_checkpoints_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoints in"):
        Checkpoints(tmp_path / "absent", read_only=True)
