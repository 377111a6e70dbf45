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
import os
from collections.abc import Collection, Iterator, Mapping
from types import TracebackType
from typing import Any

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

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


class SaveError(RuntimeError):
    """The first or the last checkpoint of a run could not be written."""


class NotEvaluatedError(ValueError):
    """The best checkpoint was asked for, and none was evaluated."""


class Checkpoints:
    """The checkpoints of a workdir: the newest `keep`, and the one with the best evaluated top-1.

    Saving is asynchronous; leaving the `with` block waits until everything is written. A save that fails (the disk is
    full) is logged and costs nothing but itself: the older checkpoints stay, and the next save tries again. Where there
    is none, the first save that fails stops the run: it would go on with nothing to show for it.

    Raises:
      FileNotFoundError: `read_only`, and there are no checkpoints.
      PathError: the workdir is neither a local folder nor one in a bucket.
      SaveError: a save failed and there is no checkpoint; or on leaving the block, where the last save failed.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, keep: int = 1, read_only: bool = False) -> None:
        self._folder = open_workdir(workdir) / FOLDER
        self._storage = storage_of(self._folder)
        if read_only and not self._folder.is_dir():
            raise FileNotFoundError(f"no checkpoints in {self._folder.parent}: {FOLDER}/ does not exist")
        self._keep = keep
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
                **{name: ocp.JsonCheckpointHandler() for name in ("progress", "config", "metadata")},
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
        """Starts to write a checkpoint of `state.step`, when the one before is written.

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
        """Waits until the save in progress is complete, or reports that it failed."""
        if self._writing is not None:
            try:
                self._checkpointer.wait_until_finished()
            except Exception as error:
                self._report(error)
            else:
                logging.info("the checkpoint of step %d is complete", self._writing)
                self._newest, self._writing = self._writing, None

    def failed(self) -> bool:
        """Whether the last save failed and should be tried again soon.

        Several processes find that out together, when the next save begins: until then it is False.
        """
        if jax.process_count() > 1:
            return False
        try:
            self._checkpointer.check_for_errors()
        except Exception as error:
            self._report(error)
        return self._failure is not None

    def record_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes what an evaluation of a checkpoint gave, `top1` in it, beside its weights, if they were saved."""
        self.finish()
        if self._writes:
            text = json.dumps({"metrics": dict(metrics), "sha256": _digest(metrics)}) + "\n"
            try:
                if step in self.steps():
                    self._storage.write(self._path(step) / EVALUATION, text)
            except OSError as error:
                logging.error("the evaluation of step %d was not recorded: %s", step, error)

    def _seal(self) -> None:
        """Called when everything is written, in process 0 alone, before the checkpoint gets its own name."""
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
        """Takes what other errors Orbax has of a save: it gives one at a time, and else with the next save."""
        while True:
            try:
                self._checkpointer.wait_until_finished()
            except Exception as error:
                logging.debug("of the same save: %s", error)
            else:
                return

    def _tidy(self) -> None:
        """Removes checkpoints that are neither new nor best, while none is being written."""
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
        """The steps of all checkpoints, ascending. Those that were put aside as damaged do not count."""
        paths = (path for path in self._folder.iterdir() if path.name.isdigit())
        return sorted(int(path.name) for path in paths if self._storage.committed(path))

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint that is complete; None if there is none."""
        return max(self.steps(), default=None)

    def newest_intact(self) -> int | None:
        """Step of the newest checkpoint that can be restored; None where none was ever finished.

        Damaged ones on the way are named in the log with the reason, and put aside under another name. Process 0
        decides for all.

        Raises:
          DamagedCheckpointError: there are checkpoints, and all of them are damaged.
        """
        self.finish()
        damages: dict[int, str] = {}
        chosen = None
        for step in reversed(self.steps()) if jax.process_index() == 0 else ():
            try:
                verify(self._path(step), step=step)
            except DamagedCheckpointError as error:
                damages[step] = str(error)
            else:
                chosen = step
                break
        # Steps are counted from 1.
        agreed = _of_process_0(chosen if chosen is not None else -1 if damages else 0)
        if agreed == -1:
            reasons = "".join(f"\n  {damage}" for damage in damages.values())
            raise DamagedCheckpointError(
                f"no checkpoint in {self._folder} can be restored:{reasons}\nStart in another workdir, or put intact"
                " copies back."
            )
        for step, damage in damages.items():
            aside = self._put_aside(step) if self._writes else self._path(step)
            logging.error("%s\nIt is kept as %s; falling back to step %d", damage, aside.name, agreed)
        self._newest = agreed or None
        return self._newest

    def _put_aside(self, step: int) -> RunPath:
        names = (f"{step}{_DAMAGED}{number}" for number in range(1, 10_000))
        aside = next(path for name in names if not (path := self._folder / name).exists())
        self._storage.set_aside(self._path(step), aside)
        return aside

    def resolve(self, which: str) -> int:
        """The step that "last", "best" or a number stands for.

        Raises:
          NotEvaluatedError: "best", where there are checkpoints but none was evaluated.
          ValueError: there is no such checkpoint; the ones there are, are named.
        """
        steps = self.steps()
        if which == "last":
            step = self.latest_step()
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

    def _best(self) -> int | None:
        """The first one with the highest evaluated top-1."""
        top1 = {step: metrics["top1"] for step in self.steps() if (metrics := self.metrics(step))}
        return max(top1, key=lambda step: top1[step], default=None)

    def metrics(self, step: int) -> dict[str, float] | None:
        """What the evaluation of a checkpoint gave; None where there was none, or its record is damaged."""
        path = self._path(step) / EVALUATION
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_text())
            metrics, digest = record["metrics"], record["sha256"]
        except BucketError:
            raise
        except (ValueError, KeyError, TypeError, OSError):
            metrics, digest = None, ""
        if metrics is None or _digest(metrics) != digest:
            logging.error("%s is damaged: the checkpoint counts as not evaluated", path)
            return None
        return metrics

    # ---------------------------------------------------------------- restoring

    def restore(self, target: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """State and progress of a checkpoint that `newest_intact` has found.

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
        """Items of arrays, by name, in the structure, shapes and shardings that are wanted of each."""
        stored = {name: self._stored(step, name) for name in wanted}
        targets = {name: as_stored(wanted[name], stored[name]) for name in wanted}
        items = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
        restored = self._checkpointer.restore(self._path(step), args=ocp.args.Composite(**items))
        return {name: from_stored(restored[name], wanted[name]) for name in wanted}

    def _stored(self, step: int, item: str) -> Any:
        """Shapes and dtypes of a checkpoint's item, nested as it was stored."""
        return ocp.StandardCheckpointHandler().metadata(self._path(step) / item).tree

    def restore_config(self, step: int) -> tuple[ml_collections.ConfigDict, dict[str, Any]]:
        """Return the config that a checkpoint was trained with, in today's fields, and the metadata saved with it.

        model.implementation is None in it: a kernel suits the machine that was trained on, not every one that reads.

        Raises:
          DamagedCheckpointError: these are not what was written.
          ValueError: the config has a field that this version does not know.
        """
        items = {"config": ocp.args.JsonRestore(), "metadata": ocp.args.JsonRestore()}
        self._verify(step, items)
        restored = self._checkpointer.restore(self._path(step), args=ocp.args.Composite(**items))
        config = migrate(restored.config, where=f"the checkpoint {self._path(step)}")
        config.model.implementation = None
        return config, restored.metadata

    def restore_params(self, step: int, *, weights: str, target: Params | None = None) -> Params:
        """The parameters alone, or their moving average.

        Args:
          step: which checkpoint.
          weights: "raw" or "ema".
          target: shapes, dtypes and shardings; None for the stored shapes on one device.

        Raises:
          ValueError: an unknown name, or an average where the run kept none.
          DamagedCheckpointError: the weights are not what was written.
        """
        if weights not in WEIGHTS:
            raise ValueError(f"weights {weights!r}: expected one of {WEIGHTS}")
        item = {"raw": "params", "ema": "ema"}[weights]
        if weights == "ema" and not self.has_ema(step):
            raise ValueError(f"the checkpoint of step {step} holds no EMA: the run had ema_decay = 0")
        self._verify(step, (item,))
        if target is None:
            one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            target = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one),
                self._stored(step, item),
            )
        return self._restore_arrays(step, {item: target})[item]

    def has_ema(self, step: int) -> bool:
        """Whether a checkpoint holds a moving average.

        Raises:
          DamagedCheckpointError: its manifest is gone or cannot be read.
        """
        return "ema" in written_items(self._path(step), step=step)

    def _verify(self, step: int, items: Collection[str]) -> None:
        """`verify`, in process 0 for all."""
        damage = None
        if jax.process_index() == 0:
            try:
                verify(self._path(step), step=step, items=items)
            except DamagedCheckpointError as error:
                others = [other for other in self.steps() if other != step]
                damage = f"{error}; other checkpoints there: {others or 'none'}"
        if not _of_process_0(damage is None):
            raise DamagedCheckpointError(
                damage or f"the checkpoint {self._path(step)} is damaged, says process 0"
            )

    def _path(self, step: int) -> RunPath:
        return self._folder / str(step)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.finish()
        except SaveError as failure:
            if error is None or isinstance(error, PreemptedError):  # Which says that the run was saved.
                raise
            logging.error("%s", failure)
        finally:
            self._tidy()
            self._checkpointer.close()
        if self._failure is not None and error is None:
            raise SaveError(
                f"the last checkpoint could not be written: {self._failure}\nThe newest one is of step"
                f" {self._newest}; the same command goes on from there once there is room"
            ) from self._failure


def has_checkpoints(workdir: RunPath) -> bool:
    """Return whether a workdir holds checkpoints, intact or not. Nothing is written."""
    folder = workdir / FOLDER
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


@contextlib.contextmanager
def _outage_is_logged(consequence: str) -> Iterator[None]:
    """A bucket that does not answer costs training nothing but what it was asked."""
    try:
        yield
    except BucketError as error:
        logging.error("%s; %s", error, consequence)


def _digest(metrics: Mapping[str, float]) -> str:
    return hashlib.sha256(json.dumps(dict(metrics), sort_keys=True).encode()).hexdigest()


def _of_process_0(value: int) -> int:
    """Process 0's number, on every process."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
