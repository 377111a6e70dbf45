import logging
from pathlib import Path

import grain
import orbax.checkpoint
import pytest

from vir_jax.runs.log import keep

INFO, WARNING, ERROR = logging.INFO, logging.WARNING, logging.ERROR
ORBAX = Path(orbax.checkpoint.__file__).parent / "manager.py"
GRAIN = Path(grain.__file__).parent / "dataset" / "iterator.py"
OURS = Path("/anywhere/jax/grain/vir_jax/training/loop.py")


@pytest.mark.parametrize(
    ("path", "level", "kept"),
    [
        (ORBAX, WARNING, False),
        (ORBAX, ERROR, True),
        (GRAIN, INFO, False),
        (GRAIN, WARNING, True),
        (OURS, INFO, True),
    ],
)
def test_what_is_kept(path, level, kept):
    assert keep(logging.LogRecord("absl", level, str(path), 1, "", None, None)) == kept
