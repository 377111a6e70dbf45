import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vir_jax.data import open_source
from vir_jax.models.pixels import normalize
from vir_jax.probe import Features, extract, linear_probe, nearest_neighbours
from vir_jax.runs.checkpoint import Checkpoints
from vir_jax.runs.config import default_config
from vir_jax.runs.load import load_run
from vir_jax.runs.model import model_functions
from vir_jax.runs.state import TrainState


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with random weights: its features tell digits apart all the same."""
    config = default_config()
    config.model.name, config.model.image_size = "vir_pico4", (8, 8)
    config.data.dataset, config.data.eval_split, config.data.crop_fraction = "digits", "test", 1.0
    config.eval_batch_size = 128
    params = jax.jit(model_functions(config.model, 10).init)(jax.random.key(0))
    state = TrainState(jnp.int32(1), params, optax.sgd(1.0).init(params), None)
    folder = tmp_path_factory.mktemp("run")
    with Checkpoints(folder) as checkpoints:
        metadata = {"class_names": [str(digit) for digit in range(10)]}
        checkpoints.save(state, progress={}, config=config, metadata=metadata)
    return folder


@pytest.fixture(scope="module")
def run(workdir):
    return load_run(workdir, "last")


@pytest.fixture(scope="module")
def source():
    return open_source("digits", "test", data_dir=None)


LAYERS = ("tokens", "blocks.1.tokens", "features")


@pytest.mark.parametrize("pool", ["class_token", "average"])
def test_features_are_those_of_the_model(run, source, pool):
    found = extract(run, source, LAYERS, pool=pool)
    examples = [source[index] for index in (0, 200, len(source) - 1)]
    images = normalize(jnp.stack([example["image"] for example in examples]), (0.5,) * 3, (0.5,) * 3)
    expected = run.model.intermediates(images, LAYERS)
    for layer in LAYERS:
        tokens = expected[layer]
        vectors = tokens[:, -1] if pool == "class_token" else tokens[:, :-1].mean(1)
        np.testing.assert_allclose(found[layer].values[[0, 200, -1]], vectors, rtol=1e-4, atol=1e-5)
        assert found[layer].labels[[0, 200, -1]].tolist() == [example["label"] for example in examples]
        # 355 images in batches of 128: the padding is left out.
        assert len(found[layer].values) == len(found[layer].labels) == len(source) == 355


@pytest.mark.parametrize(
    ("layers", "pool", "message"),
    [
        (["blocks.9.tokens"], None, "no intermediate is called 'blocks.9.tokens'"),
        (
            ["blocks.1.mixer.q"],
            None,
            r"'blocks.1.mixer.q' has shape \(1, 5, 4, 16\), one image; expected tokens",
        ),
        (["logits"], None, r"'logits' has shape \(1, 10\)"),
        (["patch_tokens"], None, "before the class token: take pool='average'"),
        (["features"], "max", "pool is 'max'; expected one of class_token, average"),
    ],
)
def test_mistakes_are_explained(run, source, layers, pool, message):
    with pytest.raises(ValueError, match=message):
        extract(run, source, layers, pool=pool)


def features(values, labels):
    return Features(np.asarray(values, np.float32), np.asarray(labels), ("a", "b"), "features", "average")


def test_neighbours_by_hand():
    """By direction, not by distance; a vector of zeros is like nothing."""
    train = features([[1, 0], [2, 0.1], [0, 1], [0.1, 3]], [0, 0, 1, 1])
    test = features([[100, 1], [0, 0.01], [1, 9]], [0, 1, 0])
    assert nearest_neighbours(train, test, neighbours=2) == pytest.approx(2 / 3)
    assert 0 <= nearest_neighbours(train, features([[0, 0]], [0])) <= 1


def test_a_linear_probe_finds_a_line(caplog):
    values = np.random.RandomState(0).standard_normal((200, 3))
    labels = (values @ [1, -2, 0.5] > 0).astype(int)
    train, test = features(values[:100], labels[:100]), features(values[100:], labels[100:])
    assert linear_probe(train, test) > 0.9
    assert nearest_neighbours(train, test, neighbours=5) < 1
    linear_probe(train, test, steps=1)
    assert "had not converged after 1 steps" in caplog.text


def test_the_command(workdir, tmp_path):
    command = [
        sys.executable,
        "-m",
        "vir_jax.probe",
        f"--workdir={workdir}",
        "--layers=patch_tokens,features",
    ]
    done = subprocess.run([*command, "--pool=average", f"--out={tmp_path}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["layer", "patch_tokens", "features"]
    # Chance is 10 %.
    assert all(float(figure.rstrip("%")) > 60 for line in lines[1:] for figure in line[1:])
    with np.load(tmp_path / "train.patch_tokens.npz", allow_pickle=False) as stored:
        assert stored["values"].shape == (1442, 64)
        assert stored["values"].dtype == np.float32
        assert stored["class_names"].tolist() == [str(digit) for digit in range(10)]
    wrong = subprocess.run([*command], capture_output=True, text=True)
    assert wrong.returncode == 1
    assert "Traceback" not in wrong.stderr
