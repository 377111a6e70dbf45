"""Means of a model's metrics over a data set, in one form of the mixer or in several."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from vir_jax.parallel.mesh import put_batch
from vir_jax.runs.state import Params
from vir_jax.training.step import evaluation_sums


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
