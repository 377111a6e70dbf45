"""Metrics of a run: a JSONL file, TensorBoard event files, the log, and a progress bar on a terminal."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from absl import logging
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Writes scalars to `workdir/metrics.jsonl` and `workdir/tensorboard`; process 0 alone does.

    Args:
      workdir: folder of the run.
      start_step: where the run goes on. Lines of later steps, which a stopped run wrote after its last
        checkpoint, are taken out: those steps are done again.
      total_steps: of the whole run, for the progress bar.
    """

    def __init__(self, workdir: Path, *, start_step: int, total_steps: int) -> None:
        self._active = jax.process_index() == 0
        if not self._active:
            return
        path = workdir / METRICS_FILE
        _drop_lines_after(path, start_step)
        self._jsonl = path.open("a")
        # TensorBoard's EventFileWriter imports TensorFlow where that is installed; its RecordWriter does not.
        events = workdir / "tensorboard" / f"events.out.tfevents.{time.time_ns()}"
        events.parent.mkdir(exist_ok=True)
        self._events = RecordWriter(events.open("wb"))
        self._add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # TensorBoard then forgets what earlier files say of the steps that are done again.
        restart = SessionLog(status=SessionLog.START)
        self._add_event(Event(wall_time=time.time(), step=start_step + 1, session_log=restart))
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            disable=not sys.stderr.isatty(),
            smoothing=0.05,
        )

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Writes one line. Values are plain numbers; those that are not finite become null in the JSONL."""
        if not self._active:
            return
        line = {"step": step, **{k: v if math.isfinite(v) else None for k, v in values.items()}}
        self._jsonl.write(json.dumps(line) + "\n")
        self._jsonl.flush()
        if "train/loss" in values:
            self._bar.set_postfix_str(f"loss {values['train/loss']:.3f}", refresh=False)
        summary = Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()])
        self._add_event(Event(wall_time=time.time(), step=step, summary=summary))
        logging.info("step %d: %s", step, "  ".join(f"{k}={_short(v)}" for k, v in values.items()))

    def _add_event(self, event: Event) -> None:
        self._events.write(event.SerializeToString())
        self._events.flush()

    def advance(self) -> None:
        """Moves the progress bar by a step."""
        if self._active:
            self._bar.update()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            self._bar.close()
            self._jsonl.close()
            self._events.close()


def read_metrics(workdir: str | Path) -> list[dict[str, float | int | None]]:
    """The lines of a run's `metrics.jsonl`, in order."""
    return [json.loads(line) for line in (Path(workdir) / METRICS_FILE).read_text().splitlines()]


def _drop_lines_after(path: Path, step: int) -> None:
    """Keeps whole lines of steps up to `step`; a line cut off by a kill goes as well."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            logging.warning("%s: dropped an incomplete line", path)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def _short(value: float | int) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


class Window:
    """Means of the step metrics since the last line was written; saved with every checkpoint.

    A run that is stopped and goes on then writes the very numbers of one that was never stopped.
    """

    def __init__(self, sums: Mapping[str, float] | None = None, count: int = 0) -> None:
        self.sums: dict[str, float] = dict(sums or {})
        self.count = count

    def add(self, metrics: Mapping[str, float]) -> None:
        """Adds one step's values."""
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def pop_means(self) -> dict[str, float]:
        """The means, and an empty window again."""
        means = {name: total / self.count for name, total in self.sums.items()}
        self.sums, self.count = {}, 0
        return means

    def state(self) -> dict[str, Any]:
        """JSON data that `Window(**state)` goes on from."""
        return {"sums": self.sums, "count": self.count}
