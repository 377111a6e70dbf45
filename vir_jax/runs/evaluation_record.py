"""What an evaluation of a checkpoint gave, in a file beside its weights."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from absl import logging

from vir_jax.runs.bucket import BucketError
from vir_jax.runs.storage import RunPath, storage_of

FILE = "evaluation.json"


def write_record(
    checkpoint: RunPath, metrics: Mapping[str, float], *, score: float, on: Mapping[str, Any]
) -> None:
    """Write what an evaluation gave.

    Args:
      checkpoint: its folder.
      metrics: that it gave.
      score: the best checkpoint has the highest.
      on: JSON data of what was evaluated on.
    """
    record = {"metrics": dict(metrics), "score": score, "on": dict(on)}
    text = json.dumps({**record, "sha256": _digest(record)}) + "\n"
    storage_of(checkpoint).write(checkpoint / FILE, text)


def read_record(checkpoint: RunPath) -> dict[str, Any] | None:
    """Return "metrics", "score" and "on" as they were written; None where there is no intact record.

    Args:
      checkpoint: its folder.
    """
    path = checkpoint / FILE
    try:
        record = json.loads(path.read_text())
        digest = record.pop("sha256")
        # Earlier versions knew classification alone, and the first of them did not say what was evaluated on.
        if record.keys() == {"metrics"} and digest == _digest(record["metrics"]):
            return {**record, "score": record["metrics"]["top1"], "on": {}}
        if record.keys() == {"metrics", "on"} and digest == _digest(record):
            return {**record, "score": record["metrics"]["top1"]}
        if record.keys() == {"metrics", "score", "on"} and digest == _digest(record):
            return record
    except BucketError:
        raise
    except FileNotFoundError:  # Not evaluated, or removed meanwhile.
        return None
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        pass
    logging.error("%s is damaged: the checkpoint counts as not evaluated", path)
    return None


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(record), sort_keys=True).encode()).hexdigest()
