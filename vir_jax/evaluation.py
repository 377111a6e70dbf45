"""Evaluation of a run: the metrics of its task on a data set, in one form of the mixer or in all of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import logging
from jax.sharding import Mesh

from vir_jax.data import Source, eval_loader, open_source
from vir_jax.models import parse_name
from vir_jax.ops import MODES
from vir_jax.parallel.mesh import check_divides, local_rows, make_mesh
from vir_jax.parallel.sharding import state_shardings
from vir_jax.runs.checkpoint import Checkpoints
from vir_jax.runs.log import quiet_libraries
from vir_jax.runs.model import image_size, model_functions
from vir_jax.tasks import make_task
from vir_jax.training.evaluate import Evaluator, ModeResult

# Largest relative RMS difference of outputs between two modes that counts as agreement. The modes differ by rounding
# alone: about 1e-6 in float32, and in bfloat16 2e-3 per retention, amplified by the depth of the model.
AGREEMENT = {"float32": 1e-3, "bfloat16": 3e-2}


class ModesDisagreeError(RuntimeError):
    """Two forms of the mixer gave different outputs for the same images."""


def evaluate_workdir(
    workdir: str | Path,
    *,
    checkpoint: str = "last",
    weights: str | None = None,
    size: int | tuple[int, int] | None = None,
    mode: str = "auto",
    dataset: str | None = None,
    split: str | None = None,
    data_dir: str | None = None,
    batch_size: int | None = None,
    source: Source | None = None,
) -> dict[str, ModeResult]:
    """Evaluates a checkpoint of a run.

    Args:
      workdir: folder of the run.
      checkpoint: "last", "best" or the number of a step.
      weights: "raw" or "ema"; None takes the average where the run kept one.
      size: pixels, a square's side or (height, width); None takes the training size.
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
      ValueError: no such checkpoint, weights, or mode for this model; classes that do not fit the data.
      ModesDisagreeError: with mode "all", outputs that differ by more than `AGREEMENT`.
    """
    quiet_libraries()

    def read(step: int) -> tuple[Any, ...]:
        config, metadata = checkpoints.restore_config(step)
        kind = weights or ("ema" if checkpoints.has_ema(step) else "raw")
        mesh = evaluation_mesh(config.mesh)
        task = make_task(config, metadata["class_names"])
        model = model_functions(config.model, task.num_outputs)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            state_shardings(shapes, mesh),
        )
        params = checkpoints.restore_params(step, weights=kind, target=target)
        logging.info("evaluating the %s weights of step %d in %s", kind, step, workdir)
        return config, metadata, mesh, task, model, params

    with Checkpoints(workdir, read_only=True) as checkpoints:
        config, metadata, mesh, task, model, params = checkpoints.read(checkpoint, read)
    if batch_size is not None:
        config.eval_batch_size = batch_size
    data = config.data
    source = source or open_source(
        dataset or data.dataset, split or data.eval_split, data_dir=data_dir or data.data_dir
    )
    if source.num_classes != len(metadata["class_names"]):
        raise ValueError(
            f"the model tells {len(metadata['class_names'])} classes apart, the data has {source.num_classes}"
        )
    if list(source.class_names) != metadata["class_names"]:
        logging.warning(
            "the data names its classes otherwise than the training data; labels are compared by number"
        )
    check_divides("the evaluation batch size", config.eval_batch_size, mesh)
    batches = eval_loader(
        source,
        batch_size=config.eval_batch_size,
        image_size=image_size(config.model) if size is None else size,
        crop_fraction=data.crop_fraction,
        rows=local_rows(mesh, config.eval_batch_size),
        num_threads=data.threads,
    )
    evaluator = Evaluator(
        task,
        model.apply,
        mesh,
        batch_size=config.eval_batch_size,
        modes=select_modes(config, mode),
    )
    results = evaluator(params, batches)
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
    """A table of the modes, a line each."""
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


def select_modes(config: ml_collections.ConfigDict, mode: str) -> tuple[str, ...]:
    """The modes that "auto", a mode's name, or "all" stands for."""
    family, *_ = parse_name(config.model.name)
    available = MODES if family == "vir" else ("parallel",)
    if mode == "all":
        return available
    if mode not in ("auto", *available):
        raise ValueError(f"mode {mode!r}: {config.model.name} knows 'auto', 'all' and {available}")
    return (mode,)
