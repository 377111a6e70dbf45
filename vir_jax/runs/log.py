"""What of the libraries' own log a user sees."""

import logging as standard_logging
from pathlib import Path

import grain
import jax
import orbax.checkpoint
from absl import logging

# Folders of libraries that report every file they write, or every backend they do not find, and the lowest level
# that is kept of each. Orbax warns of every checkpoint without metrics; its failures are exceptions.
_KEPT = {
    Path(orbax.checkpoint.__file__).parent: standard_logging.ERROR,
    Path(grain.__file__).parent: standard_logging.WARNING,
    Path(jax.__file__).parent: standard_logging.WARNING,
}


def quiet_libraries() -> None:
    """Drop what chatty libraries log below the level that matters. Calling it twice is harmless."""
    # Of a save that fails, Orbax leaves every array's own failure to asyncio's log; the first is an exception.
    standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)
    logging.get_absl_handler().addFilter(keep)
    logging.get_absl_logger().addFilter(keep)  # In a program without absl's handler, such as a notebook.


def keep(record: standard_logging.LogRecord) -> bool:
    """Return whether a log record is shown."""
    folders = Path(record.pathname).parents
    return all(record.levelno >= level for folder, level in _KEPT.items() if folder in folders)
