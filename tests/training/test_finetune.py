import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vir_jax.runs.checkpoint import Checkpoints
from vir_jax.runs.config import default_config
from vir_jax.runs.model import model_functions
from vir_jax.runs.state import TrainState
from vir_jax.training.finetune import fit_params
from vir_jax.training.loop import train


def make_params(name="vir_mu2", image_size=(8, 8), classes=10, seed=0):
    config = default_config()
    config.model.name, config.model.image_size = name, image_size
    return jax.jit(model_functions(config.model, classes).init)(jax.random.key(seed))


def test_another_resolution_and_other_classes():
    old, new = make_params(), make_params(image_size=(12, 16), classes=7, seed=1)
    fitted = fit_params(old, fresh=new, keep_head=False)
    chex.assert_trees_all_equal(fitted["blocks"], old["blocks"])
    chex.assert_trees_all_equal(fitted["head"], new["head"])
    chex.assert_shape(fitted["position_embedding"], (1, 6, 8, 64))
    # A resampled embedding keeps what it says on average.
    np.testing.assert_allclose(
        fitted["position_embedding"].mean((1, 2)), old["position_embedding"].mean((1, 2)), atol=2e-3
    )


def test_the_same_model_is_taken_as_it_is():
    old = make_params()
    chex.assert_trees_all_equal(fit_params(old, fresh=make_params(seed=1), keep_head=True), old)


def test_models_that_do_not_fit():
    with pytest.raises(ValueError, match="same family and size"):
        fit_params(make_params("vir_mu2"), fresh=make_params("vir_mu4"), keep_head=True)
    with pytest.raises(ValueError, match="only one of them has"):
        fit_params(make_params("vit_mu2"), fresh=make_params("vir_mu2"), keep_head=True)


@pytest.mark.usefixtures("two_devices")
def test_a_run_starts_from_another_ones_weights(tmp_path, digits_config):
    raw, ema = make_params("vir_mu4"), make_params("vir_mu4", seed=1)
    state = TrainState(step=jnp.int32(7), params=raw, opt_state=optax.sgd(1.0).init(raw), ema=ema)
    with Checkpoints(tmp_path / "first") as first:
        metadata = {"class_names": [str(digit) for digit in range(10)]}
        first.save(state, progress={}, config=digits_config, metadata=metadata)
        first.record_evaluation(7, {"top1": 0.5}, score=0.5)

    digits_config.init_from = str(tmp_path / "first")
    digits_config.model.image_size = (16, 16)
    digits_config.epochs, digits_config.optim.cooldown_epochs = 0.2, 0.0
    digits_config.optim.lr = digits_config.optim.warmup_lr = digits_config.optim.final_lr = 1e-9
    metrics = train(digits_config, tmp_path / "second")
    assert metrics["count"] == 355
    with Checkpoints(tmp_path / "second", read_only=True) as second:
        new = second.restore_params(second.resolve("last"), weights="raw")
    for name in ("head", "blocks"):
        chex.assert_trees_all_close(new[name], ema[name], atol=1e-6)
    assert new["position_embedding"].shape == (1, 4, 4, 64)
    assert jnp.isfinite(metrics["loss"])
