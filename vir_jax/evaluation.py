"""Evaluation of a run: the metrics of its task on a data set, in one form of the mixer or in all of them."""

import os
from collections.abc import Mapping

import jax
import ml_collections
from absl import logging
from jax.sharding import Mesh

from vir_jax.data import Source, eval_loader, open_source
from vir_jax.data.classes import match_classes
from vir_jax.models import VisionModel
from vir_jax.parallel.mesh import check_divides, local_rows, make_mesh
from vir_jax.runs.load import load_run
from vir_jax.runs.log import quiet_libraries
from vir_jax.runs.model import image_size as model_image_size
from vir_jax.runs.model import model_functions
from vir_jax.training.evaluate import Evaluator, ModeResult

# Largest relative RMS difference of outputs between two modes that counts as agreement. The modes differ by rounding
# alone: about 1e-6 in float32, and in bfloat16 2e-3 per retention, amplified by the depth of the model.
AGREEMENT = {"float32": 1e-3, "bfloat16": 3e-2}


class ModesDisagreeError(RuntimeError):
    """Two forms of the mixer gave different outputs for the same images."""


def evaluate_workdir(
    workdir: str | os.PathLike[str],
    *,
    checkpoint: str = "last",
    weights: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    mode: str = "auto",
    dataset: str | None = None,
    split: str | None = None,
    data_dir: str | None = None,
    batch_size: int | None = None,
    source: Source | None = None,
) -> dict[str, ModeResult]:
    """Evaluate a checkpoint of a run.

    Labels are matched by name, as `match_classes` says: the data may have a part of the model's classes.

    Args:
      workdir: folder of the run.
      checkpoint: "last", "best" or the number of a step.
      weights: "raw" or "ema"; None takes the average where the run kept one.
      image_size: pixels, a square's side or (height, width); None takes the training size.
      mode: "auto", one of `vir_jax.ops.MODES`, or "all".
      dataset: of the run by default; see `open_source`.
      split: of the run's evaluation by default.
      data_dir: of the run by default.
      batch_size: over all devices; of the run by default.
      source: examples to use instead of `dataset`.

    Returns:
      The results by mode.

    Raises:
      RemovedCheckpointError: the run removed the checkpoint while it was read; see `Checkpoints.read`.
      ValueError: no such checkpoint, weights, mode or image size for this model; data with classes that the model does
        not know.
      TooManyCorruptError: more corrupt examples than the run's `config.data.max_corrupt_fraction` allows.
      ModesDisagreeError: with mode "all", outputs that differ by more than `AGREEMENT`.
    """
    quiet_libraries()
    run = load_run(workdir, checkpoint, weights=weights, mesh=lambda config: evaluation_mesh(config.mesh))
    config, data, mesh = run.config, run.config.data, run.mesh
    assert mesh is not None
    if batch_size is not None:
        config.eval_batch_size = batch_size
    options = dict(config.model)
    if image_size is not None:
        options["image_size"] = image_size
        try:
            model_functions(options, run.task.num_outputs)
        except ValueError as error:
            raise ValueError(f"cannot evaluate at image_size={image_size!r}: {error}") from error
    modes = select_modes(run.model, mode)
    source = source or open_source(
        dataset or data.dataset,
        split or data.eval_split,
        data_dir=data.data_dir if data_dir is None else data_dir,
    )
    source = match_classes(source, run.class_names, "the evaluation data")
    check_divides("the evaluation batch size", config.eval_batch_size, mesh)
    batches = eval_loader(
        source,
        batch_size=config.eval_batch_size,
        image_size=model_image_size(options),
        crop_fraction=data.crop_fraction,
        rows=local_rows(mesh, config.eval_batch_size),
        num_threads=data.threads,
        max_corrupt_fraction=data.max_corrupt_fraction,
        background=tuple(data.background),
    )
    evaluator = Evaluator(
        run.task,
        run.functions.apply,
        mesh,
        batch_size=config.eval_batch_size,
        modes=modes,
    )
    results = evaluator(run.params, batches)
    tolerance = AGREEMENT[config.model.dtype]
    if not all(result.difference <= tolerance for result in results.values()):  # NaN disagrees as well.
        raise ModesDisagreeError(
            f"the modes' outputs differ by more than the relative RMS of {tolerance:.0e} that rounding explains"
            f" in {config.model.dtype}:\n{format_results(results)}"
        )
    return results


def evaluation_mesh(config: ml_collections.ConfigDict) -> Mesh:
    """Return the mesh that a run was trained on, where it fits the devices there are, else all of them side by side.

    Args:
      config: `config.mesh` of the run.
    """
    try:
        return make_mesh(**config)
    except ValueError as error:
        logging.info("%s; evaluating with data=%d", error, jax.device_count())
        return make_mesh()


def format_results(results: Mapping[str, ModeResult]) -> str:
    """Return a table of the modes, a line each."""
    rows = [
        {
            "mode": mode,
            **result.columns,
            "images": f"{result.metrics['count']:,}",
            "images/s": f"{result.images_per_second:,.1f}",
            "difference": f"{result.difference:.1e}",
        }
        for mode, result in results.items()
    ]
    table = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [2 + max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join(
        f"{row[0]:<{widths[0]}}"
        + "".join(f"{text:>{width}}" for text, width in zip(row[1:], widths[1:], strict=True))
        for row in table
    )


def select_modes(model: VisionModel, mode: str) -> tuple[str, ...]:
    """Return the modes that "auto", a mode's name, or "all" stands for."""
    if mode == "all":
        return model.modes
    if mode not in ("auto", *model.modes):
        raise ValueError(f"mode {mode!r}: {model.options['name']} knows 'auto', 'all' and {model.modes}")
    return (mode,)
