"""Checkpoints that cannot be written: a full disk, a run that is told to leave."""

import contextlib
import dataclasses
import gc
import resource
import time

import jax.numpy as jnp
import numpy as np
import pytest

from tests.runs.helpers import make_state, save
from vir_jax.runs.checkpoint import Checkpoints, SaveError
from vir_jax.runs.checkpoint_reader import CheckpointReader
from vir_jax.runs.preemption import PreemptedError


@contextlib.contextmanager
def full_disk(limit=16_384):
    """No file can grow beyond `limit` bytes: writes fail in the kernel, those of Orbax's C++ threads included."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def large_state(step):
    noise = np.random.default_rng(step).normal(size=(100, 1000)).astype(np.float32)  # cannot be compressed
    return dataclasses.replace(make_state(step), params={"noise": jnp.asarray(noise)}, ema=None)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # Orbax drops what else it had to write.
def test_a_full_disk_costs_a_checkpoint_and_no_more(tmp_path, caplog):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, large_state(1))
        checkpoints.finish()
        with full_disk():
            save(checkpoints, large_state(2))
            checkpoints.finish()
            assert checkpoints.failed()
            assert "checkpoint of step 2 was not written" in caplog.text
            assert "the newest checkpoint is of step 1" in caplog.text
            assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
            save(checkpoints, large_state(3))
            checkpoints.finish()
            assert checkpoints.newest_intact() == 1
        save(checkpoints, large_state(4))
        checkpoints.finish()
        assert not checkpoints.failed()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest_intact() == 4


def on_a_full_disk(workdir, step, then):
    """Saves a step that finds no room, does what is asked, and leaves."""
    try:
        with full_disk(), Checkpoints(workdir) as checkpoints:
            save(checkpoints, large_state(step))
            then(checkpoints)
    finally:
        gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_stays_full_is_an_error_in_the_end(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, make_state(1))
    with pytest.raises(
        SaveError, match=r"(?s)last checkpoint could not be written.*newest one is of step 1;"
    ):
        on_a_full_disk(tmp_path, 2, Checkpoints.finish)


def until_failed(checkpoints):
    while not checkpoints.failed():
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("ask", [Checkpoints.finish, until_failed, Checkpoints.latest_step])
def test_without_a_checkpoint_a_save_that_fails_is_an_error_at_once(tmp_path, ask):
    """Whoever asks first what became of it is told; at the latest the end of the block."""
    answers = []
    with pytest.raises(SaveError, match=r"(?s)step 1 was not written: .*There is no other in .*/checkpoints"):
        on_a_full_disk(tmp_path, 1, lambda checkpoints: answers.append(ask(checkpoints)))
    assert answers == ([None] if ask is Checkpoints.latest_step else [])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("cause", "raised"),
    [(PreemptedError("stopped"), SaveError), (KeyError("x"), KeyError)],
    ids=["sigterm", "bug"],
)
def test_a_run_that_leaves_says_that_it_was_not_saved(tmp_path, cause, raised, caplog):
    """With SIGTERM the exit code would say otherwise; any other error is told as it is."""

    def leave(checkpoints):
        raise cause

    with pytest.raises(raised):
        on_a_full_disk(tmp_path, 1, leave)
    assert raised is SaveError or "step 1 was not written" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_that_could_not_be_saved_was_not_preempted(tmp_path):
    """Who reads "preempted" starts the run again and expects it where it was."""

    def run():
        with Checkpoints(tmp_path) as checkpoints:
            save(checkpoints, large_state(2))
            raise PreemptedError("stopped")

    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, make_state(1))
    with full_disk(), pytest.raises(SaveError, match=r"(?s)could not be written.*newest one is of step 1;"):
        run()
    with pytest.raises(PreemptedError):
        run()
    with CheckpointReader(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 2
