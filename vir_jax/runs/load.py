"""A trained model, read back from its run: where evaluation, inference, inspection and fine-tuning start from."""

import dataclasses
import functools
import os
from collections.abc import Callable

import jax
import ml_collections
from absl import logging
from jax.sharding import Mesh, SingleDeviceSharding

from vir_jax.models import VisionModel
from vir_jax.parallel.sharding import state_shardings
from vir_jax.runs.checkpoint_reader import CheckpointReader
from vir_jax.runs.model import ModelFunctions, model_functions
from vir_jax.runs.state import Params
from vir_jax.runs.storage import RunPath, open_workdir
from vir_jax.tasks import Task, make_task


@dataclasses.dataclass(frozen=True)
class Run:
    """A checkpoint of a run, as `load_run` reads it.

    Attributes:
      workdir: folder of the run.
      step: of the checkpoint.
      weights: which are in `params`: "raw", or "ema", their moving average.
      config: that the run was trained with, in today's fields.
      class_names: in the order of the logits.
      metrics: what the run's evaluation gave of this step (of the average, where one was kept); None where it was not
        evaluated.
      task: what it learned.
      functions: the model as pure functions of `params`.
      params: the weights.
      mesh: that they are split over; None where they are on one device.
    """

    workdir: RunPath
    step: int
    weights: str
    config: ml_collections.ConfigDict
    class_names: tuple[str, ...]
    metrics: dict[str, float] | None
    task: Task
    functions: ModelFunctions
    params: Params
    mesh: Mesh | None = None

    @functools.cached_property
    def model(self) -> VisionModel:
        """The model with these weights, as a module."""
        return self.functions.model(self.params)


def load_run(
    workdir: str | os.PathLike[str],
    checkpoint: str = "best",
    *,
    weights: str | None = None,
    mesh: Mesh | Callable[[ml_collections.ConfigDict], Mesh] | None = None,
) -> Run:
    """Read a checkpoint of a run, written by this version or an earlier one. Nothing is written.

    The run may go on meanwhile, and remove checkpoints; see `Checkpoints.read`. Every process must call it.

    Args:
      workdir: folder of the run.
      checkpoint: "best" by the figure of its task, "last", or the number of a step.
      weights: "raw" or "ema"; None takes the moving average where the run kept one.
      mesh: to split the weights over, as training does, or what makes one of the run's config; None puts them on one
        device.

    Raises:
      FileNotFoundError: the folder holds no checkpoints.
      NotEvaluatedError: the best one was asked for, and none was evaluated.
      ValueError: no such checkpoint or weights; or a config with a field that this version does not know.
      DamagedCheckpointError: the checkpoint is not what was written.
      RemovedCheckpointError: the run removed it while it was read.
    """

    def read(step: int) -> Run:
        config, metadata = checkpoints.restore_config(step)
        kind = weights or ("ema" if checkpoints.has_ema(step) else "raw")
        # Ahead of the weights: where these are there, the record was.
        metrics = checkpoints.metrics(step)
        task = make_task(config, metadata["class_names"])
        functions = model_functions(config.model, task.num_outputs)
        shapes = jax.eval_shape(functions.init, jax.random.key(0))
        over = mesh if mesh is None or isinstance(mesh, Mesh) else mesh(config)
        one = SingleDeviceSharding(jax.local_devices()[0])
        if over is None:
            shardings = jax.tree.map(lambda leaf: one, shapes)
        else:
            shardings = state_shardings(shapes, over, functions.axes)
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            shardings,
        )
        return Run(
            workdir=open_workdir(workdir),
            step=step,
            weights=kind,
            config=config,
            class_names=tuple(metadata["class_names"]),
            metrics=metrics,
            task=task,
            functions=functions,
            params=checkpoints.restore_params(step, weights=kind, target=target),
            mesh=over,
        )

    with CheckpointReader(workdir) as checkpoints:
        run = checkpoints.read(checkpoint, read)
    logging.info(
        "read the %s weights of step %d in %s: %s",
        run.weights,
        run.step,
        workdir,
        f"{run.task.best} {run.metrics[run.task.best]:.4f} when it was trained"
        if run.metrics
        else "not evaluated when it was trained",
    )
    return run
