"""Images per second and memory of a model, batch size after batch size until one no longer fits."""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Float

from vir_jax.models.variables import split_variables
from vir_jax.parallel.hardware import CHIPS
from vir_jax.parallel.memory import compiled_memory
from vir_jax.runs.model import image_size, model_functions

# Time that a batch size is measured for; the fastest of several calls counts.
SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Throughput:
    """What one batch size gives.

    Attributes:
      batch: images of a call.
      images_per_second: of the fastest call; None where it does not fit.
      memory: bytes of the compiled program, parameters and images included; None where the compiler gave up.
    """

    batch: int
    images_per_second: float | None
    memory: int | None


def measure(
    options: ml_collections.ConfigDict,
    *,
    num_classes: int = 1000,
    training: bool = False,
    first: int = 1,
    limit: int | None = None,
    capacity: int | None = None,
) -> Iterator[Throughput]:
    """Yield what batches of `first`, twice, four times, ... images give, up to the first one that does not fit.

    Compilation is not counted, nor is reading data: the images lie on the device.

    Args:
      options: keywords of `create_model`.
      num_classes: of the head.
      training: gradients of all parameters, too; no optimiser.
      first: batch size to begin with.
      limit: largest batch size; None: until one does not fit.
      capacity: bytes that the device has; None: `device_capacity`.

    Raises:
      ValueError: options that `create_model` refuses.
    """
    functions = model_functions(options, num_classes)
    size = image_size(options)
    capacity = device_capacity() if capacity is None else capacity
    params = jax.jit(functions.init)(jax.random.key(0))
    call = jax.jit(_gradients(functions.model) if training else functions.apply)
    batch = first
    while limit is None or batch <= limit:
        images = jax.ShapeDtypeStruct(
            (batch, *size, _channels(functions.abstract)), _dtype(functions.abstract)
        )
        found = _measure(call, params, images, capacity)
        yield found
        if found.images_per_second is None:
            return
        batch *= 2


def _measure(call: Any, params: Any, images: jax.ShapeDtypeStruct, capacity: int | None) -> Throughput:
    batch = images.shape[0]
    try:
        compiled = call.lower(params, images).compile()
        memory = compiled_memory(compiled).get("total")
        if capacity is not None and memory is not None and memory > capacity:
            return Throughput(batch, None, memory)
        given = jnp.zeros(images.shape, images.dtype)
        jax.block_until_ready(compiled(params, given))
        fastest, begun = float("inf"), time.perf_counter()
        while time.perf_counter() - begun < SECONDS:
            started = time.perf_counter()
            jax.block_until_ready(compiled(params, given))
            fastest = min(fastest, time.perf_counter() - started)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        return Throughput(batch, None, None)
    return Throughput(batch, batch / fastest, memory)


def _gradients(model_of: Callable[[Any], Any]) -> Callable[[Any, Array], Any]:
    def gradients(params: Any, images: Array) -> Any:
        graph, trained, others = split_variables(model_of(params))

        def loss(trained: Any) -> Float[Array, ""]:
            return jnp.mean(jnp.square(nnx.merge(graph, trained, others)(images).astype(jnp.float32)))

        return jax.grad(loss)(trained)

    return gradients


def _channels(model: Any) -> int:
    likelihood = getattr(model.stem, "likelihood", None)
    return 3 if likelihood is None else likelihood.channels


def _dtype(model: Any) -> Any:
    return jnp.float32 if getattr(model.stem, "likelihood", None) is None else jnp.int32


def device_capacity() -> int | None:
    """Return the bytes that a process may have of the first device's memory; None where that is not known."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = (device.memory_stats() or {}).get("bytes_limit")
    chip = CHIPS.get(device.device_kind)
    return limit or (None if chip is None else chip.memory)
