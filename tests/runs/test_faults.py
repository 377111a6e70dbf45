"""What a run survives: the short version of `python -m benchmarks.faults`."""

import dataclasses
import functools
import gc
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import threading
import time

import jax
import jax.numpy as jnp
import pytest

import vir_jax.training.loop
import vir_jax.training.plan
from benchmarks.faults.bench import Bench
from benchmarks.faults.damage import flip, truncate
from benchmarks.faults.kills import sigkill
from benchmarks.faults.runs import differences, final_state
from vir_jax.data import TooManyCorruptError, TrainLoader, open_source
from vir_jax.evaluation import evaluate_workdir
from vir_jax.parallel.mesh import make_mesh
from vir_jax.runs.checkpoint import SaveError
from vir_jax.runs.checkpoint_reader import CheckpointReader
from vir_jax.runs.lock import WorkdirInUseError, exclusive
from vir_jax.runs.manifest import DamagedCheckpointError
from vir_jax.runs.metrics import read_metrics
from vir_jax.runs.preemption import PreemptedError
from vir_jax.training.loop import NonFiniteError, train


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """For one device Orbax saves in a tenth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        on_one = functools.partial(make_mesh, devices=jax.devices()[:1])
        patch.setattr(vir_jax.training.loop, "make_mesh", on_one)
        yield


@pytest.fixture(scope="module")
def short_config(make_digits_config):
    """11 steps with an evaluation in the middle."""
    config = make_digits_config()
    config.epochs, config.optim.cooldown_epochs = 0.5, 0.0
    config.checkpoint_every, config.eval_every, config.log_every = 3, 6, 2
    return config


@pytest.fixture(scope="module")
def whole(short_config, tmp_path_factory):
    """What a run ends with that nothing happens to."""
    workdir = tmp_path_factory.mktemp("whole")
    train(short_config, workdir)
    return final_state(workdir)


@pytest.fixture(scope="module")
def stopped_once(short_config, tmp_path_factory):
    """A workdir of the same run, stopped by SIGTERM in step 8, with checkpoints of steps 6 and 8."""
    workdir = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 7, terminate)
        with pytest.raises(PreemptedError, match="stopped after step 8 of 11"):
            train(short_config, workdir)
    return workdir


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A copy of it."""
    return shutil.copytree(stopped_once, tmp_path / "stopped")


@pytest.fixture
def config(short_config):
    return short_config.copy_and_resolve_references()


def at_step(patch, step, action):
    """Does something when the metrics of a step have come in: during the next step, or where that one is logged."""
    take_metrics = vir_jax.training.loop.take_metrics

    def disturbed(number, *arguments):
        take_metrics(number, *arguments)
        if number == step:
            action()

    patch.setattr(vir_jax.training.loop, "take_metrics", disturbed)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


class TerminatingSource:
    """The test images, with a SIGTERM when the 100th is read."""

    def __init__(self):
        self.source, self.reads = open_source("digits", "test"), 0
        self.num_classes, self.class_names = self.source.num_classes, self.source.class_names
        self.name = self.source.name

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        self.reads += 1
        if self.reads == 100:
            terminate()
        return self.source[index]


def assert_same_end(workdir, whole):
    assert differences(whole, final_state(workdir)) == []


@pytest.fixture
def no_pickle(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)


def test_sigterm_saves_and_the_next_start_goes_on(config, stopped, whole, no_pickle):
    with CheckpointReader(stopped) as checkpoints:
        assert checkpoints.steps() == [6, 8]
    assert read_metrics(stopped)[-1]["step"] == 8
    train(config, stopped)
    evaluate_workdir(stopped)
    assert_same_end(stopped, whole)


def test_a_workdir_holds_data_alone(stopped_once):
    """JSON, TensorBoard's records and TensorStore's arrays; the test above reads them without pickle."""
    ocdbt, zstd = b"\x0c\xdb", b"\x28\xb5\x2f\xfd"  # with which their files begin
    for path in (path for path in stopped_once.rglob("*") if path.is_file()):
        data, parts = path.read_bytes(), path.relative_to(stopped_once).parts
        if parts[0] == "metrics.jsonl":
            assert all(json.loads(line) for line in data.decode().splitlines())
        elif "d" in parts:
            assert data.startswith((ocdbt, zstd))
        elif parts[-1] == "manifest.ocdbt":
            assert data.startswith(ocdbt)
        elif parts[0] not in ("tensorboard", "lock") and parts[-1] != "commit_success.txt":
            json.loads(data)


def test_sigterm_during_an_evaluation(config, tmp_path, whole):
    with pytest.raises(PreemptedError, match="during an evaluation"):
        train(config, tmp_path, eval_source=TerminatingSource())
    assert not any("eval/top1" in line for line in read_metrics(tmp_path))
    with CheckpointReader(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 6
        assert checkpoints.metrics(6) is None
    train(config, tmp_path)
    assert_same_end(tmp_path, whole)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("when", ["in a step", "in an evaluation"])
def test_sigterm_on_a_full_disk_is_no_saved_run(config, stopped, when, monkeypatch):
    """It ends with an error and not as one that was preempted, whose exit code says that it is saved."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    source = None
    if when == "in a step":
        at_step(monkeypatch, 9, terminate)
    else:  # The last one.
        config.eval_every, source = 0, TerminatingSource()
    at_step(monkeypatch, 9, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard)))
    message = r"(?s)last checkpoint could not be written.*newest one is of step 8.*same command goes on"
    try:
        with pytest.raises(SaveError, match=message):
            train(config, stopped, eval_source=source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        gc.collect()


# --- What a run leaves running ---


@pytest.fixture
def no_thread_outlives_it():
    """Compares the threads, while the exception is still alive whose traceback refers to all that the run had."""
    before = set(threading.enumerate())

    def check(name):
        left = [thread for thread in threading.enumerate() if thread not in before]
        for thread in left:  # One that was told to stop finishes the example that it is at.
            thread.join(timeout=10)
        assert [thread for thread in left if thread.is_alive()] == [], name

    return check


class UnreadableSource(TerminatingSource):
    """Test images none of which can be read."""

    def __getitem__(self, index):
        raise OSError("gone")


def test_no_thread_outlives_a_run(config, tmp_path, no_thread_outlives_it, monkeypatch):
    ends = {}

    def end(name, kind, match, **sources):
        with pytest.raises(kind, match=match) as ends[name]:
            train(config, tmp_path, **sources)
        no_thread_outlives_it(name)

    with monkeypatch.context() as patch:
        at_step(patch, 1, terminate)
        end("preempted", PreemptedError, "stopped after step 2")
    end("stopped in an evaluation", PreemptedError, "during an evaluation", eval_source=TerminatingSource())
    end("corrupt evaluation data", TooManyCorruptError, "were corrupt", eval_source=UnreadableSource())
    with monkeypatch.context() as patch:
        at_step(patch, 8, lambda: 1 / 0)
        end("any error", ZeroDivisionError, "division")
    train(config, tmp_path)
    no_thread_outlives_it("finished")
    config.epochs = 0.2
    end("refused", ValueError, "raise config.epochs")


# --- What is decided before anything is compiled ---


@pytest.fixture
def nothing_compiles(monkeypatch):
    def refuse(self, *arguments, **options):
        raise AssertionError("a step or an evaluation was compiled")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)


def test_a_finished_run_compiles_nothing(config, tmp_path, request, caplog):
    results = train(config, tmp_path)
    lines = read_metrics(tmp_path)
    request.getfixturevalue("nothing_compiles")
    loader = request.getfixturevalue("monkeypatch")
    loader.setattr(TrainLoader, "__next__", lambda self: pytest.fail("a batch was loaded"))
    with caplog.at_level("INFO"):
        assert train(config, tmp_path) == results
    assert "is finished: nothing is left to do" in caplog.text
    assert read_metrics(tmp_path) == lines


def test_a_refused_run_compiles_nothing(config, stopped, nothing_compiles):
    (stopped / "config.json").unlink()
    config.seed = 1
    with pytest.raises(ValueError, match="seed: 0 -> 1"):
        train(config, stopped)
    config.seed, config.epochs = 0, 0.2
    with pytest.raises(ValueError, match=r"raise config\.epochs"):
        train(config, stopped)
    assert not (stopped / "config.json").exists()  # What was refused is not this run's config.


def test_a_step_that_does_not_compile_does_not_claim_the_workdir(config, tmp_path, nothing_compiles):
    """Out of memory: the next start may have another batch size."""
    with pytest.raises(AssertionError):
        train(config, tmp_path)
    assert not (tmp_path / "config.json").exists()


# --- What may change on resume ---


def test_an_evaluation_on_other_data_is_another_evaluation(config, stopped, caplog):
    """Fields that change no training are free; what was measured before is not taken for what is measured now."""
    config.data.eval_split, config.data.crop_fraction, config.model.mode = "train", 0.9, "parallel"
    with caplog.at_level("INFO"):
        results = train(config, stopped)
    for change in ("data.eval_split changed on resume: 'test' -> 'train'", "model.mode changed on resume"):
        assert change in caplog.text
    assert results["count"] == len(open_source("digits", "train"))
    with CheckpointReader(stopped) as checkpoints:
        assert checkpoints.resolve("best") == 11  # Step 6 was evaluated on the test images.
    config.data.eval_split = "test"  # A finished run that was never evaluated on these.
    assert train(config, stopped)["count"] == len(open_source("digits", "test"))


def test_a_damaged_checkpoint_costs_steps_and_no_more(config, stopped, whole, caplog):
    said = f"ema/{flip(stopped / 'checkpoints' / '8' / 'ema', random.Random(0))}"
    with pytest.raises(DamagedCheckpointError, match=r"is damaged: .*other checkpoints there: \["):
        evaluate_workdir(stopped)
    train(config, stopped)
    assert f"checkpoints/8 is damaged: {said}" in caplog.text
    assert "falling back to step 6" in caplog.text
    assert_same_end(stopped, whole)


def test_without_a_readable_checkpoint_nothing_starts_afresh(config, stopped):
    for folder in (stopped / "checkpoints").iterdir():
        truncate(folder, random.Random(0))
    before = sorted(path for path in stopped.rglob("*"))
    with pytest.raises(DamagedCheckpointError, match=r"no checkpoint in .* can be restored"):
        train(config, stopped)
    assert sorted(path for path in stopped.rglob("*")) == before


def test_a_lost_config_is_taken_from_the_checkpoint(config, stopped):
    path = stopped / "config.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=r"config.json is damaged .* Remove it"):
        train(config, stopped)
    path.unlink()
    config.seed = 1
    with pytest.raises(ValueError, match=r"seed: 0 -> 1"):
        train(config, stopped)


def test_a_second_run_is_refused(config, tmp_path):
    with (
        exclusive(tmp_path),
        pytest.raises(WorkdirInUseError, match=rf"another run holds .*process {os.getpid()}"),
    ):
        train(config, tmp_path)
    with exclusive(tmp_path):
        pass


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # Orbax drops what else it had to write.
def test_a_full_disk_does_not_stop_a_run(config, tmp_path, whole, caplog, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):  # Of a file: too small for arrays, and in the end for another line of metrics.
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    def fill():
        while not (tmp_path / "checkpoints" / "3").is_dir():
            time.sleep(0.01)
        limit(600)

    at_step(monkeypatch, 5, fill)
    at_step(monkeypatch, 9, lambda: limit(soft))
    try:
        train(config, tmp_path)
    finally:
        limit(soft)
        gc.collect()
    assert "checkpoint of step 6 was not written" in caplog.text
    assert "the newest checkpoint is of step 3" in caplog.text
    assert re.search(r"metrics.jsonl: .* bytes wait", caplog.text)
    # The best evaluation may be that of a step which found no room.
    assert set(differences(whole, final_state(tmp_path))) <= {"best"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_is_full_before_the_first_checkpoint_stops_the_run(config, tmp_path, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(monkeypatch, 2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard)))
    try:
        with pytest.raises(SaveError, match=r"(?s)step 3 was not written.*There is no other"):
            train(config, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        gc.collect()
    assert read_metrics(tmp_path)[-1]["step"] < 11


@pytest.fixture
def failing_steps(monkeypatch):
    """Makes the loss of the steps 4 and 8 NaN."""
    make = vir_jax.training.plan.make_train_step

    def make_failing(*arguments, **options):
        step = make(*arguments, **options)

        def train_step(state, batch):
            bad = (state.step == 3) | (state.step == 7)
            params = jax.tree.map(lambda x: jnp.where(bad, jnp.nan, x), state.params)
            new, metrics = step(dataclasses.replace(state, params=params), batch)
            # A step that is not applied gives the parameters back that it was given.
            params = jax.tree.map(lambda old, new: jnp.where(bad, old, new), state.params, new.params)
            return dataclasses.replace(new, params=params), metrics

        return train_step

    monkeypatch.setattr(vir_jax.training.plan, "make_train_step", make_failing)


def test_steps_that_are_not_finite_are_counted_across_starts(config, tmp_path, failing_steps, caplog):
    config.max_skipped_steps = 1
    message = r"step 8: loss nan, gradient norm nan, update norm nan.*not applied. Last checkpoint: step 6"
    with pytest.raises(NonFiniteError, match=message):
        train(config, tmp_path)
    assert "step 4: loss nan" in caplog.text
    assert "Left out: 1 of at most 1" in caplog.text
    config.max_skipped_steps = 2  # The one of step 4 still counts after the next start.
    train(config, tmp_path)
    last = [line for line in read_metrics(tmp_path) if "skipped_steps" in line][-1]
    assert last["skipped_steps"] == 2
    assert last["train/loss"] > 0


def test_killed_at_random_moments(tmp_path):
    """Two kills, in two phases; the benchmark does two dozen."""
    (tmp_path / "cache").mkdir()
    short = {"epochs": 0.4, "optim.warmup_epochs": 0.2}  # 36 steps
    bench = Bench(tmp_path, tmp_path / "cache", **short)
    records = sigkill(bench, random.Random(1), each=1, limit=2, max_steps=6)
    assert sum(record.injected for record in records) == 2
