"""Reading checkpoints: which there are, which is the best, and what is in them, beside a run that goes on.

`checkpoint` says what a checkpoint is. Restoring takes the shapes and shardings of the run that restores: any number of
devices, whatever number wrote it.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from types import TracebackType
from typing import Any, TypeVar

import jax
import ml_collections
import orbax.checkpoint as ocp
from absl import logging

from vir_jax.parallel.processes import decided_by_process_0
from vir_jax.runs.bucket import BucketError
from vir_jax.runs.evaluation_record import read_record
from vir_jax.runs.manifest import DamagedCheckpointError, verify, written_items
from vir_jax.runs.migrations import migrate
from vir_jax.runs.parameter_names import as_stored, from_stored
from vir_jax.runs.state import Params, TrainState
from vir_jax.runs.storage import RunPath, open_workdir, storage_of

FOLDER = "checkpoints"
WEIGHTS = ("raw", "ema")
ARRAYS = ("params", "ema", "optimizer")  # Items of a checkpoint.
JSON = ("progress", "config", "metadata")
JSON_FILE = "metadata"  # Of an item that is JSON data.

_ATTEMPTS = 10  # To read a checkpoint while a run removes them.

T = TypeVar("T")
R = TypeVar("R", bound="CheckpointReader")


class NotEvaluatedError(ValueError):
    """The best checkpoint was asked for, and none was evaluated."""


class RemovedCheckpointError(RuntimeError):
    """A checkpoint was removed, by the run that it belongs to, while it was read."""


class CheckpointReader:
    """The checkpoints of a workdir, to read.

    Of several processes, process 0 alone looks at the files to decide anything, for all of them; every process must
    therefore make the same calls, but for `steps` and `latest_step`.

    Raises:
      FileNotFoundError: there are no checkpoints.
      PathError: the workdir is neither a local folder nor one in a bucket.
    """

    def __init__(self, workdir: str | os.PathLike[str]) -> None:
        self._open(workdir)
        if not decided_by_process_0(self._folder.is_dir):
            raise FileNotFoundError(f"no checkpoints in {self._folder.parent}: {FOLDER}/ does not exist")
        self._checkpointer: ocp.Checkpointer = ocp.Checkpointer(checkpoint_handler())

    def _open(self, workdir: str | os.PathLike[str]) -> None:
        self._folder = open_workdir(workdir) / FOLDER
        self._storage = storage_of(self._folder)

    # ---------------------------------------------------------------- choosing

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, ascending. Those that were put aside as damaged do not count."""
        paths = (path for path in self._folder.iterdir() if path.name.isdigit())
        return sorted(int(path.name) for path in paths if self._storage.committed(path))

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint that is complete; None if there is none."""
        return max(self.steps(), default=None)

    def resolve(self, which: str) -> int:
        """Return the step that "last", "best" or a number stands for.

        Raises:
          NotEvaluatedError: "best", where there are checkpoints but none was evaluated.
          ValueError: there is no such checkpoint; the ones there are, are named.
        """
        return decided_by_process_0(lambda: self._resolve(which), NotEvaluatedError, ValueError, BucketError)

    def _resolve(self, which: str) -> int:
        # Beside a run, one listing of the folder may miss both the old checkpoint, removed, and the new one.
        steps = self.steps() or self.steps()
        if which == "last":
            step = max(steps, default=None)
        elif which == "best":
            step = self._best()
            if steps and step is None:
                raise NotEvaluatedError(
                    f"no checkpoint in {self._folder} is the best: none was evaluated; choose 'last' or one of the"
                    f" steps there: {steps}"
                )
        elif which.isdigit():
            step = int(which) if int(which) in steps else None
        else:
            raise ValueError(f"checkpoint {which!r}: expected 'last', 'best' or the number of a step")
        if step is None:
            raise ValueError(f"no checkpoint {which!r} in {self._folder}; steps there: {steps}")
        return step

    def read(self, which: str, function: Callable[[int], T]) -> T:
        """Return `function(step)` of a checkpoint, beside a run that goes on writing and removing them.

        The checkpoint that was the last or the best may be removed before all of it is read: the next one is taken.

        Args:
          which: see `resolve`.
          function: reads what it needs of a step with the methods below; it may be called again for another one.

        Raises:
          RemovedCheckpointError: the step that was asked for by its number was removed meanwhile, or again and again
            the one that was the last or the best.
          ValueError: see `resolve`.
        """
        for _ in range(_ATTEMPTS - 1):
            step = self.resolve(which)
            try:
                return function(step)
            except RemovedCheckpointError as error:
                if which.isdigit():
                    raise
                logging.info("%s; taking the one that is the %s now", error, which)
        return function(self.resolve(which))

    def _best(self) -> int | None:
        """Return the first one with the highest score of those evaluated on what the newest of them was.

        Further evaluation sets say nothing of the score.
        """
        records = {step: record for step in self.steps() if (record := read_record(self._path(step)))}
        on = {step: {**record["on"], "evaluations": None} for step, record in records.items()}
        scores = {
            step: record["score"]
            for step, record in records.items()
            if on[step] == on[max(records)] and not math.isnan(record["score"])
        }
        return max(scores, key=lambda step: scores[step], default=None)

    def metrics(self, step: int, *, on: Mapping[str, Any] | None = None) -> dict[str, float] | None:
        """Return what the evaluation of a checkpoint gave.

        Args:
          step: which one.
          on: what it must have been made on; None: anything.

        Returns:
          The metrics; None where there was no such evaluation, or its record is damaged.
        """
        record = decided_by_process_0(lambda: read_record(self._path(step)), BucketError)
        return record["metrics"] if record and on in (None, record["on"]) else None

    # ---------------------------------------------------------------- restoring

    def restore(self, target: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """Restore state and progress of a checkpoint that `newest_intact` has found.

        Args:
          target: shapes, dtypes and shardings to restore to (`jax.ShapeDtypeStruct` leaves).
          step: which one.
        """
        wanted = {
            "params": target.params,
            "optimizer": {"step": target.step, "opt_state": target.opt_state},
        }
        if target.ema is not None:
            wanted["ema"] = target.ema
        arrays = self._restore_arrays(step, wanted)
        progress = ocp.args.Composite(progress=ocp.args.JsonRestore())
        state = TrainState(
            step=arrays["optimizer"]["step"],
            params=arrays["params"],
            opt_state=arrays["optimizer"]["opt_state"],
            ema=arrays.get("ema"),
        )
        return state, self._checkpointer.restore(self._path(step), args=progress).progress

    def _restore_arrays(self, step: int, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Restore items of arrays, by name, in the structure, shapes and shardings that are wanted of each."""
        stored = {name: self._stored(step, name) for name in wanted}
        targets = {name: as_stored(wanted[name], stored[name]) for name in wanted}
        items = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
        restored = self._checkpointer.restore(self._path(step), args=ocp.args.Composite(**items))
        return {name: from_stored(restored[name], wanted[name]) for name in wanted}

    def _stored(self, step: int, item: str) -> Any:
        """Return shapes and dtypes of a checkpoint's item, nested as it was stored."""
        return ocp.StandardCheckpointHandler().metadata(self._path(step) / item).tree

    def restore_config(self, step: int) -> tuple[ml_collections.ConfigDict, dict[str, Any]]:
        """Return the config that a checkpoint was trained with, in today's fields, and the metadata saved with it.

        model.implementation is None in it: a kernel suits the machine that was trained on, not every one that reads.

        Raises:
          DamagedCheckpointError: these are not what was written.
          RemovedCheckpointError: the checkpoint is gone.
          ValueError: the config has a field that this version does not know.
        """

        def read() -> list[dict[str, Any]]:
            self._verify(step, ("config", "metadata"))
            return [
                json.loads((self._path(step) / name / JSON_FILE).read_text())
                for name in ("config", "metadata")
            ]

        stored, metadata = self._decided(step, read)
        config = migrate(stored, where=f"the checkpoint {self._path(step)}")
        config.model.implementation = None
        return config, metadata

    def restore_params(self, step: int, *, weights: str, target: Params | None = None) -> Params:
        """Return the parameters alone, or their moving average.

        Args:
          step: which checkpoint.
          weights: "raw" or "ema".
          target: shapes, dtypes and shardings; None for the stored shapes on one device.

        Raises:
          ValueError: an unknown name, or an average where the run kept none.
          DamagedCheckpointError: the weights are not what was written.
          RemovedCheckpointError: the checkpoint is gone.
        """
        if weights not in WEIGHTS:
            raise ValueError(f"weights {weights!r}: expected one of {WEIGHTS}")
        item = {"raw": "params", "ema": "ema"}[weights]
        if weights == "ema" and not self.has_ema(step):
            raise ValueError(f"the checkpoint of step {step} holds no EMA: the run had ema_decay = 0")
        self._decided(step, lambda: self._verify(step, (item,)))
        with self._reading(step):
            if target is None:
                one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
                target = jax.tree.map(
                    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one),
                    self._stored(step, item),
                )
            return self._restore_arrays(step, {item: target})[item]

    def has_ema(self, step: int) -> bool:
        """Return whether a checkpoint holds a moving average.

        Raises:
          DamagedCheckpointError: its manifest is gone or cannot be read.
          RemovedCheckpointError: the checkpoint is gone.
        """
        return self._decided(step, lambda: "ema" in written_items(self._path(step), step=step))

    def _decided(self, step: int, decide: Callable[[], T]) -> T:
        """Return what process 0 reads of a checkpoint, for all."""

        def read() -> T:
            with self._reading(step):
                return decide()

        return decided_by_process_0(read, DamagedCheckpointError, RemovedCheckpointError, BucketError)

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Say of whatever goes wrong in reading a checkpoint that it was removed meanwhile, where it was."""
        try:
            yield
        except Exception as error:
            if isinstance(error, BucketError) or self._storage.committed(self._path(step)):
                raise
            raise RemovedCheckpointError(
                f"the checkpoint of step {step} in {self._folder} was removed by the run meanwhile; steps there now:"
                f" {self.steps()}"
            ) from error

    def _verify(self, step: int, items: Collection[str]) -> None:
        """Verify a checkpoint, and name the other checkpoints where this one is damaged."""
        try:
            verify(self._path(step), step=step, items=items)
        except DamagedCheckpointError as error:
            others = [other for other in self.steps() if other != step]
            raise DamagedCheckpointError(f"{error}; other checkpoints there: {others or 'none'}") from error

    def _path(self, step: int) -> RunPath:
        return self._folder / str(step)

    def __enter__(self: R) -> R:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._checkpointer.close()


def checkpoint_handler() -> ocp.CompositeCheckpointHandler:
    """Return what Orbax writes and reads the items of a checkpoint with."""
    return ocp.CompositeCheckpointHandler(
        **{name: ocp.StandardCheckpointHandler() for name in ARRAYS},
        **{name: ocp.JsonCheckpointHandler(JSON_FILE) for name in JSON},
    )


def has_checkpoints(workdir: RunPath) -> bool:
    """Return whether a workdir holds checkpoints, intact or not. Nothing is written. Every process must call it."""
    folder = workdir / FOLDER

    def look() -> bool:
        return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())

    return decided_by_process_0(look)
