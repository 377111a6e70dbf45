"""Evaluation: top-1, top-5 and loss of a model on a data set, in one form of retention or in all of them."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, Float

from vir_jax.data import Source, eval_loader, open_source
from vir_jax.models import parse_name
from vir_jax.ops import MODES
from vir_jax.training.checkpoint import Checkpoints
from vir_jax.training.log import quiet_libraries
from vir_jax.training.mesh import check_divides, local_rows, make_mesh, put_batch
from vir_jax.training.mixing import normalize
from vir_jax.training.model import ModelFunctions, image_size, model_functions
from vir_jax.training.sharding import state_shardings
from vir_jax.training.state import Params
from vir_jax.training.step import evaluation_sums

# Largest relative RMS difference of logits between two modes that counts as agreement. The modes differ by rounding
# alone: about 1e-6 in float32, and in bfloat16 2e-3 per retention, amplified by the depth of the model.
AGREEMENT = {"float32": 1e-3, "bfloat16": 3e-2}


class ModesDisagreeError(RuntimeError):
    """Two forms of retention gave different logits for the same images."""


@dataclasses.dataclass(frozen=True)
class ModeResult:
    """How one mode fared on a data set."""

    metrics: dict[str, float]  # top1 and top5 as fractions, loss in nats, count of examples.
    images_per_second: float  # Of the forward pass, loading not counted.
    difference: float  # Relative RMS difference of its logits from the first mode's.


def evaluate(
    predict: Callable[..., Float[Array, "b classes"]],
    params: Params,
    batches: Iterable[Mapping[str, object]],
    mesh: Mesh,
    *,
    batch_size: int,
    modes: Sequence[str],
) -> dict[str, ModeResult]:
    """Means over all examples of a data set, each counted once, for each mode on the same batches.

    Args:
      predict: jitted (params, uint8 images, mode=...) -> logits; `make_predict` makes one.
      params: of the model.
      batches: this process's rows of each, of `eval_loader`.
      mesh: over which batches are split.
      batch_size: over all processes.
      modes: that `predict` is called with; the first is what the others are compared with.

    Raises:
      ValueError: there were no examples.
    """
    sums_of = jax.jit(evaluation_sums)
    sums: dict[str, dict[str, float]] = {mode: {} for mode in modes}
    seconds = dict.fromkeys(modes, 0.0)
    compiled = set()
    with jax.set_mesh(mesh):
        for host_batch in batches:
            batch = put_batch(host_batch, mesh, batch_size)
            reference = None
            for mode in modes:
                if mode not in compiled:  # Compilation is not counted.
                    jax.block_until_ready(predict(params, batch["image"], mode=mode))
                    compiled.add(mode)
                started = time.perf_counter()
                logits = jax.block_until_ready(predict(params, batch["image"], mode=mode))
                seconds[mode] += time.perf_counter() - started
                reference = logits if reference is None else reference
                batch_sums = sums_of(logits, batch["label"], batch["mask"], reference)
                for name, value in jax.device_get(batch_sums).items():  # Added up in float64, on the host.
                    sums[mode][name] = sums[mode].get(name, 0.0) + float(value)
    return {mode: _result(sums[mode], seconds[mode]) for mode in modes}


def _result(sums: Mapping[str, float], seconds: float) -> ModeResult:
    count = sums.get("count", 0)
    if not count:
        raise ValueError("evaluation met no readable example")
    metrics = {name: sums[name] / count for name in ("top1", "top5", "loss")}
    scale = sums["squared_reference"]
    return ModeResult(
        metrics={**metrics, "count": int(count)},
        images_per_second=count / seconds,
        difference=math.sqrt(sums["squared_difference"] / scale) if scale else 0.0,
    )


def make_predict(
    model: ModelFunctions, *, mean: Sequence[float], std: Sequence[float]
) -> Callable[..., Float[Array, "b classes"]]:
    """(params, uint8 images [b y x 3], mode=...) -> float32 logits, jitted."""

    @functools.partial(jax.jit, static_argnames="mode")
    def predict(params: Params, images: Array, *, mode: str) -> Array:
        return model.apply(params, normalize(images, mean, std), mode=mode).astype(jnp.float32)

    return predict


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
