"""A checkpoint of a run, evaluated: what eval.py does."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Float

from vir_jax.data import Source
from vir_jax.models import VisionModel
from vir_jax.parallel.mesh import check_divides, make_mesh
from vir_jax.runs.evaluation_sets import ALL, DEFAULT, EvaluationSet, default_set, named_sets
from vir_jax.runs.load import load_run
from vir_jax.runs.log import quiet_libraries
from vir_jax.runs.model import image_size as model_image_size
from vir_jax.runs.model import model_functions
from vir_jax.training.evaluate import Evaluator, ModeResult
from vir_jax.training.evaluation_data import EvaluationData, evaluation_batches, open_evaluation

# Largest relative RMS difference of outputs between two modes that counts as agreement. The modes differ by rounding
# alone: about 1e-6 in float32, and in bfloat16 2e-3 per retention, amplified by the depth of the model.
AGREEMENT = {"float32": 1e-3, "bfloat16": 3e-2}

Observer = Callable[[EvaluationData, Float[np.ndarray, "b ..."], Mapping[str, Any]], object]
"""Of (data, outputs, batch)."""


class ModesDisagreeError(RuntimeError):
    """Two forms of the mixer gave different outputs for the same images."""


def evaluate_workdir(
    workdir: str | os.PathLike[str],
    *,
    checkpoint: str = "last",
    weights: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    mode: str = "auto",
    evaluations: str | None = DEFAULT,
    dataset: str | None = None,
    split: str | None = None,
    data_dir: str | None = None,
    batch_size: int | None = None,
    source: Source | None = None,
    observe: Observer | None = None,
) -> dict[str, ModeResult]:
    """Evaluate a checkpoint of a run.

    Labels are matched by name, as `match_classes` says: the data may have a part of the model's classes.

    Args:
      workdir: folder of the run.
      checkpoint: "last", "best" or the number of a step.
      weights: "raw" or "ema"; None takes the average where the run kept one.
      image_size: pixels, a square's side or (height, width); None takes the training size.
      mode: "auto", one of `vir_jax.ops.MODES`, or "all".
      evaluations: which data: "default" for the run's evaluation data, "all" for these and its further sets, or the
        name of one of `config.evaluations`; None: all, or the default alone where other data are given below.
      dataset: of the run by default; see `open_source`.
      split: of the run's evaluation by default.
      data_dir: of the run by default.
      batch_size: over all devices; of the run by default.
      source: examples to use instead of `dataset`.
      observe: called with each batch of each set, and the first mode's outputs of it; in a single process.

    Returns:
      The results by mode; of further sets by "name/mode".

    Raises:
      RemovedCheckpointError: the run removed the checkpoint while it was read; see `Checkpoints.read`.
      ValueError: no such checkpoint, weights, mode, evaluation set or image size for this model; data with classes that
        the model does not know.
      TooManyCorruptError: more corrupt examples than the run's `config.data.max_corrupt_fraction` allows.
      ModesDisagreeError: with mode "all", outputs that differ by more than `AGREEMENT`.
    """
    quiet_libraries()
    if observe is not None and jax.process_count() > 1:
        raise ValueError(f"predictions are of one process; there are {jax.process_count()}: evaluate in one")
    run = load_run(workdir, checkpoint, weights=weights, mesh=lambda config: evaluation_mesh(config.mesh))
    config, mesh = run.config, run.mesh
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
    check_divides("the evaluation batch size", config.eval_batch_size, mesh)
    for field, value in (("dataset", dataset), ("eval_split", split), ("data_dir", data_dir)):
        config.data[field] = config.data[field] if value is None else value
    other = any(value is not None for value in (dataset, split, data_dir, source))
    chosen = select_sets(config, evaluations or (DEFAULT if other else ALL))
    if other and any(one.name for one in chosen):
        raise ValueError(
            f"evaluations={evaluations!r} are data of the run's config, and others are given; name one of both"
        )
    opened = [open_evaluation(one, run.task, run.class_names, source=source) for one in chosen]
    evaluator = Evaluator(run.task, run.functions.apply, mesh, batch_size=config.eval_batch_size, modes=modes)
    results: dict[str, ModeResult] = {}
    for one in opened:
        batches = evaluation_batches(config, one.source, mesh, image_size=model_image_size(options))
        watch = None if observe is None else functools.partial(observe, one)
        found = evaluator(run.params, batches, task=one.task, observe=watch)
        _check_agreement(found, config.model.dtype)
        results |= {f"{one.name}/{mode}" if one.name else mode: found[mode] for mode in found}
    return results


def select_sets(config: ml_collections.ConfigDict, which: str) -> list[EvaluationSet]:
    """Return the evaluation sets that "default", "all", or the name of one stands for.

    Raises:
      ValueError: there is none of that name.
    """
    sets = {DEFAULT: default_set(config), **{one.name: one for one in named_sets(config)}}
    if which == ALL:
        return list(sets.values())
    if which not in sets:
        raise ValueError(f"no evaluation set {which!r}; expected {ALL!r} or one of {list(sets)}")
    return [sets[which]]


def _check_agreement(results: Mapping[str, ModeResult], dtype: str) -> None:
    tolerance = AGREEMENT[dtype]
    if not all(result.difference <= tolerance for result in results.values()):  # NaN disagrees as well.
        raise ModesDisagreeError(
            f"the modes' outputs differ by more than the relative RMS of {tolerance:.0e} that rounding explains"
            f" in {dtype}:\n{format_results(results)}"
        )


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
    """Return a table of the modes, or evaluation sets and modes, a line each."""
    several = any("/" in mode for mode in results)
    rows = [
        {
            **({"set": mode.rpartition("/")[0] or DEFAULT} if several else {}),
            "mode": mode.rpartition("/")[2],
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
