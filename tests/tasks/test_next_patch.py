"""The task of the next patch: what is compared with what, what it refuses, and a classifier that starts from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.tasks.test_tasks import without_mixing
from vir_jax.data import open_source
from vir_jax.evaluation import evaluate_workdir
from vir_jax.models import create_model
from vir_jax.models.pixels import normalize
from vir_jax.probe import extract
from vir_jax.runs.load import load_run
from vir_jax.runs.metrics import read_metrics
from vir_jax.runs.validate import validate
from vir_jax.tasks import make_task
from vir_jax.tasks.next_patch import normalized_patches
from vir_jax.training.loop import train


def of_patches(config):
    config = without_mixing(config)
    config.task, config.model.name, config.model.readout = "next_patch", "vir_pico2", "every_token"
    config.model.layer_scale = None
    return config


def test_patches_are_cut_in_raster_order_and_normalised():
    images = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)
    found = normalized_patches(jnp.asarray(images), 2)
    assert found.shape == (2, 6, 12)
    for n in range(6):
        y, x = divmod(n, 3)
        patch = images[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].reshape(2, -1)
        expected = (patch - patch.mean(1, keepdims=True)) / patch.std(1, keepdims=True)
        np.testing.assert_allclose(found[:, n], expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(normalized_patches(jnp.full((1, 2, 2, 3), 0.25), 2), 0)


def test_each_token_is_compared_with_the_next_patch(digits_config):
    task = make_task(of_patches(digits_config), "01")
    pixels = np.random.default_rng(0).integers(256, size=(3, 8, 8, 3), dtype=np.uint8)
    batch = {"image": jnp.asarray(pixels), "label": jnp.zeros(3, jnp.int32)}
    _, targets = task.training_inputs(batch, jax.random.key(0))
    right = jnp.roll(targets, -1, axis=1).at[:, -1].set(100.0)  # Of the last token nothing is asked.
    assert float(task.loss(right, targets)[0]) == 0
    np.testing.assert_array_equal(task.evaluate(right, batch)["squared_error"], 0)
    loss, metrics = task.loss(jnp.zeros_like(targets), targets)
    assert float(loss) == float(metrics["squared_error"]) == pytest.approx(1.0, rel=1e-3)


def test_no_token_sees_the_patch_that_it_predicts():
    model = create_model(
        "vir_pico2", num_classes=12, rngs=nnx.Rngs(0), image_size=8, readout="every_token", layer_scale=None
    )
    model.readout.head.kernel[...] = jax.random.normal(jax.random.key(0), model.readout.head.kernel.shape)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 8, 3)), jnp.float32)
    for mode in model.modes:
        before, after = (np.asarray(model(x, mode=mode)) for x in (images, images.at[0, 2, 2].add(1.0)))
        assert before.shape == (1, 16, 12)
        changed = np.any(before != after, axis=(0, 2))
        np.testing.assert_array_equal(changed, np.arange(16) >= 5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("readout", None, "config.model.readout is None; expected 'every_token'"),
        ("mixer", "softmax", "config.model.mixer is 'softmax'; expected a causal one, such as 'retention'"),
        ("bidirectional", True, "config.model.bidirectional is True; expected False"),
        ("flips", True, "config.model.flips is True; expected False"),
        ("directions", 2, "config.model.directions is 2; expected 1"),
        ("stem", "conv", "config.model.stem is 'conv'; expected 'linear'"),
    ],
)
def test_models_that_see_the_next_patch(digits_config, field, value, message):
    config = of_patches(digits_config)
    config.model[field] = value
    with pytest.raises(ValueError, match=message):
        validate(config)


@pytest.mark.usefixtures("two_devices")
def test_a_classifier_starts_from_its_blocks(digits_config, tmp_path):
    config = of_patches(digits_config)
    config.eval_every, config.optim.lr = 10, 3e-3
    trained = train(config, tmp_path / "patches")
    assert trained["squared_error"] < 0.9  # Of a prediction of nothing it is 1.
    assert "train/squared_error" in read_metrics(tmp_path / "patches")[0]
    for result in evaluate_workdir(tmp_path / "patches", mode="all").values():
        assert result.metrics["squared_error"] == pytest.approx(trained["squared_error"], rel=1e-4)
    pretrained = load_run(tmp_path / "patches", "best").params

    probed = extract(load_run(tmp_path / "patches"), open_source("digits", "test"), ["blocks.1.tokens"])
    assert probed["blocks.1.tokens"].values.shape == (355, 64)
    images = jnp.asarray(open_source("digits", "test")[9]["image"][None])
    tokens = load_run(tmp_path / "patches").model.intermediates(
        normalize(images, config.data.mean, config.data.std), ["blocks.1.tokens"]
    )
    # Of the patches: the class token, which comes last, is not read in pretraining.
    np.testing.assert_allclose(
        probed["blocks.1.tokens"].values[9],
        tokens["blocks.1.tokens"][0, :-1].mean(axis=0),
        rtol=1e-4,
        atol=1e-5,
    )

    config.task, config.model.readout, config.init_from = (
        "classification",
        "average",
        str(tmp_path / "patches"),
    )
    config.epochs, config.optim.lr, config.optim.final_lr, config.ema_decay = 0.1, 1e-9, 0.0, 0.0
    config.optim.warmup_epochs, config.optim.cooldown_epochs, config.optim.warmup_lr = 0.0, 0.0, 1e-6
    assert "top1" in train(config, tmp_path / "classes")
    started = load_run(tmp_path / "classes", "last").params
    for part in ("stem", "stage"):
        jax.tree.map(
            lambda new, old: np.testing.assert_allclose(new, old, atol=1e-6), started[part], pretrained[part]
        )
    assert started["readout"]["head"]["kernel"].shape == (64, 10)
