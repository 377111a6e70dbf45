"""Evaluation: top-1, top-5 and loss of a model on a data set, in one form of retention or in all of them."""

from collections.abc import Mapping
from pathlib import Path

import jax
import ml_collections
from absl import logging

from vir_jax.data import Source, eval_loader, open_source
from vir_jax.data.corrupt import MAX_CORRUPT_FRACTION
from vir_jax.data.pixels import WHITE
from vir_jax.models import parse_name
from vir_jax.ops import MODES
from vir_jax.parallel.mesh import check_divides, local_rows, make_mesh
from vir_jax.parallel.sharding import state_shardings
from vir_jax.runs.checkpoint import Checkpoints
from vir_jax.runs.log import quiet_libraries
from vir_jax.runs.model import image_size, make_predict, model_functions
from vir_jax.training.evaluate import ModeResult, evaluate

# Largest relative RMS difference of logits between two modes that counts as agreement. The modes differ by rounding
# alone: about 1e-6 in float32, and in bfloat16 2e-3 per retention, amplified by the depth of the model.
AGREEMENT = {"float32": 1e-3, "bfloat16": 3e-2}


class ModesDisagreeError(RuntimeError):
    """Two forms of retention gave different logits for the same images."""


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
      ValueError: no such checkpoint, weights, or mode for this model; classes that do not fit the data.
      TooManyCorruptError: more corrupt examples than the run's `config.data.max_corrupt_fraction` allows.
      ModesDisagreeError: with mode "all", logits that differ by more than `AGREEMENT`.
    """
    quiet_libraries()
    with Checkpoints(workdir, read_only=True) as checkpoints:
        step = checkpoints.resolve(checkpoint)
        config, metadata = checkpoints.restore_config(step)
        weights = weights or ("ema" if checkpoints.has_ema(step) else "raw")
        if batch_size is not None:
            config.eval_batch_size = batch_size
        mesh = make_mesh()
        model = model_functions(config.model, len(metadata["class_names"]))
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            state_shardings(shapes, mesh),
        )
        params = checkpoints.restore_params(step, weights=weights, target=target)
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
    logging.info("evaluating the %s weights of step %d in %s", weights, step, workdir)
    check_divides("the evaluation batch size", config.eval_batch_size, mesh)
    batches = eval_loader(
        source,
        batch_size=config.eval_batch_size,
        image_size=image_size(config.model) if size is None else size,
        crop_fraction=data.crop_fraction,
        rows=local_rows(mesh, config.eval_batch_size),
        num_threads=data.threads,
        # Runs of before these fields were there have none.
        max_corrupt_fraction=data.get("max_corrupt_fraction", MAX_CORRUPT_FRACTION),
        background=tuple(data.get("background", WHITE)),
    )
    predict = make_predict(model, mean=data.mean, std=data.std)
    results = evaluate(
        predict,
        params,
        batches,
        mesh,
        batch_size=config.eval_batch_size,
        modes=select_modes(config, mode),
    )
    tolerance = AGREEMENT[config.model.dtype]
    if not all(result.difference <= tolerance for result in results.values()):  # NaN disagrees as well.
        raise ModesDisagreeError(
            f"the modes' logits differ by more than the relative RMS of {tolerance:.0e} that rounding explains"
            f" in {config.model.dtype}:\n{format_results(results)}"
        )
    return results


def format_results(results: Mapping[str, ModeResult]) -> str:
    """A table of the modes, a line each."""
    rows = [
        f"{'mode':<12}{'top-1':>9}{'top-5':>9}{'loss':>10}{'images':>9}{'images/s':>11}{'difference':>12}"
    ]
    rows += [
        f"{mode:<12}{metrics['top1']:>9.2%}{metrics['top5']:>9.2%}{metrics['loss']:>10.4f}"
        f"{metrics['count']:>9,}{result.images_per_second:>11,.1f}{result.difference:>12.1e}"
        for mode, result in results.items()
        for metrics in [result.metrics]
    ]
    return "\n".join(rows)


def select_modes(config: ml_collections.ConfigDict, mode: str) -> tuple[str, ...]:
    """The modes that "auto", a mode's name, or "all" stands for."""
    family, *_ = parse_name(config.model.name)
    available = MODES if family == "vir" else ("parallel",)
    if mode == "all":
        return available
    if mode not in ("auto", *available):
        raise ValueError(f"mode {mode!r}: {config.model.name} knows 'auto', 'all' and {available}")
    return (mode,)
