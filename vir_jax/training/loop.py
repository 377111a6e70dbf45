"""The training loop."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, UInt8

import vir_jax
from vir_jax.data import AugmentConfig, Source, check_examples, train_loader
from vir_jax.models import VisionModel
from vir_jax.parallel.mesh import local_rows, make_mesh, put_batch
from vir_jax.parallel.processes import check_equal, decided_by_process_0, sum_over_processes
from vir_jax.paths import check_paths
from vir_jax.runs.checkpoint import Checkpoints
from vir_jax.runs.checkpoint_reader import has_checkpoints
from vir_jax.runs.config import flatten
from vir_jax.runs.evaluation_sets import default_set, named_sets
from vir_jax.runs.lock import exclusive
from vir_jax.runs.log import quiet_libraries
from vir_jax.runs.metrics import MetricMeans, MetricsWriter, has_metrics
from vir_jax.runs.preemption import PreemptedError, Preemption
from vir_jax.runs.state import TrainState
from vir_jax.runs.storage import RunPath, open_workdir
from vir_jax.runs.validate import validate
from vir_jax.runs.workdir import check_config, check_resumable, write_config
from vir_jax.runs.writers import check_installed, tiled, writer_names
from vir_jax.tasks import Task, find_task, make_task
from vir_jax.training.clock import Clock
from vir_jax.training.evaluate import Evaluator, check_task
from vir_jax.training.evaluation_data import evaluation_batches, open_evaluation
from vir_jax.training.finetune import Pretrained, read_pretrained, start_from
from vir_jax.training.plan import TrainingPlan, check_on_mesh, make_plan
from vir_jax.training.profile import Profiler
from vir_jax.training.start import check_same_data, data_identity, open_sources
from vir_jax.training.summary import summarize

# Images of the first batch that the writers are given, at most.
SHOWN = 64

Draw: TypeAlias = Callable[[VisionModel, Task, int, int], UInt8[np.ndarray, "num y x 3"]]
"""Of a model, the task that it was trained for, how many images and a seed."""


class NonFiniteError(RuntimeError):
    """A step's loss or gradients were not finite."""


def train(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    train_source: Source | None = None,
    eval_source: Source | None = None,
    draw: Draw | None = None,
) -> dict[str, float]:
    """Train a model, or go on with the run that the workdir holds.

    On SIGTERM the run saves after the step it is at, and stops. A run that is finished is not trained again: its
    metrics are those on record.

    Args:
      config: see `default_config`.
      workdir: folder of checkpoints, metrics and the config, made if absent: a local one, or gs://bucket/folder.
      train_source: examples to train on; None opens `config.data`.
      eval_source: examples to evaluate on; None opens `config.data`.
      draw: draws the images that `config.sample_images` asks for, `vir_jax.generation.workdir.draw_samples`.

    Returns:
      The metrics of the final evaluation: the task's, and the count of examples; of a further evaluation set under its
      name, "name/top1".

    Raises:
      ValueError: a config that cannot be run, with the field and what it should be.
      NonFiniteError: more than `config.max_skipped_steps` steps with a loss, gradient or update that is not finite.
        Such a step is not applied; the newest checkpoint is of a step before it.
      PreemptedError: SIGTERM came, and the run is saved; the same call goes on from there.
      PathError: the workdir or a path in the config is blank, or of a kind that is not read (a `ValueError`).
      TooManyCorruptError: more corrupt examples than `config.data.max_corrupt_fraction` allows.
      WorkdirInUseError: another run holds the workdir.
      DamagedCheckpointError: there are checkpoints, and none can be restored.
      SaveError: the first checkpoint could not be written; or training went through, or SIGTERM came, but the last one
        could not be written.
    """
    # All of the config first: nothing is opened, compiled or written for one that cannot be run.
    validate(config)
    check_paths(config)
    check_installed(writer_names(config.writers))
    _check_draws(config, draw)
    folder = open_workdir(workdir)
    mesh = make_mesh(**config.mesh)
    check_on_mesh(config, mesh)
    with exclusive(folder) as check_lock, Preemption() as preemption:
        return _train(config, mesh, folder, check_lock, preemption, train_source, eval_source, draw)


def _train(
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    workdir: RunPath,
    check_lock: Callable[[], None],
    preemption: Preemption,
    train_source: Source | None,
    eval_source: Source | None,
    draw: Draw | None,
) -> dict[str, float]:
    # ------------------------------------------------------------------ config, data
    quiet_libraries()
    knows_config = check_config(workdir, config)
    data = config.data
    given = train_source, eval_source
    per_pixel = find_task(config.task).per_pixel
    train_source, eval_source = open_sources(data, train_source, eval_source, per_pixel=per_pixel)
    task = make_task(config, train_source.class_names)
    further = [open_evaluation(one, task, train_source.class_names) for one in named_sets(config)]
    opened = [source for source, was in zip((train_source, eval_source), given, strict=True) if was is None]
    for source in (*opened, *(one.source for one in further)):
        # Too many corrupt examples are told here, not after the last step.
        check_examples(source, max_corrupt_fraction=data.max_corrupt_fraction, num_threads=data.threads)
    check_equal(
        {
            "training examples": len(train_source),
            "evaluation examples": len(eval_source),
            **{f"examples of the evaluation set {one.name}": len(one.source) for one in further},
            "class names": list(train_source.class_names),
        }
    )
    if len(train_source) < config.batch_size:
        raise ValueError(
            f"the training data has {len(train_source)} examples, fewer than one batch of"
            f" {config.batch_size}; lower config.batch_size"
        )
    steps_per_epoch = len(train_source) / config.batch_size
    total_steps = max(1, round((config.epochs + config.optim.cooldown_epochs) * steps_per_epoch))

    # ------------------------------------------------------------------ model, optimiser, step; nothing compiled yet
    plan = make_plan(config, mesh, task=task, steps_per_epoch=steps_per_epoch)
    check_task(task, plan.model.apply, plan.state.params, plan.batch)
    forward_flops = plan.model.flops(plan.image_size)
    train_flops = forward_flops and 3 * forward_flops  # The backward pass costs twice the forward one.
    metadata = {
        **data_identity(train_source),
        "vir_jax": vir_jax.__version__,
        "jax": jax.__version__,
        "device_kind": jax.devices()[0].device_kind,
    }
    pretrained: Pretrained = {}
    if config.init_from and not has_checkpoints(workdir):
        pretrained = read_pretrained(config, shapes=plan.state.params, class_names=train_source.class_names)

    batches = train_loader(
        train_source,
        batch_size=config.batch_size,
        image_size=plan.image_size,
        augment=AugmentConfig(**config.augment, mean=data.mean, std=data.std),
        seed=config.seed,
        rows=local_rows(mesh, config.batch_size),
        num_threads=data.threads,
        max_corrupt_fraction=data.max_corrupt_fraction,
        background=tuple(data.background),
    )
    own_data = open_evaluation(default_set(config), task, train_source.class_names, source=eval_source)
    evaluations = [
        (one, evaluation_batches(config, one.source, mesh, image_size=plan.image_size))
        for one in (own_data, *further)
    ]
    # Threads that load end with the block, however it is left.
    with contextlib.closing(batches), Checkpoints(workdir, keep=config.keep_checkpoints) as checkpoints:
        start = find_start(
            checkpoints, config, total_steps, workdir=workdir, metadata=metadata, knows_config=knows_config
        )

        # -------------------------------------------------------------- evaluation
        evaluated_on = {name: data[name] for name in ("dataset", "eval_split", "crop_fraction")}
        if further:
            evaluated_on["evaluations"] = json.loads(config.to_json())["evaluations"]
        results = checkpoints.metrics(start, on=evaluated_on) or {}
        evaluator = Evaluator(
            task,
            plan.model.apply,
            mesh,
            batch_size=config.eval_batch_size,
            modes=[config.model.mode],
        )

        def evaluation_due(step: int) -> bool:
            return step == total_steps or (config.eval_every > 0 and step % config.eval_every == 0)

        def evaluate_step(step: int, state: TrainState) -> dict[str, float]:
            weights = state.params if state.ema is None else state.ema
            metrics: dict[str, float] = {}
            for one, examples in evaluations:
                evaluated = evaluator(weights, examples, task=one.task, check=preemption.check)
                found = evaluated[config.model.mode].metrics
                metrics |= {f"{one.name}/{name}" if one.name else name: found[name] for name in found}
            checkpoints.record_evaluation(step, metrics, score=task.score(metrics), on=evaluated_on)
            return metrics

        # -------------------------------------------------------------- finished, or compile, restore or begin
        finished = start == total_steps and bool(results)
        if finished:
            logging.info("%s is finished: nothing is left to do", workdir)
        if start < total_steps:
            compiled = plan.compile()
            told = summarize(
                plan.model.parameters, plan.state, mesh, plan.model.axes, compiled, flops=train_flops
            )
            logging.info("\n%s", told)
        means, skipped_before = MetricMeans(), 0
        if start and not finished:
            state, progress = checkpoints.restore(plan.state, start)
            batches.set_state(progress["data"].encode())
            means, skipped_before = MetricMeans(**progress["window"]), progress["skipped"]
        elif not finished:
            state = fresh_state(plan, config.seed, pretrained)
        write_config(workdir, config)

        # -------------------------------------------------------------- the loop
        with (
            Profiler(config.profile, workdir) as profiler,
            MetricsWriter(
                workdir,
                start_step=start,
                total_steps=total_steps,
                writers=writer_names(config.writers),
                config=flatten(config),
            ) as writer,
        ):

            def write_results(step: int) -> None:
                writer.write(step, {f"eval/{name}": value for name, value in results.items()})

            if start and not results and evaluation_due(start):  # The run was stopped in the middle of it.
                results = evaluate_step(start, state)
            if results:
                write_results(start)
            clock = Clock(config.batch_size, flops_per_image=train_flops)
            in_flight: tuple[int, Mapping[str, Array]] | None = None
            for step in range(start + 1, total_steps + 1):
                profiler.before(step, state)
                rows = next(batches)
                if step == 1:
                    writer.image(step, "data/first_batch", tiled(rows["image"][:SHOWN]))
                state, metrics = compiled(state, put_batch(rows, mesh, config.batch_size))
                clock.tick()
                # Reading the metrics of the step before leaves the device one step of work ahead.
                if in_flight is not None:
                    take_metrics(*in_flight, means, checkpoints, config.max_skipped_steps)
                in_flight = step, metrics

                log = step % config.log_every == 0 or step == total_steps
                stopping = preemption.requested()
                saving = stopping or evaluation_due(step) or step % config.checkpoint_every == 0
                saving = saving or (log and checkpoints.failed())
                if log or saving:
                    check_lock()
                    take_metrics(*in_flight, means, checkpoints, config.max_skipped_steps)
                    in_flight = None
                    skipped = skipped_before + sum_over_processes(batches.skipped)
                if log:
                    train_metrics = {f"train/{name}": value for name, value in means.pop_means().items()}
                    speed = clock.read(remaining_steps=total_steps - step)
                    skips = {"data/skipped": skipped, "skipped_steps": means.skipped_steps}
                    writer.write(step, {**train_metrics, **speed, **skips})
                writer.advance()
                # Saved first, evaluated then: whatever happens to the evaluation, the step is done.
                if saving:
                    with clock.paused():
                        progress = {
                            "data": batches.get_state().decode(),
                            "window": means.state(),
                            "skipped": skipped,
                        }
                        writer.sync()
                        checkpoints.save(state, progress=progress, config=config, metadata=metadata)
                if stopping:
                    raise PreemptedError(f"stopped after step {step} of {total_steps}")
                if evaluation_due(step):
                    with clock.paused():
                        results = evaluate_step(step, state)
                        if config.sample_images and draw is not None:
                            weights = jax.device_get(state.params if state.ema is None else state.ema)
                            model = plan.model.model(jax.tree.map(jnp.asarray, weights))
                            drawn = draw(model, task, config.sample_images, config.seed)
                            writer.image(step, "eval/samples", tiled(drawn))
                    write_results(step)
    return results


def _check_draws(config: ml_collections.ConfigDict, draw: Draw | None) -> None:
    if config.sample_images and draw is None:
        raise ValueError(
            f"config.sample_images is {config.sample_images}, and train() was given nothing that draws them: pass"
            " draw=vir_jax.generation.workdir.draw_samples, as the command does, or leave it at 0"
        )
    if config.sample_images and jax.process_count() > 1:
        raise ValueError(
            f"config.sample_images is {config.sample_images}; expected 0 in a run of several processes. Draw from its"
            " checkpoints, with generate.py"
        )


def find_start(
    checkpoints: Checkpoints,
    config: ml_collections.ConfigDict,
    total_steps: int,
    *,
    workdir: RunPath,
    metadata: Mapping[str, Any],
    knows_config: bool,
) -> int:
    """Return the step that the run goes on from, 0 for one that begins. Every process must call it.

    Args:
      checkpoints: of the workdir.
      config: of this start.
      total_steps: that it makes.
      workdir: folder of the run.
      metadata: of this start, `data_identity` in it.
      knows_config: whether the workdir said what config its run has; else its newest checkpoint is asked.

    Raises:
      DamagedCheckpointError: there are checkpoints, and none can be restored.
      ValueError: the run there has another config or other data, or has gone further than this one is to go.
    """
    start = checkpoints.newest_intact() or 0
    if start == 0:
        if has_metrics(workdir):
            logging.warning("%s holds metrics, but no finished checkpoint: starting at step 1", workdir)
        return 0
    stored, stored_metadata = checkpoints.restore_config(start)
    if not knows_config:
        check_resumable(workdir, stored, config)
    # Single examples may differ between processes: what a fingerprint leaves open, one of them decides.
    decided_by_process_0(lambda: check_same_data(workdir, stored_metadata, metadata), ValueError)
    if start > total_steps:
        raise ValueError(
            f"{workdir} holds step {start}, beyond the {total_steps} steps that config.epochs ="
            f" {config.epochs} makes; raise config.epochs to go on with that run"
        )
    logging.info("going on from step %d of %d in %s", start, total_steps, workdir)
    return start


def fresh_state(plan: TrainingPlan, seed: int, pretrained: Pretrained) -> TrainState:
    """Return the state before the first step: initialised, or with the weights of another run."""
    state = plan.init(jax.random.key(seed))
    if not pretrained:
        return state
    params = start_from(pretrained, state.params)
    return dataclasses.replace(state, params=params, ema=state.ema and jax.tree.map(jnp.copy, params))


def take_metrics(
    step: int,
    metrics: Mapping[str, Array],
    means: MetricMeans,
    checkpoints: Checkpoints,
    max_skipped_steps: int,
) -> None:
    """Wait for a step and add its metrics to the means, or leave it out where they are not finite.

    Raises:
      NonFiniteError: one step more than may be left out, with its number, loss and norms, and the last checkpoint.
    """
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if values.pop("finite"):
        means.add(values)
        return
    means.skipped_steps += 1
    norms = ", ".join(f"{name} norm {values[f'{name}_norm']}" for name in ("gradient", "update", "parameter"))
    message = f"step {step}: loss {values['loss']}, {norms}; the step was not applied."
    if means.skipped_steps > max_skipped_steps:
        raise NonFiniteError(
            f"{message} Last checkpoint: step {checkpoints.latest_step()}. The same command would come to the same"
            " end: go on from there with a lower config.optim.lr or config.optim.clip_norm, or leave such steps out"
            f" with a config.max_skipped_steps above {max_skipped_steps}."
        )
    logging.warning("%s Left out: %d of at most %d.", message, means.skipped_steps, max_skipped_steps)
