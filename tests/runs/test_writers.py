"""What a run hands to its writers; those of other packages where they are installed, offline and into a folder."""

import importlib.util
import sys
import types

import numpy as np
import pytest

from vir_jax.extras import MissingPackageError
from vir_jax.runs.bucket import BucketPath
from vir_jax.runs.recipes import load_recipe
from vir_jax.runs.validate import validate
from vir_jax.runs.writers import WRITERS, check_installed, open_writers, tiled, writer_names
from vir_jax.training.loop import train
from vir_jax.training.profile import Profiler

PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def use(name, folder):
    """Two starts of one run, the second going on after step 2."""
    for start in (0, 2):
        (writer,) = open_writers([name], folder, start_step=start, config={"optim.lr": 0.1, "task": "x"})
        writer.scalars(start + 1, {"train/loss": 2.5 - start, "steps": 3, "odd": float("nan")})
        writer.image(start + 1, "data/first_batch", PICTURE)
        writer.close()


def test_names():
    assert writer_names("") == ()
    assert writer_names("tensorboard,wandb") == ("tensorboard", "wandb")


@pytest.mark.parametrize("name", sorted(set(WRITERS) - {"tensorboard"}))
def test_a_missing_package_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        MissingPackageError, match=rf'{name} is not installed: pip install "vir-jax\[{name}\]"'
    ):
        check_installed(["tensorboard", name])


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_one_run_there_for_one_workdir(name, tmp_path, monkeypatch):
    """What their functions are called with, whether they are installed or not."""
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, sorted(values)))

        def finish(self):
            calls.append("finished")

    def init(**options):
        calls.append(options)
        return Run()

    library = types.ModuleType(name)
    vars(library).update(init=init, Image=np.shape)
    monkeypatch.setitem(sys.modules, name, library)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    use(name, tmp_path)
    first, second = calls[0], calls[4]
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("mine", tmp_path.name, "allow")
    assert calls[1:4] == [(1, ["odd", "steps", "train/loss"]), (1, ["data/first_batch"]), "finished"]


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
@pytest.mark.filterwarnings("ignore")  # Its own.
def test_mlflow_itself(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.db")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    use("mlflow", tmp_path / "run")
    (run,) = mlflow.search_runs(output_format="list")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 2.5), (3, 0.5)]
    assert run.data.params["optim.lr"] == "0.1"


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.filterwarnings("ignore")
def test_wandb_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    use("wandb", tmp_path)
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")
@pytest.mark.filterwarnings("ignore")
def test_trackio_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    use("trackio", tmp_path)
    assert list((tmp_path / "trackio").glob("vir_jax*.db"))


def test_tiles():
    images = np.stack([np.full((2, 3, 3), value, np.uint8) for value in (10, 20, 30)])
    grid = tiled(images, least=6)
    assert grid.shape == (2 * 4 + 1, 2 * 6 + 1, 3)
    assert [grid[0, 0, 0], grid[0, 7, 0], grid[5, 0, 0], grid[5, 7, 0]] == [10, 20, 30, 255]
    assert (grid[4] == 255).all()


def test_the_profiler_watches_its_window(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("jax.profiler.start_trace", calls.append)
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append("stop"))
    with Profiler("2:3", tmp_path) as profiler:
        for step in range(1, 7):
            profiler.before(step, ())
            calls.append(step)
    assert calls == [1, str(tmp_path / "profile"), 2, 3, "stop", 4, 5, 6]
    calls.clear()
    with Profiler("2:9", tmp_path) as profiler:  # The run ends, or goes on, inside of the window.
        profiler.before(4, ())
    assert calls == [str(tmp_path / "profile"), "stop"]
    with Profiler("", tmp_path) as profiler:
        profiler.before(1, ())
    assert len(calls) == 2
    with pytest.raises(ValueError, match="lies in a bucket"):
        Profiler("2:3", BucketPath("gs://bucket/run"))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("writers", "tensorbord", "some of tensorboard, wandb, mlflow, trackio, separated by commas"),
        ("profile", "20:10", "two steps as first:last"),
        ("profile", "10", "two steps as first:last"),
        ("sample_images", 4, "config.task is 'classification', which draws nothing"),
    ],
)
def test_fields_are_checked(field, value, message):
    config = load_recipe("vir_digits")
    config[field] = value
    with pytest.raises(ValueError, match=message):
        validate(config)


def test_who_draws_has_to_be_said(tmp_path):
    config = load_recipe("vir_digits_pixels")
    config.sample_images = 4
    with pytest.raises(ValueError, match=r"draw=vir_jax\.generation\.workdir\.draw_samples"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
