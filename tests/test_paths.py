"""What is taken as a path, what is refused, and that nothing starts before that is known."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorflow_datasets.core import constants

from vir_jax.data import open_source
from vir_jax.data.prepare import main as prepare
from vir_jax.evaluation import evaluate_workdir
from vir_jax.paths import PathError, check_path, check_paths
from vir_jax.runs.checkpoint import Checkpoints
from vir_jax.runs.checkpoint_reader import CheckpointReader
from vir_jax.runs.config import default_config
from vir_jax.runs.metrics import read_metrics
from vir_jax.training.loop import train

ROOT = Path(__file__).parents[1]

REFUSED = {
    "": "is empty",
    "  ": "is empty",
    "\t\n": "is empty",
    "s3://bucket/run": "s3: is not read here",
    "hdfs:///run": "hdfs: is not read here",
    "http://host/run": "http: is not read here",
    "https://host/run": "https: is not read here",
    "az://container/run": "az: is not read here",
    "hdfs:run": "hdfs: is not read here",
    "x-y.z+1://a": "x-y.z+1: is not read here",
    "file:///tmp/run": "write the local path itself",
    "file:run": "write the local path itself",
    "gs:/bucket/run": "gs://bucket/folder",
    "gs:bucket/run": "gs://bucket/folder",
    "GS://bucket/run": "gs://bucket/folder",
    " gs://bucket/run": "gs://bucket/folder",
    "/home/me/gs://bucket/run": "gs://bucket/folder",
    "gcs://bucket/run": "gs://bucket/folder",
    "gs://": "'' is no name of a bucket",
    "gs:///run": "'' is no name of a bucket",
    "gs://Bucket/run": "'Bucket' is no name of a bucket",
    "gs://b/run": "'b' is no name of a bucket",
    "gs://bucket": "expected a folder in the bucket",
    "gs://bucket/": "expected a folder in the bucket",
    "gs://bucket//run": "cannot be a part of a path in a bucket",
    "gs://bucket/a/../run": "cannot be a part of a path in a bucket",
    "gs://bucket/run#1": "cannot be a part of a path in a bucket",
    "gs://bucket/run?": "cannot be a part of a path in a bucket",
    "gs://bucket/*": "cannot be a part of a path in a bucket",
}
LOCAL = ["run", ".", "/tmp/run", "runs/a:1", "a:1", "runs/a b", "run/", "-run", "a::/b"]


@pytest.mark.parametrize("path", REFUSED)
def test_what_is_refused(path):
    with pytest.raises(PathError) as refusal:
        check_path(path, "--workdir", bucket=True)
    assert "--workdir is" in str(refusal.value)
    assert repr(path) in str(refusal.value)
    assert REFUSED[path] in str(refusal.value)
    with pytest.raises(PathError, match="--data_dir is"):
        check_path(path, "--data_dir")


@pytest.mark.parametrize("path", LOCAL)
def test_what_is_local(path):
    for bucket in (True, False):
        assert check_path(path, "--workdir", bucket=bucket) == str(Path(path))
    assert check_path(Path(path), "--workdir") == str(Path(path))


def test_a_bucket_is_taken_where_it_can_be_read():
    assert check_path("gs://my-bucket_1.x/a b/run/", "--workdir", bucket=True) == "gs://my-bucket_1.x/a b/run"
    with pytest.raises(PathError, match=r"not read from a bucket: mount the bucket \(gcsfuse .* or copy"):
        check_path("gs://bucket/run", "--data_dir")
    with pytest.raises(PathError, match=r"pathlib\.Path drops a slash"):
        check_path(Path("gs://bucket/run"), "workdir", bucket=True)


def test_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for bucket in (True, False):
        assert check_path("~/run", "--workdir", bucket=bucket) == "/home/me/run"
        assert check_path("~", "--workdir", bucket=bucket) == "/home/me"
    assert check_path("runs/~x", "--workdir") == "runs/~x"
    with pytest.raises(PathError, match="--workdir is '~no-such-user/run'"):
        check_path("~no-such-user/run", "--workdir")


# --- Every place that takes a path ---

UNUSABLE = ["", " ", "s3://bucket/x", "gs:/bucket/x", "file:///x"]


def started(tmp_path):
    """Whether something was made in the current folder."""
    return sorted(os.listdir(tmp_path))


@pytest.mark.parametrize("path", UNUSABLE)
def test_from_python(path, tmp_path, monkeypatch, digits_config):
    monkeypatch.chdir(tmp_path)
    for refused in (
        lambda: train(digits_config, path),
        lambda: evaluate_workdir(path),
        lambda: Checkpoints(path),
        lambda: CheckpointReader(path),
        lambda: read_metrics(path),
        lambda: open_source("folder", "train", data_dir=path),
        lambda: open_source("cifar10", "train", data_dir=path),
    ):
        with pytest.raises(PathError):
            refused()
    assert started(tmp_path) == []


@pytest.mark.parametrize("path", [*UNUSABLE, "gs://bucket/data"])
def test_data_dir_of_a_config(path, tmp_path, digits_config):
    digits_config.data.data_dir = path
    with pytest.raises(ValueError, match=r"config\.data\.data_dir is"):
        train(digits_config, tmp_path / "run")
    assert started(tmp_path) == []


@pytest.mark.parametrize("path", UNUSABLE[1:])
def test_init_from_of_a_config(path, tmp_path, digits_config):
    digits_config.init_from = path
    with pytest.raises(PathError, match=r"config\.init_from is"):
        train(digits_config, tmp_path / "run")
    assert started(tmp_path) == []


def test_a_config_without_paths():
    check_paths(default_config())  # init_from is blank, data_dir None.
    config = default_config()
    config.init_from, config.data.data_dir = "gs://bucket/run", "~/data"
    check_paths(config)


def test_home_is_where_data_and_weights_are_looked_for(tmp_path, monkeypatch, digits_config):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "images" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "train" / "cat" / "1.jpg").touch()
    assert open_source("folder", "train", data_dir="~/images").class_names == ("cat",)
    digits_config.init_from = "~/pretrained"
    with pytest.raises(FileNotFoundError, match=rf"no checkpoints in {tmp_path}/pretrained"):
        train(digits_config, tmp_path / "run")


def test_the_default_folder_of_tfds(monkeypatch):
    monkeypatch.setattr(constants, "DATA_DIR", "gs://bucket/tfds")
    with pytest.raises(PathError, match=r"TFDS_DATA_DIR.*gs://bucket/tfds.*gcsfuse"):
        open_source("cifar10", "train")


def test_a_workdir_that_is_a_file(tmp_path, digits_config):
    (tmp_path / "file").touch()
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(NotADirectoryError, match="is no folder, or lies in a file"):
            train(digits_config, workdir)


@pytest.mark.parametrize("flag", ["data_dir", "manual_dir", "convert_from"])
def test_prepare(flag, tmp_path):
    with pytest.raises(SystemExit, match=rf"error: --{flag} is 's3://x'"):
        prepare(["--dataset=cifar10", f"--{flag}=s3://x"])


COMMANDS = {
    "train.py --config=configs/vir_digits.py --workdir=": "workdir",
    "train.py --config=configs/vir_digits.py --workdir=~no-such-user/x": "workdir",
    "eval.py --workdir=s3://bucket/run": "workdir",
    "eval.py --workdir=runs/x --data_dir=": "data_dir",
    "predict.py --workdir=gs:/bucket/run image.jpg": "workdir",
    "predict.py --workdir=runs/x image.jpg gs://bucket/image.jpg": "an image file",
    "generate.py --workdir=s3://bucket/run --out=x.png": "workdir",
    "generate.py --workdir=runs/x --out=gs://bucket/x.png": "out",
    "generate.py --workdir=runs/x --out=x.png --prompt=gs://bucket/x.png": "prompt",
    "-m vir_jax.inspection --workdir=runs/x --image=7 --out=gs://bucket/figures": "out",
    "-m vir_jax.inspection --workdir=runs/x --image=7 --out=x --compare=runs/y,s3://z": "compare",
    "-m vir_jax.inspection --workdir=runs/x --image=http://x/y.jpg --out=x": "image",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_it_as_a_mistake_of_usage(command, tmp_path):
    script, *arguments = command.split()
    if script.endswith(".py"):
        script = str(ROOT / script)
    arguments = [argument.replace("configs/", f"{ROOT}/configs/") for argument in arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    said = result.stdout + result.stderr
    assert result.returncode == 1
    assert f"{COMMANDS[command]} is " in said
    assert "Traceback" not in said
    assert started(tmp_path) == []
