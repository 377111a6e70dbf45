"""The training loop."""

import dataclasses
import os
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import ml_collections
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array

import vir_jax
from vir_jax.data import AugmentConfig, Source, check_examples, eval_loader, train_loader
from vir_jax.parallel.mesh import local_rows, make_mesh, put_batch
from vir_jax.parallel.processes import sum_over_processes
from vir_jax.paths import check_paths
from vir_jax.runs.checkpoint import Checkpoints, has_checkpoints
from vir_jax.runs.config import validate
from vir_jax.runs.lock import exclusive
from vir_jax.runs.log import quiet_libraries
from vir_jax.runs.metrics import MetricsWriter, Window, has_metrics
from vir_jax.runs.model import make_predict
from vir_jax.runs.preemption import PreemptedError, Preemption
from vir_jax.runs.state import TrainState
from vir_jax.runs.storage import RunPath, open_workdir
from vir_jax.runs.workdir import check_config, check_resumable, write_config
from vir_jax.training.clock import Clock
from vir_jax.training.evaluate import evaluate
from vir_jax.training.finetune import Pretrained, read_pretrained, start_from
from vir_jax.training.program import check_on_mesh, make_program
from vir_jax.training.start import check_same_data, data_identity, open_sources
from vir_jax.training.summary import summarize


class NonFiniteError(RuntimeError):
    """A step's loss or gradients were not finite."""


def train(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    train_source: Source | None = None,
    eval_source: Source | None = None,
) -> dict[str, float]:
    """Trains a model, or goes on with the run that the workdir holds.

    On SIGTERM the run saves after the step it is at, and stops.

    Args:
      config: see `default_config`.
      workdir: folder of checkpoints, metrics and the config, made if absent: a local one, or gs://bucket/folder.
      train_source: examples to train on; None opens `config.data`.
      eval_source: examples to evaluate on; None opens `config.data`.

    Returns:
      The metrics of the final evaluation: top1, top5, loss, count.

    Raises:
      ValueError: a config that cannot be run, with the field and what it should be.
      NonFiniteError: more than `config.max_skipped_steps` steps with a loss, gradient or update that is not finite.
        Such a step is not applied; the newest checkpoint is of a step before it.
      PreemptedError: SIGTERM came; the same call goes on from what was saved.
      PathError: the workdir or a path in the config is blank, or of a kind that is not read (a `ValueError`).
      TooManyCorruptError: more corrupt examples than `config.data.max_corrupt_fraction` allows.
      WorkdirInUseError: another run holds the workdir.
      DamagedCheckpointError: there are checkpoints, and none can be restored.
      SaveError: the first checkpoint could not be written, or training went through and the last one could not.
    """
    # All of the config first: nothing is opened, compiled or written for one that cannot be run.
    validate(config)
    check_paths(config)
    folder = open_workdir(workdir)
    mesh = make_mesh(**config.mesh)
    check_on_mesh(config, mesh)
    with exclusive(folder) as check_lock, Preemption() as preemption:
        return _train(config, mesh, folder, check_lock, preemption, train_source, eval_source)


def _train(
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    workdir: RunPath,
    check_lock: Callable[[], None],
    preemption: Preemption,
    train_source: Source | None,
    eval_source: Source | None,
) -> dict[str, float]:
    # ------------------------------------------------------------------ config
    quiet_libraries()
    knows_config = check_config(workdir, config)

    # ------------------------------------------------------------------ data
    data = config.data
    given = train_source, eval_source
    train_source, eval_source = open_sources(data, train_source, eval_source)
    for source, was_given in zip((train_source, eval_source), given, strict=True):
        if was_given is None:
            # Too many corrupt examples are told here, not after the last step.
            check_examples(source, max_corrupt_fraction=data.max_corrupt_fraction, num_threads=data.threads)
    if len(train_source) < config.batch_size:
        raise ValueError(
            f"the training data has {len(train_source)} examples, fewer than one batch of"
            f" {config.batch_size}; lower config.batch_size"
        )
    steps_per_epoch = len(train_source) / config.batch_size
    total_steps = max(1, round((config.epochs + config.optim.cooldown_epochs) * steps_per_epoch))

    # ------------------------------------------------------------------ model, optimiser, step; not compiled yet
    program = make_program(
        config, mesh, num_classes=train_source.num_classes, steps_per_epoch=steps_per_epoch
    )
    predict = make_predict(program.model, mean=data.mean, std=data.std)
    forward_flops = program.model.flops(program.image_size)
    train_flops = forward_flops and 3 * forward_flops  # The backward pass costs twice the forward one.

    # ------------------------------------------------------------------ batches
    batches = train_loader(
        train_source,
        batch_size=config.batch_size,
        image_size=program.image_size,
        augment=AugmentConfig(**config.augment, mean=data.mean, std=data.std),
        seed=config.seed,
        rows=local_rows(mesh, config.batch_size),
        num_threads=data.threads,
        max_corrupt_fraction=data.max_corrupt_fraction,
        background=tuple(data.background),
    )
    eval_batches = eval_loader(
        eval_source,
        batch_size=config.eval_batch_size,
        image_size=program.image_size,
        crop_fraction=data.crop_fraction,
        rows=local_rows(mesh, config.eval_batch_size),
        num_threads=data.threads,
        max_corrupt_fraction=data.max_corrupt_fraction,
        background=tuple(data.background),
    )

    metadata = {
        **data_identity(train_source),
        "vir_jax": vir_jax.__version__,
        "jax": jax.__version__,
        "device_kind": jax.devices()[0].device_kind,
    }
    pretrained: Pretrained = {}
    if config.init_from and not has_checkpoints(workdir):
        pretrained = read_pretrained(
            config, shapes=program.state.params, class_names=train_source.class_names
        )
    with Checkpoints(workdir, keep=config.keep_checkpoints) as checkpoints:
        # -------------------------------------------------------------- the last checks
        start = checkpoints.newest_intact()
        if start is not None:
            stored, stored_metadata = checkpoints.restore_config(start)
            if not knows_config:
                check_resumable(workdir, stored, config)
            check_same_data(workdir, stored_metadata, metadata)
            if start > total_steps:
                raise ValueError(
                    f"{workdir} holds step {start}, beyond the {total_steps} steps that config.epochs ="
                    f" {config.epochs} makes; raise config.epochs to go on with that run"
                )

        # -------------------------------------------------------------- compile; restore, or start
        compiled = program.compile()
        logging.info("\n%s", summarize(program.state, mesh, program.model.axes, compiled, flops=train_flops))
        window, skipped_before = Window(), 0
        if start is None:
            start = 0
            if has_metrics(workdir):
                logging.warning("%s holds metrics, but no finished checkpoint: starting at step 1", workdir)
            state = program.init(jax.random.key(config.seed))
            if pretrained:
                params = start_from(pretrained, state.params)
                state = dataclasses.replace(
                    state, params=params, ema=state.ema and jax.tree.map(jnp.copy, params)
                )
        else:
            state, progress = checkpoints.restore(program.state, start)
            batches.set_state(progress["data"].encode())
            window, skipped_before = Window(**progress["window"]), progress["skipped"]
            logging.info("going on from step %d of %d in %s", start, total_steps, workdir)
        write_config(workdir, config)

        # -------------------------------------------------------------- evaluation
        def evaluation_due(step: int) -> bool:
            return step == total_steps or (config.eval_every > 0 and step % config.eval_every == 0)

        def evaluate_step(step: int, state: TrainState) -> dict[str, float]:
            weights = state.params if state.ema is None else state.ema
            guarded, mode = preemption.guard(eval_batches), config.model.mode
            size = config.eval_batch_size
            evaluated = evaluate(predict, weights, guarded, mesh, batch_size=size, modes=[mode])
            metrics = evaluated[mode].metrics
            checkpoints.record_evaluation(step, metrics)
            return metrics

        # -------------------------------------------------------------- the loop
        clock = Clock(config.batch_size, flops_per_image=train_flops)
        with MetricsWriter(workdir, start_step=start, total_steps=total_steps) as writer:
            results = checkpoints.metrics(start) or {}
            if start and not results and evaluation_due(start):  # The run was stopped in the middle of it.
                results = evaluate_step(start, state)
            if results:
                writer.write(start, {f"eval/{name}": value for name, value in results.items()})
            in_flight: tuple[int, Mapping[str, Array]] | None = None
            for step in range(start + 1, total_steps + 1):
                batch = put_batch(next(batches), mesh, config.batch_size)
                state, metrics = compiled(state, batch)
                clock.tick()
                # Reading the metrics of the step before leaves the device one step of work ahead.
                if in_flight is not None:
                    record(*in_flight, window, checkpoints, config.max_skipped_steps)
                in_flight = step, metrics

                log = step % config.log_every == 0 or step == total_steps
                stopping = preemption.requested()
                saving = stopping or evaluation_due(step) or step % config.checkpoint_every == 0
                saving = saving or (log and checkpoints.failed())
                if log or saving:
                    check_lock()
                    record(*in_flight, window, checkpoints, config.max_skipped_steps)
                    in_flight = None
                    skipped = skipped_before + sum_over_processes(batches.skipped)
                if log:
                    train_metrics = {f"train/{name}": value for name, value in window.pop_means().items()}
                    speed = clock.read(remaining_steps=total_steps - step)
                    skips = {"data/skipped": skipped, "skipped_steps": window.skipped_steps}
                    writer.write(step, {**train_metrics, **speed, **skips})
                writer.advance()
                # Saved first, evaluated then: whatever happens to the evaluation, the step is done.
                if saving:
                    with clock.paused():
                        progress = {
                            "data": batches.get_state().decode(),
                            "window": window.state(),
                            "skipped": skipped,
                        }
                        writer.sync()
                        checkpoints.save(state, progress=progress, config=config, metadata=metadata)
                if stopping:
                    raise PreemptedError(f"stopped after step {step} of {total_steps}")
                if evaluation_due(step):
                    with clock.paused():
                        results = evaluate_step(step, state)
                    writer.write(step, {f"eval/{name}": value for name, value in results.items()})
    batches.close()
    return results


def record(
    step: int, metrics: Mapping[str, Array], window: Window, checkpoints: Checkpoints, max_skipped_steps: int
) -> None:
    """Waits for a step and adds its metrics to the window, or leaves it out where they are not finite.

    Raises:
      NonFiniteError: one step more than may be left out, with its number, loss and norms, and the last checkpoint.
    """
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if values.pop("finite"):
        window.add(values)
        return
    window.skipped_steps += 1
    norms = ", ".join(f"{name} norm {values[f'{name}_norm']}" for name in ("gradient", "update", "parameter"))
    message = f"step {step}: loss {values['loss']}, {norms}; the step was not applied."
    if window.skipped_steps > max_skipped_steps:
        raise NonFiniteError(
            f"{message} Last checkpoint: step {checkpoints.latest_step()}. The same command would come to the same"
            " end: go on from there with a lower config.optim.lr or config.optim.clip_norm, or leave such steps out"
            f" with a config.max_skipped_steps above {max_skipped_steps}."
        )
    logging.warning("%s Left out: %d of at most %d.", message, window.skipped_steps, max_skipped_steps)
