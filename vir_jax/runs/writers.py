"""Where a run's metrics and images go besides its `metrics.jsonl`: one small protocol, a class for each place.

`config.writers` names them. "tensorboard" writes event files into the workdir; "wandb", "mlflow" and "trackio" hand
everything to these libraries, which find server, project and key in their own environment variables.
"""

import hashlib
import importlib
import io
import math
import os
import time
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from absl import logging
from jaxtyping import UInt8
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from vir_jax.extras import require
from vir_jax.runs.storage import RunPath, storage_of

Picture = UInt8[np.ndarray, "y x 3"]


@runtime_checkable
class Writer(Protocol):
    """A place that metrics and images are written to. What goes wrong there is logged; training goes on."""

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        """Write plain numbers by name."""

    def image(self, step: int, name: str, image: Picture) -> None:
        """Write one image."""

    def close(self) -> None:
        """Write what waits, and stop."""


def writer_names(names: str) -> tuple[str, ...]:
    """Return the writers of `config.writers`, names separated by commas."""
    return tuple(name for name in names.split(",") if name)


def check_installed(names: Sequence[str]) -> None:
    """Check that the packages of writers can be imported.

    Raises:
      MissingPackageError: one is not there.
    """
    for name in names:
        if name != "tensorboard":
            require(name, name)


def open_writers(
    names: Sequence[str], workdir: RunPath, *, start_step: int, config: Mapping[str, Any] | None = None
) -> list[Writer]:
    """Open the writers of a run that goes on after `start_step`.

    Args:
      names: keys of `WRITERS`.
      workdir: folder of the run, whose name is the run's name there.
      start_step: steps that were done before.
      config: of the run, for those that show it.
    """
    return [WRITERS[name](workdir, start_step, dict(config or {})) for name in names]


class TensorBoard:
    """Event files in `workdir/tensorboard`, without TensorFlow. Where the disk is full, values are lost."""

    def __init__(self, workdir: RunPath, start_step: int, config: Mapping[str, Any]) -> None:
        self._storage = storage_of(workdir)
        self._folder = workdir / "tensorboard"
        self._folder.mkdir(exist_ok=True)
        self._events: RecordWriter | None = None
        # TensorBoard then forgets what earlier files say of the steps that are done again.
        restart = SessionLog(status=SessionLog.START)
        self._add_event(Event(wall_time=time.time(), step=start_step + 1, session_log=restart))

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        """Write an event of all values."""
        summary = Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()])
        self._add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def image(self, step: int, name: str, image: Picture) -> None:
        """Write it as a PNG."""
        encoded = io.BytesIO()
        Image.fromarray(image).save(encoded, "PNG")
        height, width, _ = image.shape
        stored = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=encoded.getvalue()
        )
        summary = Summary(value=[Summary.Value(tag=name, image=stored)])
        self._add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def _add_event(self, event: Event) -> None:
        try:
            if self._events is None:
                # TensorBoard's EventFileWriter imports TensorFlow where that is installed; its RecordWriter does not.
                name = f"events.out.tfevents.{time.time_ns()}"
                file = self._storage.append(self._folder / name)
                self._events = RecordWriter(io.BufferedWriter(file))
                header = Event(wall_time=time.time(), file_version="brain.Event:2")
                self._events.write(header.SerializeToString())
            self._events.write(event.SerializeToString())
            self._events.flush()
        except OSError as error:
            logging.error("TensorBoard events: %s; a value is lost", error)
            self.close()  # What follows half a record cannot be read: go on in another file.

    def close(self) -> None:
        """Close the file."""
        if self._events is not None:
            try:
                self._events.close()
            except OSError as error:
                logging.error("TensorBoard events: %s; the last values are lost", error)
            self._events = None


class Experiments:
    """Weights & Biases, or trackio, which has the same functions: one run there for one workdir.

    Both keep the first value of a step: those that a stopped run did after its last checkpoint, and that are done
    again, stay as they were written first. The project is that of the environment (WANDB_PROJECT), or "vir_jax".
    """

    def __init__(self, library: ModuleType, options: Mapping[str, Any]) -> None:
        self._library, self._run = library, library.init(**options)

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        """Log all values."""
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, image: Picture) -> None:
        """Log an image."""
        self._run.log({name: self._library.Image(image)}, step=step)

    def close(self) -> None:
        """Wait until all is sent."""
        self._run.finish()


def _wandb(workdir: RunPath, start_step: int, config: Mapping[str, Any]) -> Writer:
    options = {"id": _identity(workdir), "name": workdir.name, "resume": "allow", "config": config}
    return Experiments(importlib.import_module("wandb"), {"project": _project(), **options})


def _trackio(workdir: RunPath, start_step: int, config: Mapping[str, Any]) -> Writer:
    options = {"name": workdir.name, "resume": "allow", "config": config}
    return Experiments(importlib.import_module("trackio"), {"project": _project(), **options})


class MLflow:
    """MLflow: one run there for one workdir, in the experiment of MLFLOW_EXPERIMENT_NAME, at MLFLOW_TRACKING_URI."""

    def __init__(self, workdir: RunPath, start_step: int, config: Mapping[str, Any]) -> None:
        self._library: Any = importlib.import_module("mlflow")
        tag, identity = "vir_jax.workdir", _identity(workdir)
        found = self._library.search_runs(filter_string=f"tags.`{tag}` = '{identity}'", output_format="list")
        if found:
            self._library.start_run(run_id=found[0].info.run_id)
        else:
            self._library.start_run(run_name=workdir.name, tags={tag: identity})
            self._library.log_params(config)

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        """Log the values that are finite."""
        self._library.log_metrics({k: float(v) for k, v in values.items() if math.isfinite(v)}, step=step)

    def image(self, step: int, name: str, image: Picture) -> None:
        """Log an image."""
        self._library.log_image(image, artifact_file=f"images/{name.replace('/', '_')}_{step}.png")

    def close(self) -> None:
        """End the run there."""
        self._library.end_run()


WRITERS: dict[str, Any] = {
    "tensorboard": TensorBoard,
    "wandb": _wandb,
    "mlflow": MLflow,
    "trackio": _trackio,
}
"""By name, what makes a writer of (workdir, start_step, config)."""


def _project() -> str:
    return os.environ.get("WANDB_PROJECT", "vir_jax")


def _identity(workdir: RunPath) -> str:
    """Return what a run is known by: the same when it goes on."""
    return hashlib.sha256(str(workdir).encode()).hexdigest()[:16]


def tiled(images: UInt8[np.ndarray, "num y x 3"], *, least: int = 64) -> UInt8[np.ndarray, "_y _x 3"]:
    """Return images side by side, a white line between them.

    Args:
      images: all of one size.
      least: pixels that the longer side of each has at least; smaller ones are enlarged by a whole number.
    """
    num, height, width, _ = images.shape
    zoom = max(1, least // max(height, width))
    cols = math.ceil(math.sqrt(num))
    tiles = np.full((math.ceil(num / cols) * cols, zoom * height + 1, zoom * width + 1, 3), 255, np.uint8)
    tiles[:num, :-1, :-1] = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    rows = tiles.reshape(-1, cols, *tiles.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(rows.reshape(-1, cols * tiles.shape[2], 3)[:-1, :-1])
