"""Checkpoints: parameters, their average, optimiser state, progress, config, metadata, written together.

One folder a step, one item a folder below it, so that evaluation reads the parameters alone. Restoring
takes the shapes and shardings of the run that restores: any number of devices, whatever number wrote it.
"""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import ml_collections
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from vir_jax.training.state import Params, TrainState

FOLDER = "checkpoints"
WEIGHTS = ("raw", "ema")


def _top1(metrics: Mapping[str, float]) -> float:
    return metrics["top1"]


class Checkpoints:
    """The checkpoints of a workdir: the newest `keep`, and the one with the best evaluated top-1.

    Saving is asynchronous; leaving the `with` block waits until everything is written.
    """

    def __init__(self, workdir: str | Path, *, keep: int = 1, read_only: bool = False) -> None:
        self._folder = Path(workdir).absolute() / FOLDER
        if read_only and not self._folder.is_dir():
            raise FileNotFoundError(f"no checkpoints in {self._folder.parent}: {FOLDER}/ does not exist")
        policies = [
            preservation_policy.LatestN(keep),
            preservation_policy.BestN(get_metric_fn=_top1, n=1, keep_checkpoints_without_metrics=False),
        ]
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                best_fn=_top1,
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                read_only=read_only,
            ),
            item_handlers={
                **{name: ocp.StandardCheckpointHandler() for name in ("params", "ema", "optimizer")},
                **{name: ocp.JsonCheckpointHandler() for name in ("progress", "config", "metadata")},
            },
        )

    def save(
        self,
        state: TrainState,
        *,
        progress: Mapping[str, Any],
        config: ml_collections.ConfigDict,
        metadata: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts to write a checkpoint of `state.step`.

        Args:
          state: the train state.
          progress: JSON data that goes with it: the data iterator's position, unfinished metrics.
          config: the run's.
          metadata: JSON data for whoever uses the weights: class names, versions.
          metrics: of an evaluation of this very state, `top1` among them; None if there was none.
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
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(**items),
            metrics=None if metrics is None else dict(metrics),
        )

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def resolve(self, which: str) -> int:
        """The step that "last", "best" or a number stands for.

        Raises:
          ValueError: there is no such checkpoint; the ones there are, are named.
        """
        steps = self._manager.all_steps()
        if which == "last":
            step = self._manager.latest_step()
        elif which == "best":
            scored = [step for step in steps if self._manager.metrics(step)]
            step = max(scored, key=lambda step: _top1(self._manager.metrics(step)), default=None)
        elif which.isdigit():
            step = int(which) if int(which) in steps else None
        else:
            raise ValueError(f"checkpoint {which!r}: expected 'last', 'best' or the number of a step")
        if step is None:
            raise ValueError(f"no checkpoint {which!r} in {self._folder}; steps there: {sorted(steps)}")
        return step

    def metrics(self, step: int) -> dict[str, float] | None:
        """What the evaluation of a checkpoint gave, if it was evaluated."""
        return self._manager.metrics(step)

    def restore(self, target: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """State and progress of a checkpoint.

        Args:
          target: shapes, dtypes and shardings to restore to (`jax.ShapeDtypeStruct` leaves).
          step: which one.
        """
        items: dict[str, ocp.args.CheckpointArgs] = {
            "params": ocp.args.StandardRestore(target.params),
            "optimizer": ocp.args.StandardRestore({"step": target.step, "opt_state": target.opt_state}),
            "progress": ocp.args.JsonRestore(),
        }
        if target.ema is not None:
            items["ema"] = ocp.args.StandardRestore(target.ema)
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        state = TrainState(
            step=restored.optimizer["step"],
            params=restored.params,
            opt_state=restored.optimizer["opt_state"],
            ema=restored.ema if target.ema is not None else None,
        )
        return state, restored.progress

    def restore_config(self, step: int) -> tuple[ml_collections.ConfigDict, dict[str, Any]]:
        """The config that a checkpoint was trained with, and the metadata saved with it."""
        items = {"config": ocp.args.JsonRestore(), "metadata": ocp.args.JsonRestore()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return ml_collections.ConfigDict(restored.config), restored.metadata

    def restore_params(self, step: int, *, weights: str, target: Params | None = None) -> Params:
        """The parameters alone, or their moving average.

        Args:
          step: which checkpoint.
          weights: "raw" or "ema".
          target: shapes, dtypes and shardings; None for the stored shapes on one device.

        Raises:
          ValueError: an unknown name, or an average where the run kept none.
        """
        if weights not in WEIGHTS:
            raise ValueError(f"weights {weights!r}: expected one of {WEIGHTS}")
        item = {"raw": "params", "ema": "ema"}[weights]
        if weights == "ema" and not self.has_ema(step):
            raise ValueError(f"the checkpoint of step {step} holds no EMA: the run had ema_decay = 0")
        if target is None:
            stored = self._manager.item_metadata(step)[item]
            one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            target = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), stored.tree
            )
        restored = self._manager.restore(
            step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(target)})
        )
        return restored[item]

    def has_ema(self, step: int) -> bool:
        """Whether a checkpoint holds a moving average."""
        return "ema" in self._manager.item_metadata(step)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.wait_until_finished()
        self._manager.close()
