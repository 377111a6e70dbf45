"""Parts of a model that stay as they are, or learn more slowly."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vir_jax.parallel.sharding import dotted
from vir_jax.runs.checkpoint_reader import CheckpointReader
from vir_jax.runs.config import default_config
from vir_jax.runs.model import model_functions
from vir_jax.training.loop import train
from vir_jax.training.optimizer import make_optimizer
from vir_jax.training.transfer import layer_factors


@pytest.fixture(scope="module")
def params():
    config = default_config()
    config.model.name, config.model.image_size = "vir_pico4", (8, 8)
    return jax.jit(model_functions(config.model, 3).init)(jax.random.key(0))


def step(params, **options):
    optimizer = make_optimizer("sgd", b1=0.0, weight_decay=0.0, **options)
    grads = jax.tree.map(jnp.ones_like, params)
    return optimizer.update(grads, optimizer.init(params), params)


def by_name(tree):
    return {dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_factors_by_hand(params):
    """Of four blocks: the head 1, the last block 1/2, the first 1/16, the stem 1/32."""
    updates = by_name(step(params, layer_decay=0.5)[0])
    for name, update in updates.items():
        if name.startswith("stage.blocks."):
            for block, factor in enumerate((1 / 16, 1 / 8, 1 / 4, 1 / 2)):
                np.testing.assert_array_equal(update[block], -factor)
        else:
            np.testing.assert_array_equal(update, -1 / 32 if name.startswith("stem.") else -1)
    factors = by_name(layer_factors(params, 0.5))
    assert all(
        np.broadcast_shapes(factors[name].shape, x.shape) == x.shape for name, x in by_name(params).items()
    )
    chex.assert_trees_all_equal(step(params, layer_decay=1.0)[0], step(params)[0])


def test_what_is_frozen_does_not_move_and_has_no_state(params):
    names = by_name(params)
    updates, state = step(params, freeze="stem.*, stage.*,readout.norm.*")
    for name, update in by_name(updates).items():
        assert bool(jnp.any(update)) == name.startswith("readout.head."), name
    kept = [name for name in names if any(path.endswith(f".{name}") for path in by_name(state))]
    assert sorted(kept) == ["readout.head.bias", "readout.head.kernel"]


def test_the_norm_is_that_of_what_is_trained(params):
    updates, _ = step(params, freeze="st*", clip_norm=1.0)
    assert jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(updates))) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ("stem", "has 'stem', which no parameter is called; expected names such as"),
        ("readout.heads.*", r"or a part of the model, readout\.\*, stage\.\*, stem\.\*"),
        ("*", "nothing is left to train"),
    ],
)
def test_mistakes_are_explained(params, freeze, message):
    with pytest.raises(ValueError, match=message):
        step(params, freeze=freeze)


@pytest.mark.usefixtures("two_devices")
def test_a_run_with_frozen_and_slower_parts_is_trained_and_resumed(tmp_path, digits_config):
    config = digits_config
    config.optim.freeze, config.optim.layer_decay, config.ema_decay = "stem.*,*.norm1.*", 0.75, 0.0
    config.optim.name, config.optim.b2, config.bce_loss = "lion", 0.99, True
    config.epochs, config.optim.cooldown_epochs = 0.3, 0.0
    metrics = train(config, tmp_path)
    with CheckpointReader(tmp_path) as checkpoints:
        first, last = (
            by_name(checkpoints.restore_params(step, weights="raw"))
            for step in (checkpoints.steps()[0], checkpoints.resolve("last"))
        )
    fresh = by_name(jax.jit(model_functions(config.model, 10).init)(jax.random.key(config.seed)))
    assert first.keys() == fresh.keys()
    for name in fresh:
        frozen = name.startswith("stem.") or ".norm1." in name
        assert np.array_equal(first[name], last[name]) == frozen, name
    assert np.isfinite(metrics["loss"])
    config.epochs = 0.4
    assert train(config, tmp_path)["count"] == metrics["count"]
