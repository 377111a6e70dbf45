"""What a user reads of a run that saves: its own lines and failures, not what the libraries say of every file."""

import logging
from pathlib import Path

import jax.numpy as jnp
import pytest
from absl import logging as absl_logging

import vir_jax
from vir_jax.runs.checkpoint import Checkpoints
from vir_jax.runs.config import default_config
from vir_jax.runs.log import quiet_libraries
from vir_jax.runs.state import TrainState

OURS = Path(vir_jax.__file__).parent


class Reader(logging.Handler):
    """What comes out of absl's log, as a program sees it that reads it by a handler of its own."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.records = []

    def emit(self, record):
        self.records.append(record)

    def others(self, level):
        """Lines of other code than ours."""
        return [r for r in self.records if r.levelno >= level and OURS not in Path(r.pathname).parents]

    def messages(self):
        return [record.getMessage() for record in self.records]


@pytest.fixture
def reader():
    """Absl's log at its most talkative, as it is before anyone has quietened it."""
    logger, handler = absl_logging.get_absl_logger(), absl_logging.get_absl_handler()
    asyncio_level, level = logging.getLogger("asyncio").level, logger.level
    filters = {each: list(each.filters) for each in (logger, handler)}
    for each in filters:
        each.filters.clear()
    logger.setLevel(logging.DEBUG)
    reading = Reader()
    logger.addHandler(reading)
    yield reading
    logger.removeHandler(reading)
    logger.setLevel(level)
    logging.getLogger("asyncio").setLevel(asyncio_level)
    for each, kept in filters.items():
        each.filters[:] = kept


def save_and_restore(workdir):
    """A checkpoint, written and read back."""
    params = {"w": jnp.ones(4)}
    state = TrainState(step=jnp.int32(1), params=params, opt_state={"m": params}, ema=None)
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(state, progress={}, config=default_config(), metadata={})
        checkpoints.finish()
        checkpoints.restore_params(1, weights="raw")


def test_libraries_are_not_heard_of_a_run_that_goes_well(reader, tmp_path):
    save_and_restore(tmp_path / "loud")
    assert len(reader.others(logging.INFO)) > 10  # Else there would be nothing to be quiet about.
    reader.records.clear()
    quiet_libraries()
    quiet_libraries()
    save_and_restore(tmp_path / "quiet")
    assert reader.others(logging.DEBUG) == []
    assert "the checkpoint of step 1 is complete" in reader.messages()


def test_their_failures_are(reader, tmp_path):
    """Said by the file that said most of the above."""
    save_and_restore(tmp_path)
    path = reader.others(logging.INFO)[0].pathname
    quiet_libraries()
    logger, handler = absl_logging.get_absl_logger(), absl_logging.get_absl_handler()
    for level, heard in ((logging.INFO, False), (logging.WARNING, False), (logging.ERROR, True)):
        record = logging.LogRecord("absl", level, path, 1, "no room", None, None)
        assert bool(logger.filter(record)) == heard
        assert bool(handler.filter(record)) == heard  # For a program that logs through absl alone.


def test_our_own_lines_are_kept(reader):
    quiet_libraries()
    absl_logging.info("step 1")
    record = logging.LogRecord(
        "absl", logging.INFO, str(OURS / "training" / "loop.py"), 1, "step 2", None, None
    )
    absl_logging.get_absl_logger().handle(record)
    assert reader.messages() == ["step 1", "step 2"]
