"""From a run to a folder of weights and back to a run, and a command for each."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.golden.weights.make import SIZE
from tests.weights.helpers import golden, tensors_of, write
from vir_jax.models.pixels import normalize
from vir_jax.runs.checkpoint import Checkpoints
from vir_jax.runs.config import default_config
from vir_jax.runs.load import load_run
from vir_jax.runs.model import model_functions
from vir_jax.runs.state import TrainState
from vir_jax.weights import WeightsError, load, save, save_run
from vir_jax.weights.card import software

NAMES = ("ant", "bee", "cat")
PIXELS = np.random.RandomState(0).randint(0, 255, (2, 8, 8, 3), np.uint8)


def write_run(folder, name="vir_pico4", **options):
    config = default_config()
    config.model.name, config.model.image_size = name, (8, 8)
    config.model.layer_scale = 1e-5 if name.startswith("vir") else None
    for option, value in options.items():
        config.model[option] = value
    config.data.mean, config.data.std, config.data.crop_fraction = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0.875
    config.data.dataset, config.data.eval_split = "bugs", "test"
    params = jax.jit(model_functions(config.model, len(NAMES)).init)(jax.random.key(1))
    state = TrainState(jnp.int32(7), params, optax.sgd(1.0).init(params), None)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(state, progress={}, config=config, metadata={"class_names": list(NAMES)})
        checkpoints.record_evaluation(7, {"top1": 0.75, "loss": 0.5}, score=0.75)
    return folder


@pytest.fixture(scope="module")
def vir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("vir"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("vit"), "vit_pico4")


def same_params(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


@pytest.mark.parametrize("layout", ["vir", "release", "timm", "hf"])
def test_a_run_goes_out_and_comes_back(tmp_path, request, layout):
    run = load_run(request.getfixturevalue("vit" if layout in ("timm", "hf") else "vir"))
    save(tmp_path / "weights", run, layout=layout)
    ready = load(tmp_path / "weights")
    same_params(ready.params, run.params)
    card = ready.card
    assert (card.class_names, card.mean, card.std) == (NAMES, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (card.score, card.scored_on) == (
        {"top1": 0.75, "loss": 0.5},
        {"dataset": "bugs", "split": "test"},
    )
    assert card.trained == {"task": "classification", "step": 7, "weights": "raw"}
    assert card.exported_with == software()
    images = normalize(jnp.asarray(PIXELS), card.mean, card.std)
    np.testing.assert_allclose(ready(PIXELS), run.model(images), rtol=1e-5, atol=1e-6)

    save_run(tmp_path / "run", ready)
    again = load_run(tmp_path / "run")
    same_params(again.params, run.params)
    assert (again.class_names, again.step, again.metrics) == (run.class_names, run.step, run.metrics)
    assert again.model.options == run.model.options
    assert dict(again.config.data) == dict(run.config.data)
    with pytest.raises(FileExistsError, match="holds a run"):
        save_run(tmp_path / "run", ready)


@pytest.mark.parametrize(
    "options",
    [
        {"retention": "2d"},
        {"bidirectional": True},
        {"position": "sincos"},
        {"readout": "average"},
        {"mixer": "fnet"},
    ],
)
def test_options_of_ours_come_back(tmp_path, options):
    run = load_run(write_run(tmp_path / "run", **options))
    save(tmp_path / "weights", run)
    ready = load(tmp_path / "weights")
    assert ready.model.options == run.model.options
    same_params(ready.params, run.params)


def test_other_libraries_files_stand_on_their_own(tmp_path, vit):
    """Without our card, names, colours and sizes are those of the other library's configuration."""
    for layout in ("timm", "hf"):
        save(tmp_path / layout, load_run(vit), layout=layout)
        file = tmp_path / layout / "config.json"
        config = json.loads(file.read_text())
        card = config.pop("vir_jax")
        file.write_text(json.dumps(config))
        found = load(tmp_path / layout).card
        assert (list(found.class_names), list(found.mean), list(found.std)) == (
            card["class_names"],
            card["mean"],
            card["std"],
        )
        assert found.model["name"] == "vit_pico4"
        assert found.score == {}


def test_classes_are_matched_by_name(tmp_path, vir):
    run = load_run(vir)
    save(tmp_path / "x", run)
    fitted = load(tmp_path / "x", class_names=["dog", "cat", "ant"])
    old, new = (params["readout"]["head"]["kernel"] for params in (run.params, fitted.params))
    np.testing.assert_array_equal(new[:, 1:], old[:, jnp.array([2, 0])])
    assert np.std(new[:, 0]) == pytest.approx(0.02, rel=0.3)  # fresh
    assert fitted.card.score == {}
    fresh = load(tmp_path / "x", num_classes=5)
    assert fresh.card.class_names is None
    assert fresh(PIXELS).shape == (2, 5)
    assert not np.isin(fresh.params["readout"]["head"]["kernel"], old).any()
    with pytest.raises(WeightsError, match="2 class names for 3 classes"):
        load(tmp_path / "x", class_names=["ant", "bee"], num_classes=3)


def test_other_patches_and_sizes(tmp_path, vir):
    save(tmp_path / "x", load_run(vir))
    fitted = load(tmp_path / "x", image_size=(16, 24), patch=8)
    assert fitted.card.model["name"] == "vir_pico8"
    assert fitted.params["stem"]["position"]["embedding"].shape == (1, 2, 3, 64)
    assert fitted.params["stem"]["embedding"]["conv"]["kernel"].shape == (8, 8, 3, 64)
    assert jnp.all(jnp.isfinite(fitted(np.zeros((1, 16, 24, 3), np.uint8))))


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels(tmp_path, channels):
    tensors = tensors_of(golden("timm"))
    weight = np.resize(tensors["patch_embed.proj.weight"], (64, channels, 4, 4))
    tensors["patch_embed.proj.weight"] = weight
    folder = write(tmp_path / "x", tensors)
    assert load(folder).params["stem"]["embedding"]["conv"]["kernel"].shape == (4, 4, 3, 64)
    kept = load(folder, channels=channels, mean=[0.5] * channels, std=[0.5] * channels)
    assert kept.model.channels == channels
    np.testing.assert_array_equal(
        kept.params["stem"]["embedding"]["conv"]["kernel"], weight.transpose(2, 3, 1, 0)
    )
    for layout in ("timm", "hf", "vir"):
        save(tmp_path / layout, kept, layout=layout)
        again = load(tmp_path / layout)  # Our card says how many there are.
        same_params(again.params, kept.params)
        pixels = np.random.default_rng(0).integers(0, 255, (1, SIZE, SIZE, channels), np.uint8)
        np.testing.assert_array_equal(again(pixels), kept(pixels))
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["model_args"]["in_chans"] == channels


def test_a_grey_model_of_one_of_rgb_gives_of_grey_images_the_same(tmp_path):
    folder = write(tmp_path / "x", tensors_of(golden("timm")))
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    rgb, grey = load(folder, **half), load(folder, channels=1, **half)
    assert (grey.card.mean, grey.card.std) == ((0.5,), (0.5,))
    pixels = np.random.default_rng(0).integers(0, 255, (2, SIZE, SIZE, 1), np.uint8)
    expected = rgb(np.repeat(pixels, 3, axis=3))
    np.testing.assert_allclose(grey(pixels), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grey(np.repeat(pixels, 3, axis=3)), expected, rtol=1e-4, atol=1e-5)


def test_channels_that_no_image_has(tmp_path):
    tensors = tensors_of(golden("timm"))
    folder = write(tmp_path / "x", tensors)
    with pytest.raises(WeightsError, match="12 channels are asked for; expected 1, 3 or 4"):
        load(folder, channels=12)
    tensors["patch_embed.proj.weight"] = np.zeros((64, 12, 4, 4), np.float32)
    with pytest.raises(WeightsError, match="reads 12 channels; expected 1, 3 or 4"):
        load(write(tmp_path / "y", tensors))


def test_what_is_not_known_is_asked_for(tmp_path):
    folder = write(tmp_path / "x", tensors_of(golden("timm")))
    pixels = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    loaded = load(folder)
    with pytest.raises(WeightsError, match="give mean and std of the colours"):
        loaded(pixels)
    with pytest.raises(WeightsError, match="give mean and std of the colours"):
        save_run(tmp_path / "run", loaded)
    loaded = load(folder, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert loaded(pixels).shape == (1, 7)
    with pytest.raises(WeightsError, match="names of the 7 classes are not known"):
        save_run(tmp_path / "run", loaded)
    named = dataclasses.replace(loaded, card=dataclasses.replace(loaded.card, class_names=tuple("abcdefg")))
    save_run(tmp_path / "run", named)
    same_params(load_run(tmp_path / "run", "last").params, loaded.params)


def test_a_card_of_another_version_is_refused(tmp_path, vir):
    save(tmp_path / "x", load_run(vir))
    file = tmp_path / "x" / "config.json"
    card = json.loads(file.read_text())["vir_jax"]
    for change, message in (
        ({"colour": 1}, "has colour, which this version does not know"),
        ({"num_classes": None}, "does not say num_classes"),
    ):
        changed = {key: value for key, value in (card | change).items() if value is not None}
        file.write_text(json.dumps({"vir_jax": changed}))
        with pytest.raises(WeightsError, match=message):
            load(tmp_path / "x")
    file.write_text("{}")
    with pytest.raises(WeightsError, match=r"has no config\.json with a 'vir_jax' section"):
        load(tmp_path / "x")


def test_layouts_are_found_or_named(tmp_path):
    with pytest.raises(
        WeightsError, match="tensors such as a are in none of the layouts vir, timm, hf, release"
    ):
        load(write(tmp_path / "x", {"a": np.ones(3, np.float32)}))
    with pytest.raises(WeightsError, match="no layout is called 'tim'; expected one of"):
        load(tmp_path / "x", layout="tim")


def test_the_commands(tmp_path, vit):
    def run(*arguments):
        command = [sys.executable, "-m", "vir_jax.weights", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    done = run("export", vit, tmp_path / "timm", "--layout=timm")
    assert done.returncode == 0, done.stderr
    (tmp_path / "names.txt").write_text("bee\ncat\ndog\n")
    done = run(
        "import",
        tmp_path / "timm",
        tmp_path / "new",
        f"--classes={tmp_path / 'names.txt'}",
        "--image_size=16",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("vit_pico4, 3 classes")
    new = load_run(tmp_path / "new", "last")
    assert new.class_names == ("bee", "cat", "dog")
    assert new.config.model.image_size == 16
    wrong = run("export", vit, tmp_path / "x", "--layout=release")
    assert wrong.returncode == 1
    assert wrong.stderr.strip().endswith("--layout=vir writes any of ours")
    assert "Traceback" not in wrong.stderr
