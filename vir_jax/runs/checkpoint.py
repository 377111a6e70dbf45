"""Checkpoints: parameters, their average, optimiser state, progress, config, metadata, written together.

One folder a step, one item a folder below it, so that evaluation reads the parameters alone; `checkpoint_reader` does.

A checkpoint's folder appears when all of it is written: under a temporary name until then, or in a bucket without the
object that is written last. `manifest` tells later whether it still is what was written. An evaluation is recorded
beside the weights that it was made of.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import jax
import ml_collections
import orbax.checkpoint as ocp
from absl import logging

from vir_jax.parallel.processes import any_process, decided_by_process_0
from vir_jax.runs.bucket import BucketError
from vir_jax.runs.checkpoint_reader import CheckpointReader, checkpoint_handler
from vir_jax.runs.evaluation_record import write_record
from vir_jax.runs.manifest import DamagedCheckpointError, verify, write_manifest
from vir_jax.runs.preemption import PreemptedError
from vir_jax.runs.state import TrainState
from vir_jax.runs.storage import RunPath

_DAMAGED = ".damaged"


class SaveError(RuntimeError):
    """The first or the last checkpoint of a run could not be written."""


class Checkpoints(CheckpointReader):
    """The checkpoints of a run, to write, read and go on from: the newest `keep`, and the one with the best evaluation.

    Saving is asynchronous; leaving the `with` block waits until everything is written. A save that fails (the disk is
    full) is logged and costs nothing but itself: the older checkpoints stay, and the next save tries again. Where there
    is none, the first save that fails stops the run: it would go on with nothing to show for it.

    Every process must make the same calls, as of a `CheckpointReader`.

    Raises:
      PathError: the workdir is neither a local folder nor one in a bucket.
      SaveError: a save failed and there is no checkpoint; or on leaving the block by its end or by `PreemptedError`,
        where the last save failed, in any process.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, keep: int = 1) -> None:
        self._keep = keep
        self._writes = jax.process_index() == 0
        self._writing: int | None = None  # The step of the save that has been started last.
        self._failure: Exception | None = None  # Of the last save.
        self._newest: int | None = None  # The newest checkpoint, as far as this object has seen.
        self._open(workdir)
        if self._writes:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            self._newest = self.latest_step()
        self._checkpointer = ocp.AsyncCheckpointer(
            checkpoint_handler(),
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
            try:
                if step in self.steps():
                    write_record(self._path(step), metrics, score=score, on=on or {})
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

    # ---------------------------------------------------------------- going on

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
            aside = self._put_aside(damaged)
            logging.error("%s\nIt is kept as %s; falling back to step %d", damage, aside.name, step)
        return step

    def _put_aside(self, step: int) -> RunPath:
        names = (f"{step}{_DAMAGED}{number}" for number in range(1, 10_000))
        aside = next(path for name in names if not (path := self._folder / name).exists())
        self._storage.set_aside(self._path(step), aside)
        return aside

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
        if error is None or isinstance(error, PreemptedError):
            self._check_saved(failure)
        elif failure is not None:
            logging.error("%s", failure)

    def _check_saved(self, failure: SaveError | None) -> None:
        if any_process(self._failure is not None):
            raise failure or SaveError(
                f"the last checkpoint could not be written: {self._failure or 'see the log of the other processes'}"
                f"\nThe newest one is of step {self._newest}; the same command goes on from there once there is room"
            ) from self._failure


@contextlib.contextmanager
def _outage_is_logged(consequence: str) -> Iterator[None]:
    """Log that a bucket did not answer: it costs training nothing but what it was asked."""
    try:
        yield
    except BucketError as error:
        logging.error("%s; %s", error, consequence)
