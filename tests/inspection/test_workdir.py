import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from vir_jax.data import open_source
from vir_jax.evaluation import evaluate_workdir
from vir_jax.inspection.workdir import load_image, load_model, read_curves


def test_the_model_is_the_one_that_evaluation_sees(workdir):
    source = open_source("digits", "test")
    pixels = np.stack([source[i]["image"] for i in range(len(source))])
    labels = np.array([source[i]["label"] for i in range(len(source))])
    losses = []
    for weights in ("raw", "ema"):
        trained = load_model(workdir, weights=weights)
        log_probabilities = jax.nn.log_softmax(trained.logits(trained.normalize(pixels)))
        losses.append(-float(np.mean(log_probabilities[np.arange(len(labels)), labels])))
        metrics = evaluate_workdir(workdir, weights=weights)["auto"].metrics
        assert losses[-1] == pytest.approx(metrics["loss"], rel=1e-4)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    assert trained.class_names == source.class_names
    assert trained.step == 11
    default, ema = (nnx.state(model) for model in (load_model(workdir).model, trained.model))
    assert jax.tree.all(jax.tree.map(np.array_equal, default, ema))


def test_images_from_files_and_by_number(workdir, tmp_path):
    trained = load_model(workdir)
    pixels = open_source("digits", "test")[7]["image"]
    np.testing.assert_array_equal(load_image(trained, "7"), pixels)
    Image.fromarray(pixels).save(tmp_path / "7.png")
    np.testing.assert_array_equal(load_image(trained, str(tmp_path / "7.png")), pixels)
    Image.fromarray(np.full((30, 50, 3), 9, np.uint8)).save(tmp_path / "wide.png")
    np.testing.assert_array_equal(load_image(trained, str(tmp_path / "wide.png")), np.full((8, 8, 3), 9))


def test_mistakes_are_explained(workdir, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoints in"):
        load_model(tmp_path)
    trained = load_model(workdir)
    with pytest.raises(ValueError, match="has examples 0 to 354"):
        load_image(trained, "355")
    with pytest.raises(FileNotFoundError):
        load_image(trained, "no_such.png")
    with pytest.raises(FileNotFoundError, match="expected the workdir of a run"):
        read_curves(tmp_path)
