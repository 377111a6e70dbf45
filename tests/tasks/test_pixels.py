"""The task of pixels: what it counts, what it refuses, and a run of it from the first step to a picture."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import completion
from tests.tasks.test_tasks import without_mixing
from vir_jax.data import open_source
from vir_jax.evaluation import ModesDisagreeError, evaluate_workdir
from vir_jax.generation import log_likelihood
from vir_jax.generation import workdir as generation_workdir
from vir_jax.generation.workdir import draw_samples, generate_images, save_grid
from vir_jax.inference.predict import predict_files
from vir_jax.inference.recurrent import stream
from vir_jax.inspection.workdir import load_model
from vir_jax.models.pixels import to_levels
from vir_jax.runs.checkpoint_reader import CheckpointReader
from vir_jax.runs.load import load_run
from vir_jax.runs.metrics import ProgressBar, read_metrics
from vir_jax.runs.model import ModelFunctions
from vir_jax.runs.validate import validate
from vir_jax.tasks import make_task
from vir_jax.training.loop import train

ROOT = Path(__file__).parents[2]
CLASSES = tuple("0123456789")


def of_pixels(config):
    """The config of a run on digits, of 17 levels."""
    config = without_mixing(config)
    config.task, config.model.name, config.model.stem = "pixels", "vir_pico1", "pixels"
    config.model.levels, config.model.local_context, config.model.layer_scale = 17, 1, None
    for field, off in (
        ("crop", "none"),
        ("crop_padding", 4),
        ("hflip", 0.0),
        ("randaugment_ops", 0),
        ("erase", 0.0),
    ):
        config.augment[field] = off
    return config


@pytest.fixture
def config(digits_config):
    return of_pixels(digits_config)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, make_digits_config, two_devices_throughout):
    config = of_pixels(make_digits_config())
    config.epochs, config.optim.lr, config.eval_every = 1.5, 3e-3, 10
    folder = tmp_path_factory.mktemp("pixels")
    config.sample_images = 4
    train(config, folder, draw=draw_samples)
    return folder


# --- What it counts ---


@pytest.mark.parametrize(("levels", "channels", "mixtures"), [(17, 1, None), (256, 3, 4), (8, 3, 2)])
def test_bits_are_counted_for_every_channel_of_every_pixel(config, levels, channels, mixtures):
    config.model.levels, config.model.channels, config.model.mixtures = levels, channels, mixtures
    validate(config)
    task = make_task(config, CLASSES)
    pixels = np.random.default_rng(0).integers(256, size=(4, 3, 5, 3), dtype=np.uint8)
    batch = {"image": jnp.asarray(pixels)}
    outputs = jnp.asarray(np.random.default_rng(1).normal(size=(4, 15, task.num_outputs)), jnp.float32)
    symbols = to_levels(batch["image"], levels, channels)
    nats = -task.likelihood.log_probability(outputs, symbols.reshape(4, 15, channels))
    expected = np.asarray(nats).sum(axis=1) / np.log(2) / (15 * channels)
    np.testing.assert_allclose(task.evaluate(outputs, batch)["bits_per_dim"], expected, rtol=1e-6)
    inputs, targets = task.training_inputs(batch, jax.random.key(0))
    np.testing.assert_array_equal(inputs, symbols)
    loss, metrics = task.loss(outputs, targets)
    assert float(loss) == float(metrics["bits_per_dim"]) == pytest.approx(expected.mean(), rel=1e-6)


def test_digits_are_their_levels(config):
    """scikit-learn's own 0 .. 16, exactly."""
    task, source = make_task(config, CLASSES), open_source("digits", "test")
    images = np.stack([source[index]["image"] for index in range(len(source))])
    levels = np.asarray(task.inputs({"image": jnp.asarray(images)}))[..., 0]
    np.testing.assert_array_equal(np.round(levels * (255 / 16)), images[..., 0])
    assert set(np.unique(levels)) == set(range(17))


def test_lower_is_better(config):
    task = make_task(config, CLASSES)
    assert task.score({"bits_per_dim": 2.0}) > task.score({"bits_per_dim": 3.0})
    assert task.columns({"bits_per_dim": 2.0}) == {"bits/dim": "2.0000"}


# --- What it refuses ---


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "augment.crop",
            "pad",
            r"config.augment.crop is 'pad', which changes the density.*; expected 'none'",
        ),
        ("augment.randaugment_ops", 2, "config.augment.randaugment_ops is 2, which changes the density"),
        ("augment.color_jitter", 0.4, "config.augment.color_jitter is 0.4, which changes the density"),
        ("augment.erase", 0.25, "config.augment.erase is 0.25, which changes the density"),
        ("label_smoothing", 0.1, "config.label_smoothing is 0.1, which the task 'pixels' does not use"),
        ("mixing.mixup_alpha", 0.8, "config.mixing.mixup_alpha is 0.8, which the task 'pixels' does not use"),
        ("model.stem", "linear", "levels=17 is of models of pixels"),
        ("model.levels", None, "config.model.levels=None; expected an integer from 2 to 256"),
        ("model.channels", 3, "config.model.channels=3 needs a mixture of logistics"),
        ("model.mixer", "softmax", "a token would see the pixel that it predicts"),
        ("model.flips", True, "flips=True: a token would see the pixel that it predicts"),
        ("model.directions", 2, "directions=2: a token would see the pixel that it predicts"),
    ],
)
def test_what_would_be_another_density(config, field, value, message):
    section, _, name = field.rpartition(".")
    (config[section] if section else config)[name] = value
    with pytest.raises(ValueError, match=message):
        validate(config)


def test_models_of_patches_learn_no_pixels(digits_config):
    config = without_mixing(digits_config)
    config.task = "pixels"
    with pytest.raises(
        ValueError, match=r"config\.model\.stem is None; expected 'pixels' for the task 'pixels'"
    ):
        validate(config)


# --- A run ---


def test_it_learns_and_the_lowest_is_the_best(workdir):
    metrics = [line for line in read_metrics(workdir) if "eval/bits_per_dim" in line]
    values = {line["step"]: line["eval/bits_per_dim"] for line in metrics}
    assert min(values.values()) < 3.0 < np.log2(17)
    with CheckpointReader(workdir) as checkpoints:
        assert checkpoints.resolve("best") == min(values, key=values.__getitem__)


def test_the_writers_are_shown_the_first_batch_and_samples_after_each_evaluation(workdir):
    events = EventAccumulator(str(workdir / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    (batch,), samples = (events.Images(tag) for tag in ("data/first_batch", "eval/samples"))
    assert (batch.step, batch.width) == (1, 8 * 65 - 1)
    assert [image.step for image in samples] == [10, 20, 30, read_metrics(workdir)[-1]["step"]]
    assert {image.width for image in samples} == {2 * 65 - 1}
    assert len({image.encoded_image_string for image in samples}) == 4  # The model learns.


def test_every_mode_gives_the_bits_of_the_images_themselves(workdir):
    """355 images in ragged batches on eight devices, against the same images one by one on one."""
    results = evaluate_workdir(workdir, mode="all")
    assert list(results) == ["parallel", "recurrent", "chunkwise"]
    source, run = open_source("digits", "test"), load_run(workdir, "last")
    images = jnp.asarray(np.stack([source[index]["image"] for index in range(len(source))]))
    nats = np.asarray(log_likelihood(run.model, to_levels(images, 17, 1), "generation"), np.float64)
    for result in results.values():
        assert result.metrics["count"] == 355
        assert result.metrics["bits_per_dim"] == pytest.approx(-nats.mean() / np.log(2), rel=1e-5)
        assert result.difference < 1e-5
    assert run.metrics["bits_per_dim"] == pytest.approx(results["parallel"].metrics["bits_per_dim"], rel=1e-5)


def test_modes_that_disagree_fail(workdir, monkeypatch):
    apply = ModelFunctions.apply

    def slightly_wrong(self, params, images, key=None, *, mode=None):
        return apply(self, params, images, key, mode=mode) * (1.01 if mode == "recurrent" else 1.0)

    monkeypatch.setattr(ModelFunctions, "apply", slightly_wrong)
    with pytest.raises(ModesDisagreeError, match=r"(?s)bits/dim.*parallel.*recurrent.*chunkwise"):
        evaluate_workdir(workdir, mode="all")


def test_a_run_starts_from_another_with_its_head(workdir, config, tmp_path):
    config.init_from, config.epochs, config.optim.lr = str(workdir), 0.1, 1e-6
    config.optim.warmup_epochs, config.optim.final_lr, config.optim.cooldown_epochs = 0.0, 0.0, 0.0
    config.optim.warmup_lr = 1e-6
    before = load_run(workdir, "best").metrics["bits_per_dim"]
    assert train(config, tmp_path)["bits_per_dim"] == pytest.approx(before, abs=0.01)


def test_it_names_no_classes(workdir):
    with pytest.raises(ValueError, match="task is Pixels, whose outputs are no classes"):
        next(predict_files(workdir, [ROOT / "docs/figures/widths.png"], streamed=True))
    with pytest.raises(ValueError, match="task is Pixels, whose outputs are no classes"):
        load_model(workdir)
    run = load_run(workdir, "last")
    with pytest.raises(
        ValueError, match=r"predicts each of them from those before.*Use `vir_jax.generation`"
    ):
        stream(run.model, jnp.zeros((1, 8, 8, 3)))


# --- Pictures ---


def test_images_of_a_run(workdir, tmp_path):
    images, bits = generate_images(workdir, 3, prompt="7", rows=5)
    source = open_source("digits", "test")
    assert images.shape == (3, 8, 8, 3)
    np.testing.assert_array_equal(images[:, :5], np.broadcast_to(source[7]["image"][:5], (3, 5, 8, 3)))
    run = load_run(workdir, "last")
    nats = np.asarray(log_likelihood(run.model, to_levels(jnp.asarray(images), 17, 1)))[:, 5:].sum(
        axis=(1, 2)
    )
    np.testing.assert_allclose(bits, -nats / np.log(2) / 24, rtol=1e-4)

    Image.fromarray(source[7]["image"]).save(tmp_path / "seven.png")
    from_file, _ = generate_images(workdir, 2, prompt=str(tmp_path / "seven.png"), rows=5)
    np.testing.assert_array_equal(from_file, images[:2])


def test_an_image_is_the_same_whatever_their_number(workdir, monkeypatch):
    """In batches, one after the other; progress is told for every row that is drawn."""
    together, bits = generate_images(workdir, 5, prompt="7", rows=5, seed=3)
    told = []

    class Bar(ProgressBar):
        def __init__(self, *, total, **options):
            told.append(total)
            super().__init__(total=total, **options)

        def update(self, n=1):
            told.append(n)

    monkeypatch.setattr(generation_workdir, "BATCH_SIZE", 2)
    monkeypatch.setattr(generation_workdir, "ProgressBar", Bar)
    apart, bits_apart = generate_images(workdir, 5, prompt="7", rows=5, seed=3)
    np.testing.assert_array_equal(apart, together)
    np.testing.assert_allclose(bits_apart, bits, rtol=1e-5)
    assert told == [9, *[1] * 9]
    other, _ = generate_images(workdir, 2, prompt="7", rows=5, seed=4)
    assert (other != together[:2]).any()


def test_a_grid(tmp_path):
    images = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.full((8, 8, 3), 50, np.uint8)
    save_grid(images, tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 65 - 1, 2 * 65 - 1, 3)
    assert (grid[:64, :64] == 0).all()
    assert (grid[:64, 65:] == 50).all()
    assert (grid[65:, :64] == 100).all()
    assert (grid[64] == 255).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "large.png"}, r"large.png has 9 x 8 pixels; expected 8 x 8, as the model draws"),
        (
            {"prompt": "odd.png"},
            r"odd.png has the colour \(1, 1, 1\) in row 2, column 3, which is none of the 17 levels",
        ),
        ({"prompt": "red.png"}, r"red.png has the colour \(255, 0, 0\) in row 0, column 0"),
        ({"prompt": "355"}, "prompt 355: the run's evaluation data has examples 0 to 354"),
        ({"prompt": "7", "rows": 8}, "rows is 8; expected 1 to 7 of the prompt's 8"),
        ({"rows": 4}, "rows is 4, and there is no prompt"),
        ({"top_k": 18}, "top_k is 18; expected 1 to 17, the levels of the model"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a positive number"),
        ({"num": 0}, "num is 0; expected at least 1"),
    ],
)
def test_wrong_arguments(workdir, tmp_path, options, message):
    image = np.zeros((8, 8, 3), np.uint8)
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(tmp_path / "large.png")
    odd, red = image.copy(), image.copy()
    odd[2, 3], red[0, 0, 0] = 1, 255
    Image.fromarray(odd).save(tmp_path / "odd.png")
    Image.fromarray(red).save(tmp_path / "red.png")
    if options.get("prompt", "").endswith(".png"):
        options = {**options, "prompt": str(tmp_path / options["prompt"])}
    with pytest.raises(ValueError, match=message):
        generate_images(workdir, **({"num": 1} | options))


# --- Completions of a whole split ---


def test_completions_are_shown_to_a_classifier(workdir, monkeypatch, tmp_path):
    """One that knows an image by its upper half, of which nothing is changed."""
    run, source = load_run(workdir, "last"), open_source("digits", "test")
    real = np.stack([source[index]["image"] for index in range(len(source))])
    shown = []

    def is_right(_, colours, labels):
        shown.append(colours)
        return np.all(colours[:, :3] == real[:, :3], axis=(1, 2, 3))

    monkeypatch.setattr(completion, "is_right", is_right)
    records, bits, completed = completion.measure(run, run, 3, 2)
    assert [record.top1 for record in records] == [1.0] * 4
    assert records[1].spread == 0
    first, second, whole, others, black = shown
    np.testing.assert_array_equal(whole, real)
    assert (first[:, 3:] != second[:, 3:]).any()
    lower_sums = (np.sort(images[:, 3:].sum(axis=(1, 2, 3))) for images in (others, real))
    np.testing.assert_array_equal(*lower_sums)
    assert (black[:, 3:] == 0).all()
    assert bits.whole[0] == pytest.approx(run.metrics["bits_per_dim"], rel=1e-5)
    assert bits.whole[0] == pytest.approx((3 * bits.upper[0] + 5 * bits.lower[0]) / 8)
    page = completion.report(records, bits, 3, {"pixels": run})
    assert "| real | 100.0 (± 0.0) |" in page
    assert "| first 3 rows real, the rest drawn (2 times) | 100.0 (± 0.0, 0.0 between draws) |" in page
    completion.draw(run, completed, 3).savefig(tmp_path / "figure.png")


def test_runs_that_do_not_fit_together(workdir):
    run = load_run(workdir, "last")
    with pytest.raises(
        ValueError, match="--classifier is a run of the task 'pixels'; expected 'classification'"
    ):
        completion.check(run, run, 4, 1)
    with pytest.raises(ValueError, match="--rows is 8 and --draws 1; expected 1 to 7, and at least 1"):
        completion.check(run, run, 8, 1)


def test_from_the_command_line(workdir, tmp_path):
    def run(*arguments):
        environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
        return subprocess.run(
            [sys.executable, "generate.py", *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    out = tmp_path / "grid.png"
    result = run(
        f"--workdir={workdir}", "--num=5", f"--out={out}", "--prompt=3", "--rows=4", "--json", "--top_k=3"
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["image"] for line in lines] == list(range(5))
    assert all(0 < line["bits_per_dim"] < 8 for line in lines)
    with Image.open(out) as grid:
        assert grid.size == (3 * 65 - 1, 2 * 65 - 1)

    wrong = run(f"--workdir={workdir}", f"--out={out}", "--temperature=0")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.splitlines()[-1].startswith(
        "generate.py: temperature is 0.0; expected a positive number"
    )
    old_run = ROOT / "tests" / "runs" / "old_run"
    wrong = run(f"--workdir={old_run}", f"--out={out}")
    assert (
        "generate.py: the run's task is Classification, which predicts no pixels; expected pixels"
        in wrong.stderr
    )
