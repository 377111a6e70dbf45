"""Metrics of a run: a JSONL file, the log, a progress bar on a terminal, and the writers that the run names."""

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import jax
from absl import logging
from tqdm import tqdm

from vir_jax.runs.storage import RunPath, open_workdir, storage_of
from vir_jax.runs.writers import Picture, Writer, open_writers

METRICS_FILE = "metrics.jsonl"


class ProgressBar(tqdm):
    """A progress bar without tqdm's thread, which would go on after it."""

    monitor_interval = 0


class MetricsWriter:
    """Writes scalars to `workdir/metrics.jsonl` and to writers, images to the writers; process 0 alone does.

    Where the disk is full, lines of the JSONL wait for room; TensorBoard loses them. In a bucket both appear now and
    then, and with `sync`.

    Args:
      workdir: folder of the run.
      start_step: where the run goes on. Lines of later steps, which a stopped run wrote after its last
        checkpoint, are taken out: those steps are done again. So is the evaluation of `start_step` itself, which
        the run writes again, from the checkpoint's record or a new one.
      total_steps: of the whole run, for the progress bar.
      writers: see `vir_jax.runs.writers`.
      config: of the run, for writers that show it.
    """

    def __init__(
        self,
        workdir: RunPath,
        *,
        start_step: int,
        total_steps: int,
        writers: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._storage = storage_of(workdir)
        self._path = workdir / METRICS_FILE
        _drop_lines_after(self._path, start_step)
        self._jsonl = self._storage.append(self._path)
        self._unwritten = b""
        self._writers: list[Writer] = open_writers(writers, workdir, start_step=start_step, config=config)
        self._bar = ProgressBar(
            total=total_steps,
            initial=start_step,
            unit="step",
            disable=not sys.stderr.isatty(),
            smoothing=0.05,
        )

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Write one line. Values are plain numbers; those that are not finite become null in the JSONL."""
        if not self._active:
            return
        line = {"step": step, **{k: v if math.isfinite(v) else None for k, v in values.items()}}
        self._unwritten += json.dumps(line).encode() + b"\n"
        self._flush()
        if "train/loss" in values:
            self._bar.set_postfix_str(f"loss {values['train/loss']:.3f}", refresh=False)
        for writer in self._writers:
            writer.scalars(step, values)
        logging.info("step %d: %s", step, "  ".join(f"{k}={_short(v)}" for k, v in values.items()))

    def image(self, step: int, name: str, image: Picture) -> None:
        """Write one image, where there is a writer that takes it."""
        if self._active:
            for writer in self._writers:
                writer.image(step, name, image)

    def _flush(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._jsonl.write(self._unwritten) or 0 :]
        except OSError as error:
            logging.error("%s: %s; %d bytes wait", self._path, error, len(self._unwritten))

    def sync(self) -> None:
        """Wait until readers find the lines so far; a checkpoint that is saved then does not miss them."""
        if self._active:
            try:
                self._jsonl.sync()
            except OSError as error:
                logging.error("%s", error)

    def advance(self) -> None:
        """Move the progress bar by a step."""
        if self._active:
            self._bar.update()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            self._bar.close()
            self._flush()
            try:
                self._jsonl.close()
            except OSError as failure:
                logging.error("%s: its last lines are lost", failure)
            for writer in self._writers:
                writer.close()


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, float | int | None]]:
    """Return the whole lines of a run's `metrics.jsonl`, in order.

    What follows the last end of a line is left out: it is being written, or waited for room on a full disk.
    """
    whole, _, _ = (open_workdir(workdir) / METRICS_FILE).read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def has_metrics(workdir: RunPath) -> bool:
    """Return whether a run has written metrics there."""
    path = workdir / METRICS_FILE
    return path.exists() and bool(path.read_bytes())


def _drop_lines_after(path: RunPath, step: int) -> None:
    """Keep whole lines of steps up to `step`, but for its evaluation; a line cut off by a kill goes as well."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            values = json.loads(line)
            evaluation = any(name.startswith("eval/") for name in values)
            if values["step"] < step or (values["step"] == step and not evaluation):
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            logging.warning("%s: dropped an incomplete line", path)
    storage_of(path).write(path, "".join(kept))


def _short(value: float | int) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


class MetricMeans:
    """Means of the step metrics since the last line was written; saved with every checkpoint.

    A run that is stopped and goes on then writes the very numbers of one that was never stopped.

    Attributes:
      skipped_steps: steps left out so far because of values that were not finite, in the whole run.
    """

    def __init__(
        self, sums: Mapping[str, float] | None = None, count: int = 0, skipped_steps: int = 0
    ) -> None:
        self.sums: dict[str, float] = dict(sums or {})
        self.count = count
        self.skipped_steps = skipped_steps

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add one step's values."""
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def pop_means(self) -> dict[str, float]:
        """Return the means, and begin anew."""
        means = {name: total / self.count for name, total in self.sums.items()}
        self.sums, self.count = {}, 0
        return means

    def state(self) -> dict[str, Any]:
        """Return JSON data that `MetricMeans(**state)` goes on from: a copy, written while the next step is added."""
        return {"sums": dict(self.sums), "count": self.count, "skipped_steps": self.skipped_steps}
