"""Runs whose workdir lies in a bucket: killed, refused, read back."""

import functools
import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import chex
import jax
import pytest

import vir_jax.training.loop
from benchmarks.faults.runs import differences, final_state
from tests.emulator import BUCKET
from vir_jax.evaluation import evaluate_workdir
from vir_jax.parallel.mesh import make_mesh
from vir_jax.runs import lease
from vir_jax.runs.bucket import BucketError, BucketPath
from vir_jax.runs.checkpoint import Checkpoints, SaveError
from vir_jax.runs.checkpoint_reader import CheckpointReader
from vir_jax.runs.load import load_run
from vir_jax.runs.manifest import DamagedCheckpointError
from vir_jax.runs.metrics import read_metrics
from vir_jax.training.finetune import read_pretrained, start_from
from vir_jax.training.loop import train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config(make_digits_config):
    """11 steps with an evaluation in the middle."""
    config = make_digits_config()
    config.epochs, config.optim.cooldown_epochs = 0.5, 0.0
    config.checkpoint_every, config.eval_every, config.log_every = 3, 6, 2
    return config


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """For one device Orbax saves in a tenth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        on_one = functools.partial(make_mesh, devices=jax.devices()[:1])
        patch.setattr(vir_jax.training.loop, "make_mesh", on_one)
        yield


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """What a run on a disk ends with that nothing happens to."""
    workdir = tmp_path_factory.mktemp("whole")
    train(config, workdir)
    return final_state(workdir)


# --- Kills ---

PROGRAM = """
import functools, json, sys
sys.modules["tensorflow"] = sys.modules["gcsfs"] = None  # Neither is to be imported.
import jax
import vir_jax.training.loop
from vir_jax.parallel.mesh import make_mesh
from vir_jax.runs import lease
from vir_jax.runs.config import default_config
from vir_jax.training.loop import train

# As many as tests see, of which one is used: threads go by it where cores are fewer, and with them the order of sums.
jax.config.update("jax_num_cpu_devices", 8)
vir_jax.training.loop.make_mesh = functools.partial(make_mesh, devices=jax.devices()[:1])
lease.SECONDS = 1.0
config = default_config()
config.update(json.loads(sys.argv[2]))
train(config, sys.argv[1])
"""


def kill_at(server, folder, config, pattern):
    """Starts the run, and kills it as it asks for an object to be written, which then is not."""
    killed = []

    def refuse(method, name):
        if method == "POST" and re.search(pattern, name) and not killed:
            killed.append(name)
            process.kill()
        return bool(killed)

    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), config.to_json()],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    server.refuse = refuse
    _, log = process.communicate(timeout=300)
    server.refuse = lambda method, name: False
    assert killed, log


def saved(folder):
    with CheckpointReader(folder) as checkpoints:
        return checkpoints.steps()


@pytest.fixture(scope="module")
def finished_once(config, server):
    """The same run in a bucket, killed at the end of a save and between two saves."""
    folder = BucketPath(f"gs://{BUCKET}/{os.getpid()}-finished")
    kill_at(server, folder, config, r"checkpoints/6/commit_success.txt")
    assert saved(folder) == [3]
    assert (folder / "checkpoints" / "6" / "manifest.json").is_file()
    kill_at(server, folder, config, r"checkpoints/6/evaluation.json")
    assert saved(folder) == [3, 6]
    assert (folder / "lock").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "SECONDS", 1.0)
        train(config, folder)
    return folder


@pytest.fixture
def finished(finished_once, folder):
    """A copy of it."""
    for name in finished_once.files():
        (folder / name).write_bytes((finished_once / name).read_bytes())
    return folder


def test_killed_again_and_again(finished_once, whole):
    assert differences(whole, final_state(finished_once)) == []
    folders = {name.split("/")[0] for name in finished_once.files()}
    assert folders == {"checkpoints", "config.json", "metrics.jsonl", "tensorboard"}


# --- Refusals ---

# Of a save that fails, Orbax drops what else it had to write.
failing_save = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def collected():
    """What Orbax drops, it drops before the test ends."""
    yield
    gc.collect()


@failing_save
@pytest.mark.usefixtures("collected")
def test_a_first_save_that_fails_stops_the_run(bucket, folder, config):
    bucket.refuse = lambda method, name: method == "POST" and "checkpoints/" in name
    with pytest.raises(
        SaveError, match=r"(?s)checkpoint of step 3 was not written.*There is no other in gs://"
    ):
        train(config, folder)
    bucket.refuse = lambda method, name: False
    assert max(line["step"] for line in read_metrics(folder)) < 11
    assert not (folder / "lock").exists()


@failing_save
@pytest.mark.usefixtures("collected")
def test_a_later_save_that_fails_is_tried_again(bucket, folder, config, whole, caplog):
    bucket.refuse = lambda method, name: method == "POST" and "checkpoints/6/" in name
    train(config, folder)
    assert caplog.text.count("was not written") == 1  # The next save is not blamed for what this one left.
    assert "the newest checkpoint is of step 3" in caplog.text
    assert set(differences(whole, final_state(folder))) <= {"best"}  # Step 6 was not there to be it.


def test_a_bucket_that_may_not_be_written_is_found_out_first(bucket, folder, config):
    with pytest.raises(BucketError, match="there is no such bucket"):
        train(config, "gs://no-such-bucket/run")
    bucket.refuse = lambda method, name: method == "POST"
    with pytest.raises(BucketError, match=r"cannot write gs://.*/lock: PERMISSION_DENIED"):
        train(config, folder)


# --- What else holds in a bucket ---


def test_a_damaged_checkpoint_is_put_aside(finished, config, whole, caplog):
    name = max(name for name in (finished / "checkpoints" / "11").files() if name.startswith("ema/d/"))
    path = finished / "checkpoints" / "11" / name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedCheckpointError, match=rf"checkpoints/11 is damaged: {name} holds other bytes"):
        evaluate_workdir(finished)
    train(config, finished)
    assert "kept as 11.damaged1; falling back to step 9" in caplog.text
    assert (finished / "checkpoints" / "11.damaged1" / name).is_file()
    assert differences(whole, final_state(finished)) == []


def test_an_outage_damages_no_checkpoint(bucket, finished, config):
    before = finished.files()
    bucket.refuse = lambda method, name: method == "GET" and "/checkpoints/11/params/" in name
    with pytest.raises(BucketError, match="PERMISSION_DENIED"):
        train(config, finished)
    bucket.refuse = lambda method, name: method == "GET" and name.endswith("evaluation.json")
    with CheckpointReader(finished) as checkpoints, pytest.raises(BucketError):
        checkpoints.metrics(11)
    assert finished.files() == before


def test_an_outage_between_saves_costs_training_nothing(bucket, finished, caplog):
    with Checkpoints(finished) as checkpoints:
        bucket.refuse = lambda method, name: True
        checkpoints.record_evaluation(11, {"top1": 1.0}, score=1.0)
        assert "the evaluation of step 11 was not recorded" in caplog.text
    assert "old checkpoints stay" in caplog.text
    bucket.refuse = lambda method, name: False
    assert 11 in saved(finished)


def test_old_checkpoints_are_removed(finished, bucket):
    with Checkpoints(finished, keep=1) as checkpoints:
        best = checkpoints.resolve("best")
        bucket.seen.clear()
    assert saved(finished) == sorted({11, best})
    removed = [name.split("/checkpoints/")[1] for method, name in bucket.seen if method == "DELETE"]
    assert removed[0] == "9/commit_success.txt"  # From then on it is no checkpoint.
    assert not any(name.startswith("checkpoints/9/") for name in finished.files())


def test_a_copy_on_a_disk_is_the_same_run(finished_once, tmp_path, config):
    """gcloud storage cp -r, and back to work without the bucket."""
    for name in finished_once.files():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((finished_once / name).read_bytes())
    assert train(config, tmp_path)["count"] == 355
    assert differences(final_state(finished_once), final_state(tmp_path)) == []


def test_evaluation_and_fine_tuning_read_a_bucket(finished_once, config, folder):
    (result,) = evaluate_workdir(str(finished_once), checkpoint="last").values()
    best = load_run(str(finished_once), "best")
    with CheckpointReader(finished_once) as checkpoints:
        assert result.metrics == pytest.approx(checkpoints.metrics(11))
    config.init_from = str(finished_once)
    fitted = read_pretrained(config, shapes=best.params, class_names=best.class_names)
    chex.assert_trees_all_equal(start_from(fitted, best.params), best.params)
    with pytest.raises(FileNotFoundError, match=r"no checkpoints in gs://"):
        evaluate_workdir(str(folder))
