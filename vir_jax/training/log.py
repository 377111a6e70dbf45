"""What of the libraries' own log a user sees."""

import logging as standard_logging

from absl import logging

# Libraries that report every file they write, or every backend they do not find, at INFO.
_CHATTY = ("orbax", "grain", "jax")


def quiet_libraries() -> None:
    """Keeps warnings of chatty libraries and drops what they log below that. Calling it twice is harmless."""
    logging.get_absl_handler().addFilter(_drop_chatter)


def _drop_chatter(record: standard_logging.LogRecord) -> bool:
    chatty = any(f"/{library}/" in record.pathname.replace("\\", "/") for library in _CHATTY)
    return record.levelno >= standard_logging.WARNING or not chatty
