"""Means of a model's metrics over a data set, in one form of the mixer or in several."""

import contextlib
import dataclasses
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from vir_jax.parallel.mesh import put_batch
from vir_jax.runs.state import Params
from vir_jax.training.step import Batch, Metrics, evaluation_sums

# Batches that are waited for, to see how long each mode takes; the device gets those after them without a pause.
TIMED_BATCHES = 8

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ModeResult:
    """How one mode fared on a data set."""

    metrics: dict[str, float]  # top1 and top5 as fractions, loss in nats, count of examples.
    images_per_second: (
        float  # Of the forward pass on whole batches: no loading, compilation or first execution.
    )
    difference: float  # Relative RMS difference of its logits from the first mode's.


class Evaluator:
    """Evaluates parameters on a data set, each example counted once, in each mode on the same batches.

    It is compiled in the first call, before the first batch is computed, and not again. While the device computes a
    batch, the next one is loaded and handed over.

    Args:
      predict: (params, uint8 images, mode=...) -> logits; `make_predict` makes one.
      mesh: over which batches are split.
      batch_size: over all processes.
      modes: that `predict` is called with; the first is what the others are compared with.
    """

    def __init__(
        self,
        predict: Callable[..., Float[Array, "b classes"]],
        mesh: Mesh,
        *,
        batch_size: int,
        modes: Sequence[str],
    ) -> None:
        self._predict = jax.jit(predict, static_argnames="mode")
        self._mesh = mesh
        self._batch_size = batch_size
        self._modes = tuple(modes)
        self._sums = jax.jit(evaluation_sums)
        self._compiled: dict[str, jax.stages.Compiled] = {}

    def __call__(
        self,
        params: Params,
        batches: Iterable[Mapping[str, object]],
        *,
        check: Callable[[], object] = lambda: None,
    ) -> dict[str, ModeResult]:
        """Return the results by mode.

        Args:
          params: of the model, in every call of the same shapes and shardings.
          batches: this process's rows of each, of `eval_loader`; one pass over them.
          check: called ahead of each batch; what it raises ends the evaluation.

        Raises:
          ValueError: there were no examples.
        """
        sums: dict[str, dict[str, float]] = {mode: defaultdict(float) for mode in self._modes}
        seconds: dict[str, list[float]] = {mode: [] for mode in self._modes}
        in_flight: dict[str, Metrics] = {}
        with jax.set_mesh(self._mesh), closing_iterator(batches) as stream:
            for index, host_batch in enumerate(stream):
                check()
                batch = put_batch(host_batch, self._mesh, self._batch_size)
                computing = self._compute(params, batch, seconds if index < TIMED_BATCHES else None)
                _add(sums, in_flight)
                in_flight = computing
            _add(sums, in_flight)
        return {mode: self._result(sums[mode], seconds[mode]) for mode in self._modes}

    def _compute(
        self, params: Params, batch: Batch, seconds: dict[str, list[float]] | None
    ) -> dict[str, Metrics]:
        """Sums over a batch by mode, on their way; where `seconds` are to be added to, computed one after another."""
        for mode in () if self._compiled else self._modes:
            self._compiled[mode] = self._predict.lower(params, batch["image"], mode=mode).compile()
        reference, sums = None, {}
        if seconds is not None:
            jax.block_until_ready(batch)
        for mode, compiled in self._compiled.items():
            started = time.perf_counter()
            logits = compiled(params, batch["image"])
            if seconds is not None:
                jax.block_until_ready(logits)
                seconds[mode].append(time.perf_counter() - started)
            reference = logits if reference is None else reference
            sums[mode] = self._sums(logits, batch["label"], batch["mask"], reference)
        return sums

    def _result(self, sums: Mapping[str, float], seconds: Sequence[float]) -> ModeResult:
        count = sums.get("count", 0)
        if not count:
            raise ValueError("evaluation met no readable example")
        metrics = {name: sums[name] / count for name in ("top1", "top5", "loss")}
        scale = sums["squared_reference"]
        return ModeResult(
            metrics={**metrics, "count": int(count)},
            # The first execution of a program takes longer than the others.
            images_per_second=self._batch_size / statistics.median(seconds[1:] or seconds),
            difference=math.sqrt(sums["squared_difference"] / scale) if scale else 0.0,
        )


def _add(sums: Mapping[str, dict[str, float]], computed: Mapping[str, Metrics]) -> None:
    """Waits for the sums of a batch and adds them up, in float64 on the host."""
    for mode, values in computed.items():
        for name, value in jax.device_get(values).items():
            sums[mode][name] += float(value)


@contextlib.contextmanager
def closing_iterator(iterable: Iterable[T]) -> Iterator[Iterator[T]]:
    """Iterates, and closes an iterator that can be closed however the block ends: the threads of a loader, then."""
    iterator = iter(iterable)
    try:
        yield iterator
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()
