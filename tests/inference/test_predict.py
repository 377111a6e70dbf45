"""Predictions from files: equal to the model's on the same pixels; bad files are told and stop nothing."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tifffile
from flax import nnx
from PIL import Image

from tests.test_command_line import ROOT, run
from vir_jax.data import decode_image, open_source
from vir_jax.inference.predict import predict_files
from vir_jax.models.pixels import normalize
from vir_jax.runs.checkpoint import Checkpoints
from vir_jax.runs.checkpoint_reader import CheckpointReader
from vir_jax.runs.config import default_config
from vir_jax.runs.model import model_functions
from vir_jax.runs.state import TrainState


def write_checkpoint(folder, data=None, bce_loss=False, **model):
    """A checkpoint as training writes it, with random weights that all matter; the average's are others.

    `data` changes fields of config.data; None takes one away.
    """
    config = default_config()
    config.model.name, config.model.image_size, config.model.dtype = "vir_pico2", (8, 8), "float32"
    config.model.layer_scale = 1e-5
    config.model.update(model)
    config.bce_loss = bce_loss
    with config.unlocked():
        for name, value in (data or {}).items():
            del config.data[name]
            if value is not None:
                config.data[name] = value
    shapes = jax.eval_shape(model_functions(config.model, 10).init, jax.random.key(0))

    def random_parameters(seed):
        draw = np.random.default_rng(seed).standard_normal

        def fill(path, leaf):
            return jnp.asarray(0.2 * draw(leaf.shape) + ("norm" in str(path)), leaf.dtype)

        return jax.tree.map_with_path(fill, shapes)

    raw, ema = random_parameters(1), random_parameters(2)
    state = TrainState(
        step=jnp.int32(3), params=raw, opt_state=optax.sgd(0.1, momentum=0.9).init(raw), ema=ema
    )
    with Checkpoints(folder) as checkpoints:
        metadata = {"class_names": [f"digit {i}" for i in range(10)]}
        checkpoints.save(state, progress={}, config=config, metadata=metadata)
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def digits():
    """Pixels [20, 8, 8, 3] of the test set."""
    source = open_source("digits", "test")
    return np.stack([source[i]["image"] for i in range(20)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, digits):
    folder = tmp_path_factory.mktemp("digits")
    (folder / "more").mkdir()
    for i, pixels in enumerate(digits):
        Image.fromarray(pixels).save(folder / ("more" if i >= 15 else ".") / f"{i:02}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def expected_probabilities(workdir, pixels, weights="ema"):
    """By the model itself, restored leaf by leaf."""
    with CheckpointReader(workdir) as checkpoints:
        step = checkpoints.resolve("last")
        config, metadata = checkpoints.restore_config(step)
        params = checkpoints.restore_params(step, weights=weights)
    model = nnx.merge(model_functions(config.model, len(metadata["class_names"])).graph, params)
    logits = model(normalize(jnp.asarray(pixels), config.data.mean, config.data.std), mode="parallel")
    return metadata["class_names"], np.asarray(jax.nn.softmax(logits))


@pytest.mark.parametrize("streamed", [False, True])
def test_predictions_of_a_folder(workdir, folder, digits, streamed):
    predictions = list(predict_files(workdir, [folder], top=3, streamed=streamed))
    assert [p.file for p in predictions] == [
        *(str(folder / f"{i:02}.png") for i in range(15)),
        *(str(folder / "more" / f"{i:02}.png") for i in range(15, 20)),
    ]
    names, probabilities = expected_probabilities(workdir, digits)
    for prediction, expected in zip(predictions, probabilities, strict=True):
        best = np.argsort(-expected)[:3]
        assert [name for name, _ in prediction.classes] == [names[i] for i in best]
        np.testing.assert_allclose([p for _, p in prediction.classes], expected[best], rtol=1e-4)


def test_weights_and_top(workdir, folder, digits):
    (prediction,) = predict_files(workdir, [folder / "00.png"], top=99, weights="raw")
    _, probabilities = expected_probabilities(workdir, digits[:1], weights="raw")
    assert len(prediction.classes) == 10
    assert sum(p for _, p in prediction.classes) == pytest.approx(1)
    np.testing.assert_allclose([p for _, p in prediction.classes], np.sort(probabilities[0])[::-1], rtol=1e-4)


def test_with_bce_loss_each_class_has_a_probability_of_its_own(workdir, folder, tmp_path):
    write_checkpoint(tmp_path / "run", bce_loss=True)
    of_one = dict(next(predict_files(workdir, folder, top=10)).classes)
    each = dict(next(predict_files(tmp_path / "run", folder, top=10)).classes)
    odds = {name: p / (1 - p) for name, p in each.items()}  # exp of the logits, as the sigmoid's inverse.
    for name, probability in of_one.items():
        assert odds[name] / sum(odds.values()) == pytest.approx(probability, rel=1e-4)


@pytest.mark.parametrize("kind", ["npy", "tif", "png"])
def test_streamed_files_lose_at_most_the_edges(workdir, digits, tmp_path, kind):
    """19 x 13 pixels in patches of 2: a row and a column are left out, and the rest is read at its own size."""
    tile = np.tile(digits[0], (3, 2, 1))
    larger = tile[:19, :13]
    inner = larger[:18, :12]
    for name, pixels in (("whole", larger), ("inner", inner)):
        path = tmp_path / f"{name}.{kind}"
        if kind == "npy":
            np.save(path, pixels)
        elif kind == "tif":
            tifffile.imwrite(path, pixels, photometric="rgb", compression="zlib", rowsperstrip=5)
        else:
            Image.fromarray(pixels).save(path)
    whole, part = predict_files(
        workdir, [tmp_path / f"{name}.{kind}" for name in ("whole", "inner")], streamed=True
    )
    _, probabilities = expected_probabilities(workdir, inner[None])
    assert whole.classes == part.classes
    np.testing.assert_allclose(whole.classes[0][1], probabilities.max(), rtol=1e-4)


@pytest.mark.parametrize("streamed", [False, True])
def test_bad_files_are_told_one_by_one(workdir, folder, tmp_path, streamed):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("no image")
    Image.new("RGB", (1, 8)).save(tmp_path / "narrow.png")
    whole = (folder / "01.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    bad = [tmp_path / name for name in ("absent.png", "text.jpg", "narrow.png", "cut.png", "empty")]
    paths = [bad[0], folder / "00.png", *bad[1:], folder / "01.png"]
    predictions = list(predict_files(workdir, paths, streamed=streamed))
    assert [p.file for p in predictions] == [str(path) for path in paths]
    assert [p.error is None for p in predictions] == [path not in bad for path in paths]
    errors = {p.file.rsplit("/", 1)[1]: p.error for p in predictions if p.error}
    assert errors["absent.png"] == "No such file or directory"
    assert "cannot identify" in errors["text.jpg"]
    assert errors["narrow.png"] == "1 x 8 pixels: smaller than one patch of the model, 2 x 2"
    assert errors["cut.png"]
    assert errors["empty"].startswith("no images in this folder; looked for .jpg")
    together = [p.classes for p in predictions if p.error is None]
    alone = [p.classes for p in predict_files(workdir, [paths[1], paths[-1]], streamed=streamed)]
    assert [[c for c, _ in p] for p in together] == [[c for c, _ in p] for p in alone]


def test_whole_images_have_a_limit_of_pixels(workdir, folder, monkeypatch):
    monkeypatch.setattr("vir_jax.inference.views.MAX_PIXELS", 63)
    (prediction,) = predict_files(workdir, [folder / "00.png"])
    assert prediction.error == "8 x 8 pixels: more than the 63 that are decoded; --stream reads it"


def test_a_model_that_cannot_be_streamed(tmp_path, folder):
    write_checkpoint(tmp_path, bidirectional=True)
    with pytest.raises(ValueError, match="a bidirectional model cannot be streamed"):
        list(predict_files(tmp_path, [folder], streamed=True))
    assert not any(p.error for p in predict_files(tmp_path, [folder]))


def test_command_line(workdir, folder, tmp_path):
    """The lines of text are tested on a trained model, in tests/test_command_line.py."""
    result = run(
        "predict.py", f"--workdir={workdir}", "--json", "--top=2", folder / "00.png", tmp_path / "no.png"
    )
    assert result.returncode == 1
    good, bad = map(json.loads, result.stdout.splitlines())
    (expected,) = predict_files(workdir, [folder / "00.png"], top=2)
    assert [(c["class"], pytest.approx(c["probability"], rel=1e-4)) for c in good["classes"]] == list(
        expected.classes
    )
    assert bad == {"file": str(tmp_path / "no.png"), "error": "No such file or directory"}


def predict_raw(workdir, *paths, **options):
    """The command's exit code, output and errors, as bytes."""
    command = [sys.executable, "predict.py", f"--workdir={workdir}", "--top=1", *map(os.fsencode, paths)]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=300, **options)


def test_any_name_and_any_kind_of_file(workdir, folder, tmp_path):
    """Names are bytes; a pipe would be waited for; neither stops the rest."""
    strange = os.fsencode(tmp_path) + b"/\xff\n.png"
    shutil.copy(folder / "00.png", strange)
    os.mkfifo(tmp_path / "pipe.png")
    result = predict_raw(workdir, strange, tmp_path / "pipe.png", "/dev/null", folder / "01.png")
    assert result.returncode == 1
    assert b"Traceback" not in result.stderr
    assert result.stdout.startswith(strange + b": digit ")
    assert os.fsencode(folder / "01.png") + b": digit " in result.stdout
    assert b"pipe.png: a pipe; expected a regular file" in result.stderr
    assert b"/dev/null: a device; expected a regular file" in result.stderr
    (found,) = predict_files(workdir, tmp_path, top=1)  # In a folder, pipes are no images.
    assert os.fsencode(found.file) == strange


def test_a_reader_that_goes_away(workdir, folder):
    """As `predict.py ... | head -1` does; what is left fills more than a pipe holds."""
    command = [sys.executable, "predict.py", f"--workdir={workdir}", *[folder / "00.png"] * 1500]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline().startswith(os.fsencode(folder / "00.png"))
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 141
    assert b"Traceback" not in errors
    assert b"Exception ignored" not in errors


def test_one_path_is_a_path(workdir, folder):
    """And not its letters, of which "/" is one."""
    path = folder / "00.png"
    for one in (str(path), path):
        assert [p.file for p in predict_files(workdir, one)] == [str(path)]
    assert len(list(predict_files(workdir, str(folder)))) == 20


@pytest.mark.parametrize("streamed", [False, True])
def test_transparency_is_read_as_in_training(tmp_path, digits, streamed):
    """By the config's background, whatever the format; runs of before it was there have white."""
    alpha = np.tile(np.linspace(0, 255, 8).astype(np.uint8), (8, 1))
    pixels = np.dstack([digits[0], alpha])
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", pixels)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=["unassalpha"])
    images = [tmp_path / f"a.{kind}" for kind in ("png", "npy", "tif")]

    def predicted(workdir):
        by_file = [p.classes for p in predict_files(workdir, images, top=10, streamed=streamed)]
        assert by_file[0] == by_file[1] == by_file[2]
        return by_file[0]

    def expected(workdir, background):
        image = decode_image((tmp_path / "a.png").read_bytes(), background=background)
        names, probabilities = expected_probabilities(workdir, image[None])
        return dict(zip(names, probabilities[0], strict=True))

    red, old = tmp_path / "red", tmp_path / "old"
    write_checkpoint(red, data={"background": (200, 10, 10)})
    write_checkpoint(old, data={"background": None})
    assert dict(predicted(red)) == pytest.approx(expected(red, (200, 10, 10)), rel=1e-4)
    assert dict(predicted(old)) == pytest.approx(expected(old, (255, 255, 255)), rel=1e-4)
    assert dict(predicted(red)) != pytest.approx(dict(predicted(old)), rel=1e-2)


def test_a_hundred_thousand_rows_in_constant_memory(tmp_path):
    """A file of 154 MB adds less to the resident memory than a tenth of it, beyond what its first rows took."""
    code = f"""
    import resource
    from flax import nnx
    import numpy as np
    from vir_jax.inference import ImageStream
    from vir_jax.inference.files import open_image
    from vir_jax.models import create_model

    path = "{tmp_path}/tall.npy"
    pixels = np.lib.format.open_memmap(path, "w+", np.uint8, (100_000, 512, 3))
    pixels[::1000] = 255
    pixels.flush()
    del pixels
    model = create_model("vir_pico64", num_classes=5, rngs=nnx.Rngs(0), image_size=64, position="sincos")
    image = open_image(path)
    stream = ImageStream(model, width=512, normalization=((0.5,) * 3, (0.5,) * 3))
    def resident():
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for strip in image.strips():
        stream.push(strip)
        if stream.received == 6400:
            stream.predict()
            before = resident()
    assert stream.received == 100_000
    assert np.isfinite(stream.predict()).all()
    print(resident() - before)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 15_000_000
