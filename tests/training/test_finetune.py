import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vir_jax.runs.checkpoint import Checkpoints
from vir_jax.runs.checkpoint_reader import CheckpointReader
from vir_jax.runs.config import default_config
from vir_jax.runs.metrics import read_metrics
from vir_jax.runs.model import model_functions
from vir_jax.runs.state import TrainState
from vir_jax.training.finetune import fit_params, read_pretrained, start_from
from vir_jax.training.loop import train

DIGITS = [str(digit) for digit in range(10)]


def make_params(name="vir_pico2", image_size=(8, 8), classes=10, seed=0):
    config = default_config()
    config.model.name, config.model.image_size = name, image_size
    return jax.jit(model_functions(config.model, classes).init)(jax.random.key(seed))


def position(params):
    return params["stem"]["position"]["embedding"]


def fit(old, new, head):
    return start_from(fit_params(old, shapes=jax.eval_shape(lambda: new), head=head), new)


def test_a_linformer_at_another_resolution_computes_what_it_would_have_there():
    """With positions of its own it would differ in their resampling alone, which another test looks at."""
    config = default_config()
    config.model.name, config.model.mixer, config.model.position = "vit_pico2", "linformer", "none"
    models = []
    for config.model.image_size in ((8, 8), (12, 16)):
        models.append(model_functions(config.model, 10))
    old, new = (jax.jit(model.init)(jax.random.key(seed)) for seed, model in enumerate(models))
    fitted = fit(old, new, range(10))
    images = jax.random.normal(jax.random.key(2), (2, 12, 16, 3))
    there, here = (jax.jit(model.apply)(p, images) for model, p in zip(models, (old, fitted), strict=True))
    np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-6)


def write_run(folder, config, *, class_names=DIGITS, evaluated=True):
    """A run of one checkpoint; returns its raw and averaged weights."""
    init = jax.jit(model_functions(config.model, len(class_names)).init)
    raw, ema = (init(jax.random.key(seed)) for seed in range(2))
    state = TrainState(step=jnp.int32(7), params=raw, opt_state=optax.sgd(1.0).init(raw), ema=ema)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(state, progress={}, config=config, metadata={"class_names": list(class_names)})
        if evaluated:
            checkpoints.record_evaluation(7, {"top1": 0.5}, score=0.5)
    return raw, ema


def read(config, class_names=DIGITS):
    shapes = jax.eval_shape(model_functions(config.model, len(class_names)).init, jax.random.key(0))
    return read_pretrained(config, shapes=shapes, class_names=class_names)


def test_another_resolution_and_other_classes():
    old, new = make_params(), make_params(image_size=(12, 16), classes=7, seed=1)
    fitted = fit(old, new, None)
    chex.assert_trees_all_equal(fitted["stage"], old["stage"])
    chex.assert_trees_all_equal(fitted["readout"]["head"], new["readout"]["head"])
    chex.assert_shape(position(fitted), (1, 6, 8, 64))
    # A resampled embedding keeps what it says on average.
    np.testing.assert_allclose(position(fitted).mean((1, 2)), position(old).mean((1, 2)), atol=2e-3)


def test_the_same_model_is_taken_as_it_is():
    old = make_params()
    chex.assert_trees_all_equal(fit(old, make_params(seed=1), range(10)), old)


def test_models_that_do_not_fit():
    with pytest.raises(ValueError, match="same family and size"):
        fit(make_params("vir_pico2"), make_params("vir_pico4"), range(10))
    with pytest.raises(ValueError, match="only one of them has"):
        fit(make_params("vit_pico2"), make_params("vir_pico2"), range(10))


@pytest.fixture(scope="module")
def first_run(make_digits_config, tmp_path_factory):
    """A run of 1-D retention."""
    folder = tmp_path_factory.mktemp("first")
    write_run(folder, make_digits_config())
    return folder


@pytest.fixture
def first(first_run, digits_config):
    """The config of a run that starts from it."""
    digits_config.init_from = str(first_run)
    return digits_config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "vit_pico4", "model.name: 'vir_pico4' there, 'vit_pico4' here"),
        ("name", "vir_ti4", "model.name: 'vir_pico4' there, 'vir_ti4' here"),
        ("name", "vir_pico2", "model.name: 'vir_pico4' there, 'vir_pico2' here"),
        ("retention", "2d", "model.retention: '1d' there, '2d' here"),
        ("position", "sincos", "model.position: 'learned' there, 'sincos' here"),
        ("bidirectional", True, "model.bidirectional: False there, True here"),
        ("readout", "average", "model.readout: 'class_token' there, 'average' here"),
    ],
)
def test_weights_of_another_model_are_refused_by_name(first, field, value, message):
    first.model[field] = value
    with pytest.raises(ValueError, match=message):
        read(first)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("retention", "1d"),  # what None stands for
        ("readout", "class_token"),
        ("image_size", (12, 12)),
        ("drop_path_rate", 0.0),
        ("remat", "full"),
        ("dtype", "bfloat16"),
        ("mode", "parallel"),
        ("implementation", "xla"),
    ],
)
def test_what_may_differ(first, field, value):
    first.model[field] = value
    assert "readout.head.kernel" in read(first)


def test_the_head_follows_the_names_of_the_classes(tmp_path, digits_config, caplog):
    names = ["ant", "bee", "cat"]
    _, ema = write_run(tmp_path / "first", digits_config, class_names=names)
    digits_config.init_from = str(tmp_path / "first")
    other_order = read(digits_config, ["cat", "ant", "bee"])
    np.testing.assert_array_equal(
        other_order["readout.head.kernel"], ema["readout"]["head"]["kernel"][:, jnp.array([2, 0, 1])]
    )
    np.testing.assert_array_equal(
        other_order["readout.head.bias"], ema["readout"]["head"]["bias"][jnp.array([2, 0, 1])]
    )
    assert "class 0 was 'ant' and is 'cat'" in caplog.text
    for other in (["ant", "bee", "dog"], ["ant", "bee"]):
        caplog.clear()
        assert not any(name.startswith("readout.head") for name in read(digits_config, other))
        assert "the pretrained model knows 3 classes, now" in caplog.text
        assert "the head starts afresh" in caplog.text


def test_other_colours_are_logged(first, caplog):
    first.data.mean = (0.1, 0.2, 0.3)
    read(first)
    assert "data.mean is (0.1, 0.2, 0.3) here, the pretrained model was trained with (0.5" in caplog.text


def test_a_run_that_was_never_evaluated_gives_its_last_weights_and_says_so(tmp_path, digits_config, caplog):
    _, ema = write_run(tmp_path / "first", digits_config, evaluated=False)
    digits_config.init_from = str(tmp_path / "first")
    kernel = ema["readout"]["head"]["kernel"]
    np.testing.assert_array_equal(read(digits_config)["readout.head.kernel"], kernel)
    assert "was never evaluated: starting from its last weights" in caplog.text


@pytest.mark.usefixtures("two_devices")
def test_a_run_starts_from_another_ones_weights(tmp_path, digits_config):
    _, ema = write_run(tmp_path / "first", digits_config)
    digits_config.init_from = str(tmp_path / "first")
    digits_config.model.image_size = (16, 16)
    digits_config.epochs, digits_config.optim.cooldown_epochs = 0.2, 0.0
    digits_config.optim.lr = digits_config.optim.warmup_lr = digits_config.optim.final_lr = 1e-9
    metrics = train(digits_config, tmp_path / "second")
    assert metrics["count"] == 355
    with CheckpointReader(tmp_path / "second") as second:
        new = second.restore_params(second.resolve("last"), weights="raw")
    for name in ("readout", "stage"):
        chex.assert_trees_all_close(new[name], ema[name], atol=1e-6)
    assert position(new).shape == (1, 4, 4, 64)
    assert jnp.isfinite(metrics["loss"])
    assert read_metrics(tmp_path / "second")
    # Once it has begun it does not need the first one any more.
    (tmp_path / "first").rename(tmp_path / "gone")
    assert train(digits_config, tmp_path / "second") == metrics


def test_a_mistake_in_init_from_claims_no_workdir(tmp_path, first, monkeypatch):
    """Nothing is compiled or written before it is found; the corrected command is no other config."""
    monkeypatch.setattr("vir_jax.training.plan.TrainingPlan.compile", lambda self: pytest.fail("compiled"))
    right = first.init_from
    for wrong in (f"{right}_typo", str(tmp_path)):
        first.init_from = wrong
        with pytest.raises(FileNotFoundError, match="no checkpoints in"):
            train(first, tmp_path / "second")
    first.init_from, first.model.retention = right, "2d"
    with pytest.raises(ValueError, match="those of another model"):
        train(first, tmp_path / "second")
    assert [path.name for path in (tmp_path / "second").iterdir()] == ["lock"]
