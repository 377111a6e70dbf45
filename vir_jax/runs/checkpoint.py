"""Checkpoints: parameters, their average, optimiser state, progress, config, metadata, written together.

One folder a step, one item a folder below it, so that evaluation reads the parameters alone. Restoring
takes the shapes and shardings of the run that restores: any number of devices, whatever number wrote it.

A checkpoint's folder appears when all of it is written: under a temporary name until then, or in a bucket without the
object that is written last. `manifest` tells later whether it still is what was written. An evaluation is recorded
beside the weights that it was made of.
"""

import contextlib
import hashlib
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

from vir_jax.parallel.processes import any_process, decided_by_process_0
from vir_jax.runs.bucket import BucketError
from vir_jax.runs.manifest import DamagedCheckpointError, verify, write_manifest, written_items
from vir_jax.runs.migrations import migrate
from vir_jax.runs.parameter_names import as_stored, from_stored
from vir_jax.runs.preemption import PreemptedError
from vir_jax.runs.state import Params, TrainState
from vir_jax.runs.storage import RunPath, open_workdir, storage_of

FOLDER = "checkpoints"
EVALUATION = "evaluation.json"
WEIGHTS = ("raw", "ema")

_DAMAGED = ".damaged"
_JSON = "metadata"  # The file of an item that is JSON data.
_ATTEMPTS = 10  # To read a checkpoint while a run removes them.

T = TypeVar("T")


class SaveError(RuntimeError):
    """The first or the last checkpoint of a run could not be written."""


class NotEvaluatedError(ValueError):
    """The best checkpoint was asked for, and none was evaluated."""


class RemovedCheckpointError(RuntimeError):
    """A checkpoint was removed, by the run that it belongs to, while it was read."""


class Checkpoints:
    """The checkpoints of a workdir: the newest `keep`, and the one with the best evaluation.

    Saving is asynchronous; leaving the `with` block waits until everything is written. A save that fails (the disk is
    full) is logged and costs nothing but itself: the older checkpoints stay, and the next save tries again. Where there
    is none, the first save that fails stops the run: it would go on with nothing to show for it.

    Of several processes, process 0 alone looks at the files to decide anything, for all of them; every process must
    therefore make the same calls, but for `steps` and `latest_step`.

    Raises:
      FileNotFoundError: `read_only`, and there are no checkpoints.
      PathError: the workdir is neither a local folder nor one in a bucket.
      SaveError: a save failed and there is no checkpoint; or on leaving the block by its end or by `PreemptedError`,
        where the last save failed, in any process.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, keep: int = 1, read_only: bool = False) -> None:
        self._folder = open_workdir(workdir) / FOLDER
        self._storage = storage_of(self._folder)
        if read_only and not decided_by_process_0(self._folder.is_dir):
            raise FileNotFoundError(f"no checkpoints in {self._folder.parent}: {FOLDER}/ does not exist")
        self._keep = keep
        self._read_only = read_only
        self._writes = not read_only and jax.process_index() == 0
        self._writing: int | None = None  # The step of the save that has been started last.
        self._failure: Exception | None = None  # Of the last save.
        self._newest: int | None = None  # The newest checkpoint, as far as this object has seen.
        if self._writes:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            self._newest = self.latest_step()
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                **{name: ocp.StandardCheckpointHandler() for name in ("params", "ema", "optimizer")},
                **{name: ocp.JsonCheckpointHandler(_JSON) for name in ("progress", "config", "metadata")},
            ),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
        )

    # ---------------------------------------------------------------- saving

    def save(
        self,
        state: TrainState,
        *,
        progress: Mapping[str, Any],
        config: ml_collections.ConfigDict,
        metadata: Mapping[str, Any],
    ) -> None:
        """Start to write a checkpoint of `state.step`, when the one before is written.

        Args:
          state: the train state.
          progress: JSON data that goes with it: the data iterator's position, unfinished metrics.
          config: the run's.
          metadata: JSON data for whoever uses the weights: class names, versions.
        """
        items: dict[str, ocp.args.CheckpointArgs] = {
            "params": ocp.args.StandardSave(state.params),
            "optimizer": ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
            "progress": ocp.args.JsonSave(dict(progress)),
            "config": ocp.args.JsonSave(config.to_dict()),
            "metadata": ocp.args.JsonSave(dict(metadata)),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        self.finish()
        self._tidy()
        self._writing, self._failure = int(state.step), None
        try:
            self._checkpointer.save(self._path(self._writing), args=ocp.args.Composite(**items))
        except Exception as error:  # Whatever the storage raises: the run goes on, and says so.
            self._report(error)

    def finish(self) -> None:
        """Wait until the save in progress is complete, or report that it failed."""
        if self._writing is not None:
            try:
                self._checkpointer.wait_until_finished()
            except Exception as error:
                self._report(error)
            else:
                logging.info("the checkpoint of step %d is complete", self._writing)
                self._newest, self._writing = self._writing, None

    def failed(self) -> bool:
        """Return whether the last save failed and should be tried again soon.

        Several processes find that out together, when the next save begins: until then it is False.
        """
        if jax.process_count() > 1:
            return False
        try:
            self._checkpointer.check_for_errors()
        except Exception as error:
            self._report(error)
        return self._failure is not None

    def record_evaluation(
        self, step: int, metrics: Mapping[str, float], *, score: float, on: Mapping[str, Any] | None = None
    ) -> None:
        """Write what an evaluation of a checkpoint gave beside its weights, if they were saved.

        Args:
          step: which one.
          metrics: that it gave.
          score: the best checkpoint has the highest; NaN is never the best.
          on: JSON data of what was evaluated on (data, crop): only equals are compared for the best.
        """
        self.finish()
        if self._writes:
            record = {"metrics": dict(metrics), "score": score, "on": dict(on or {})}
            text = json.dumps({**record, "sha256": _digest(record)}) + "\n"
            try:
                if step in self.steps():
                    self._storage.write(self._path(step) / EVALUATION, text)
            except OSError as error:
                logging.error("the evaluation of step %d was not recorded: %s", step, error)

    def _seal(self) -> None:
        """Finish a checkpoint when all is written, in process 0 alone, before it gets its own name."""
        assert self._writing is not None
        write_manifest(self._storage.pending(self._path(self._writing)), step=self._writing)

    def _report(self, error: Exception) -> None:
        step, self._writing, self._failure = self._writing, None, error
        self._drain()
        failed = f"the checkpoint of step {step} was not written: {type(error).__name__}: {error}"
        if self._newest is None:
            raise SaveError(
                f"{failed}\nThere is no other in {self._folder}: the run stops here, and the same command starts it"
                " afresh once that is put right"
            ) from error
        logging.error(
            "%s\nTraining goes on and will try again; the newest checkpoint is of step %d",
            failed,
            self._newest,
        )
        if self._writes:
            with _outage_is_logged("what was written of it is not removed yet"):
                self._remove_leftovers()  # So that the next one finds their room.

    def _drain(self) -> None:
        """Take what other errors Orbax has of a save: it gives one at a time, and else with the next save."""
        while True:
            try:
                self._checkpointer.wait_until_finished()
            except Exception as error:
                logging.debug("of the same save: %s", error)
            else:
                return

    def _tidy(self) -> None:
        """Remove checkpoints that are neither new nor best, while none is being written."""
        if not self._writes:
            return
        with _outage_is_logged("old checkpoints stay"):
            self._remove_leftovers()
            steps = self.steps()
            for step in set(steps) - {*steps[-self._keep :], self._best()}:
                self._storage.retire(self._path(step))
            self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        for path in self._folder.iterdir():
            if self._storage.leftover(path):
                self._storage.remove(path)

    # ---------------------------------------------------------------- choosing

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, ascending. Those that were put aside as damaged do not count."""
        paths = (path for path in self._folder.iterdir() if path.name.isdigit())
        return sorted(int(path.name) for path in paths if self._storage.committed(path))

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint that is complete; None if there is none."""
        return max(self.steps(), default=None)

    def newest_intact(self) -> int | None:
        """Step of the newest checkpoint that can be restored; None where none was ever finished.

        Damaged ones on the way are named in the log with the reason, and put aside under another name.

        Raises:
          DamagedCheckpointError: there are checkpoints, and all of them are damaged.
        """
        self.finish()
        self._newest = decided_by_process_0(self._newest_intact, DamagedCheckpointError, BucketError)
        return self._newest

    def _newest_intact(self) -> int | None:
        damages: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                verify(self._path(step), step=step)
            except DamagedCheckpointError as error:
                damages[step] = str(error)
            else:
                break
        else:
            if not damages:
                return None
            reasons = "".join(f"\n  {damage}" for damage in damages.values())
            raise DamagedCheckpointError(
                f"no checkpoint in {self._folder} can be restored:{reasons}\nStart in another workdir, or put intact"
                " copies back."
            )
        for damaged, damage in damages.items():
            aside = self._put_aside(damaged) if self._writes else self._path(damaged)
            logging.error("%s\nIt is kept as %s; falling back to step %d", damage, aside.name, step)
        return step

    def _put_aside(self, step: int) -> RunPath:
        names = (f"{step}{_DAMAGED}{number}" for number in range(1, 10_000))
        aside = next(path for name in names if not (path := self._folder / name).exists())
        self._storage.set_aside(self._path(step), aside)
        return aside

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
        """Return the first one with the highest score of those evaluated on what the newest of them was."""
        records = {step: record for step in self.steps() if (record := self._record(step))}
        on = records[max(records)]["on"] if records else None
        scores = {
            step: record["score"]
            for step, record in records.items()
            if record["on"] == on and not math.isnan(record["score"])
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
        record = decided_by_process_0(lambda: self._record(step), BucketError)
        return record["metrics"] if record and on in (None, record["on"]) else None

    def _record(self, step: int) -> dict[str, Any] | None:
        """Return the intact record of an evaluation; None where there is none."""
        path = self._path(step) / EVALUATION
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
                json.loads((self._path(step) / name / _JSON).read_text()) for name in ("config", "metadata")
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

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failure: SaveError | None = None
        try:
            self.finish()
        except SaveError as first:
            failure = first
        finally:
            self._tidy()
            self._checkpointer.close()
        # "Preempted" says that the run was saved: not so where that failed.
        if not self._read_only and (error is None or isinstance(error, PreemptedError)):
            self._check_saved(failure)
        elif failure is not None:
            logging.error("%s", failure)

    def _check_saved(self, failure: SaveError | None) -> None:
        if any_process(self._failure is not None):
            raise failure or SaveError(
                f"the last checkpoint could not be written: {self._failure or 'see the log of the other processes'}"
                f"\nThe newest one is of step {self._newest}; the same command goes on from there once there is room"
            ) from self._failure


def has_checkpoints(workdir: RunPath) -> bool:
    """Return whether a workdir holds checkpoints, intact or not. Nothing is written. Every process must call it."""
    folder = workdir / FOLDER

    def look() -> bool:
        return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())

    return decided_by_process_0(look)


@contextlib.contextmanager
def _outage_is_logged(consequence: str) -> Iterator[None]:
    """Log that a bucket did not answer: it costs training nothing but what it was asked."""
    try:
        yield
    except BucketError as error:
        logging.error("%s; %s", error, consequence)


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(record), sort_keys=True).encode()).hexdigest()
