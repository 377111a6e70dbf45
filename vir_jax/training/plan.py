"""What a config makes on a mesh before any example is read or parameter allocated: shapes, shardings, the step."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import ml_collections
from jax.sharding import Mesh
from jaxtyping import Array, Key

from vir_jax.parallel.mesh import batch_sharding, check_divides
from vir_jax.parallel.sharding import state_shardings
from vir_jax.runs.model import ModelFunctions, image_size, model_functions
from vir_jax.runs.state import TrainState, create_train_state
from vir_jax.tasks import Task, make_task
from vir_jax.tasks.task import Batch
from vir_jax.training.gradients import check_reduce_dtype
from vir_jax.training.optimizer import learning_rate_schedule, make_optimizer, optimizer_options
from vir_jax.training.step import Metrics, StepConfig, make_train_step
from vir_jax.training.transfer import frozen_names, without_gradients


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """A run's computation.

    Attributes:
      mesh: over which it is split.
      task: what is learned.
      model: as pure functions.
      image_size: (height, width) of the training images, pixels.
      state: the train state's shapes, dtypes and shardings.
      batch: those of a global batch.
      init: key -> the state before the first step, born sharded.
      step: (state, batch) -> (state, metrics), not yet jitted.
    """

    mesh: Mesh
    task: Task
    model: ModelFunctions
    image_size: tuple[int, int]
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    init: Callable[[Key[Array, ""]], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

    def compile(self) -> jax.stages.Compiled:
        """Return the compiled step, which reuses the old state's memory; minutes where the model is large."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        step = jax.jit(self.step, donate_argnums=0, out_shardings=(shardings, None))
        with jax.set_mesh(self.mesh):
            return step.lower(self.state, self.batch).compile()


def check_on_mesh(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
    """Check that a valid config can run on a mesh: that its batches divide and its model can be traced there.

    No data are opened, nothing is compiled or allocated.

    Raises:
      ValueError: with the field and what it should be.
    """
    check_divides("config.batch_size", config.batch_size, mesh, slices=config.accumulation_steps)
    check_divides("config.eval_batch_size", config.eval_batch_size, mesh)
    task = make_task(config, ("one class", "another"))
    model = model_functions(config.model, task.num_outputs)
    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = batch_shapes(config.batch_size, image_size(config.model), mesh, per_pixel=task.per_pixel)
    with jax.set_mesh(mesh):
        check_reduce_dtype(config.reduce_dtype, apart=not model.has_statistics)
        try:
            jax.eval_shape(lambda params, batch: model.apply(params, task.inputs(batch)), params, batch)
        except ValueError as error:
            raise ValueError(f"config.model: {error}") from error


def make_plan(
    config: ml_collections.ConfigDict, mesh: Mesh, *, task: Task, steps_per_epoch: float
) -> TrainingPlan:
    """Build the model, optimiser and step of a config; nothing is compiled or allocated.

    Args:
      config: see `default_config`.
      mesh: its devices need not be on this machine.
      task: what is learned; `make_task` makes it.
      steps_per_epoch: optimiser steps per pass over the training data.

    Raises:
      ValueError: a config that cannot be run, with the field and what it should be.
    """
    check_divides("config.batch_size", config.batch_size, mesh, slices=config.accumulation_steps)
    model = model_functions(config.model, task.num_outputs)
    schedule = learning_rate_schedule(config, steps_per_epoch=steps_per_epoch)
    optimizer = make_optimizer(**optimizer_options(config.optim))
    train = without_gradients(model.train, frozen_names(config.optim.freeze))

    def init(key: Array) -> TrainState:
        return create_train_state(model.init(key), optimizer, ema=config.ema_decay > 0)

    shapes = jax.eval_shape(init, jax.random.key(0))
    shardings = state_shardings(shapes, mesh, model.axes)
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
    size = image_size(config.model)
    return TrainingPlan(
        mesh=mesh,
        task=task,
        model=model,
        image_size=size,
        state=state,
        batch=batch_shapes(config.batch_size, size, mesh, per_pixel=task.per_pixel),
        init=jax.jit(init, out_shardings=shardings),
        step=make_train_step(
            train, task, optimizer, schedule, step_config(config), apart=not model.has_statistics
        ),
    )


def step_config(config: ml_collections.ConfigDict) -> StepConfig:
    """Return what the train step takes from a run's config."""
    return StepConfig(
        seed=config.seed,
        accumulation_steps=config.accumulation_steps,
        reduce_dtype=config.reduce_dtype,
        ema_decay=config.ema_decay,
    )


def batch_shapes(
    batch_size: int, size: tuple[int, int], mesh: Mesh, *, per_pixel: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes of a global training batch, whose labels are masks where they are per pixel."""
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(mesh))
    label = shape((batch_size, *size), "uint8") if per_pixel else shape((batch_size,), "int32")
    return {"image": shape((batch_size, *size, 3), "uint8"), "label": label}
