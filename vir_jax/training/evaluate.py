"""Means of a task's metrics over a data set, in one form of the mixer or in several."""

import contextlib
import dataclasses
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from vir_jax.parallel.mesh import put_batch
from vir_jax.runs.state import Params
from vir_jax.tasks import Task
from vir_jax.tasks.task import Batch
from vir_jax.training.step import Metrics

# Batches that are waited for, to see how long each mode takes; the device gets those after them without a pause.
TIMED_BATCHES = 8

# What is summed besides a task's values.
COUNT, DIFFERENCE, REFERENCE = "count", "squared_difference", "squared_reference"

T = TypeVar("T")
Sums = dict[str, Any]  # Numbers or arrays, float64.


@dataclasses.dataclass(frozen=True)
class ModeResult:
    """How one mode fared on a data set."""

    metrics: dict[str, float]  # The task's, and the count of examples.
    columns: dict[str, str]  # The task's metrics as text, by heading.
    images_per_second: float  # Of the forward pass on whole batches, without loading and the first execution.
    difference: float  # Relative RMS difference of its outputs from the first mode's.


class Evaluator:
    """Evaluates parameters on a data set, each example counted once, in each mode on the same batches.

    It is compiled in the first call, before the first batch is computed, and not again. While the device computes a
    batch, the next one is loaded and handed over.

    Args:
      task: what was learned.
      apply: (params, inputs, mode=...) -> outputs, of the model.
      mesh: over which batches are split.
      batch_size: over all processes.
      modes: that `apply` is called with; the first is what the others are compared with.
    """

    def __init__(
        self,
        task: Task,
        apply: Callable[..., Float[Array, "b ..."]],
        mesh: Mesh,
        *,
        batch_size: int,
        modes: Sequence[str],
    ) -> None:
        self._task = task
        self._apply = apply
        self._forward = jax.jit(self._outputs, static_argnames="mode")
        self._mesh = mesh
        self._batch_size = batch_size
        self._modes = tuple(modes)
        self._sums = jax.jit(evaluation_sums, static_argnums=0)
        self._compiled: dict[str, jax.stages.Compiled] = {}

    def __call__(
        self,
        params: Params,
        batches: Iterable[Mapping[str, object]],
        *,
        task: Task | None = None,
        check: Callable[[], object] = lambda: None,
        observe: Callable[[Float[np.ndarray, "b ..."], Mapping[str, object]], object] | None = None,
    ) -> dict[str, ModeResult]:
        """Return the results by mode.

        Args:
          params: of the model, in every call of the same shapes and shardings.
          batches: this process's rows of each, of `eval_loader`; one pass over them.
          task: that judges the outputs, of the same inputs (`Task.among`); None: the evaluator's.
          check: called ahead of each batch; what it raises ends the evaluation.
          observe: called with the first mode's outputs of each batch, and the batch; of one process alone.

        Raises:
          ValueError: there were no examples.
        """
        task = task or self._task
        sums: dict[str, Sums] = {mode: defaultdict(float) for mode in self._modes}
        seconds: dict[str, list[float]] = {mode: [] for mode in self._modes}
        in_flight: dict[str, Metrics] = {}
        with jax.set_mesh(self._mesh), closing_iterator(batches) as stream:
            for index, host_batch in enumerate(stream):
                check()
                batch = put_batch(host_batch, self._mesh, self._batch_size)
                outputs, computing = self._compute(
                    task, params, batch, seconds if index < TIMED_BATCHES else None
                )
                _add(sums, in_flight)
                in_flight = computing
                if observe is not None:
                    observe(np.asarray(outputs), host_batch)
            _add(sums, in_flight)
        return {mode: self._result(task, sums[mode], seconds[mode]) for mode in self._modes}

    def _outputs(self, params: Params, batch: Batch, *, mode: str) -> Float[Array, "b ..."]:
        return self._apply(params, self._task.inputs(batch), mode=mode).astype(jnp.float32)

    def _compute(
        self, task: Task, params: Params, batch: Batch, seconds: dict[str, list[float]] | None
    ) -> tuple[Array, dict[str, Metrics]]:
        """Return the first mode's outputs and sums over a batch by mode, on their way; where `seconds` are to be added
        to, computed one after another.
        """
        for mode in () if self._compiled else self._modes:
            self._compiled[mode] = self._forward.lower(params, batch, mode=mode).compile()
        reference, sums = None, {}
        if seconds is not None:
            jax.block_until_ready(batch)
        for mode, compiled in self._compiled.items():
            started = time.perf_counter()
            outputs = compiled(params, batch)
            if seconds is not None:
                jax.block_until_ready(outputs)
                seconds[mode].append(time.perf_counter() - started)
            reference = outputs if reference is None else reference
            sums[mode] = self._sums(task, outputs, reference, batch)
        assert reference is not None
        return reference, sums

    def _result(self, task: Task, sums: Sums, seconds: Sequence[float]) -> ModeResult:
        count = int(sums.pop(COUNT, 0))
        if not count:
            raise ValueError("evaluation met no readable example")
        difference, scale = float(sums.pop(DIFFERENCE)), float(sums.pop(REFERENCE))
        metrics = task.metrics({name: np.asarray(value / count) for name, value in sums.items()})
        return ModeResult(
            metrics={**metrics, COUNT: count},
            columns=task.columns(metrics),
            # The first execution of a program takes longer than the others.
            images_per_second=self._batch_size / statistics.median(seconds[1:] or seconds),
            difference=math.sqrt(difference / scale) if scale else 0.0,
        )


def evaluation_sums(task: Task, outputs: Array, reference: Array, batch: Batch) -> Metrics:
    """Return sums over the examples whose mask is True.

    Args:
      task: whose values are summed.
      outputs: of the model, [b ...].
      reference: other outputs, to compare them with.
      batch: of the evaluation data.

    Returns:
      The task's values; count; squared_difference of the outputs from `reference`, and squared_reference (float32:
      counts are exact up to 2**24 examples a batch).
    """
    mask = batch["mask"]
    inner = range(1, outputs.ndim)
    values = {
        **task.evaluate(outputs, batch),
        COUNT: jnp.ones_like(mask),
        DIFFERENCE: jnp.sum(jnp.square(outputs - reference), axis=inner),
        REFERENCE: jnp.sum(jnp.square(reference), axis=inner),
    }

    def total(value: Array) -> Array:
        # where, not a product: a NaN in the padding must not reach the sum.
        counted = jnp.where(mask.reshape(-1, *[1] * (value.ndim - 1)), value.astype(jnp.float32), 0)
        return jnp.sum(counted, axis=0)

    return {name: total(value) for name, value in values.items()}


def check_task(
    task: Task, apply: Callable[..., Float[Array, "b ..."]], params: Params, batch: Mapping[str, Any]
) -> None:
    """Check on shapes alone what evaluations will give: a mistake in them would show when the first is due.

    Args:
      task: what is learned.
      apply: (params, inputs) -> outputs, of the model.
      params: shapes of its parameters.
      batch: shapes of a batch, without a mask.

    Raises:
      ValueError: values that are not one for each example, or under a name that is taken, or no metric that the best
        goes by.
    """

    def evaluate(params: Params, batch: Batch) -> Metrics:
        return task.evaluate(apply(params, task.inputs(batch)).astype(jnp.float32), batch)

    size = batch["image"].shape[0]
    values = jax.eval_shape(evaluate, params, {**batch, "mask": jax.ShapeDtypeStruct((size,), bool)})
    for name, value in values.items():
        if name in (COUNT, DIFFERENCE, REFERENCE):
            raise ValueError(
                f"{type(task).__name__}.evaluate gives {name}, which is taken; expected another name"
            )
        if value.shape[:1] != (size,):
            raise ValueError(
                f"{type(task).__name__}.evaluate gives {name} of shape {value.shape}; expected one for each of the"
                f" {size} examples of a batch, [{size}, ...]"
            )
    metrics = task.metrics({name: np.ones(value.shape[1:]) for name, value in values.items()})
    if task.best not in metrics:
        raise ValueError(
            f"{type(task).__name__}.best is {task.best!r}; expected one of its metrics, {sorted(metrics)}"
        )


def _add(sums: Mapping[str, Sums], computed: Mapping[str, Metrics]) -> None:
    """Wait for the sums of a batch and add them up, in float64 on the host."""
    for mode, values in computed.items():
        for name, value in jax.device_get(values).items():
            sums[mode][name] += np.asarray(value, np.float64)


@contextlib.contextmanager
def closing_iterator(iterable: Iterable[T]) -> Iterator[Iterator[T]]:
    """Iterate, and close an iterator that can be closed however the block ends: the threads of a loader, then."""
    iterator = iter(iterable)
    try:
        yield iterator
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()
