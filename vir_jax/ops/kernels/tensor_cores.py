"""Products of 64 x 64 matrices on a Hopper GPU's tensor cores, and as the interpreter of Pallas computes them.

Tensor cores multiply 16-bit numbers. What has more digits is a sum of bfloat16 parts, each what those before leave
over: two hold 16 bits, three all of fp32. They add up in fp32, but cut off what does not fit into the digits of a
running sum, where a processor rounds: an H200's errors are those of that rule. So a product begins with what is
smallest, and with zero, not with what it is added to; and the interpreter adds up in the same way.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Float32

BLOCK = 64
"""Rows and columns of every matrix."""
PARTS = {"bfloat16": 1, "float16": 2, "float32": 3}
WGMMA_DEPTH = 16  # products in a sum of one instruction

Matrix = Float32[Array, "64 64"]
Parts = Sequence[Sequence[Any]]
"""One matrix, or several beside each other: references by block and part."""
Factors = tuple[Parts | Callable[[], Parts], Parts]
"""Of a product. A first factor that is a function is called while the products before are computed."""


def split(x: Float[Array, "*x"], count: int) -> list[BFloat16[Array, "*x"]]:
    """Return `count` arrays whose sum is x, to eight bits each.

    By its bits: that costs a GPU less than a conversion there and back, and XLA, which may leave out such a pair of
    conversions, keeps it. Of two the first is cut off, which saves an addition; of three all are rounded.
    """
    half = jnp.uint32(0x8000 if count > 2 else 0)
    x = x.astype(jnp.float32)
    parts = []
    for _ in range(count - 1):
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        first = jax.lax.bitcast_convert_type((bits + half) & jnp.uint32(0xFFFF0000), jnp.float32)
        parts.append(first.astype(jnp.bfloat16))
        x = x - first
    return [*parts, x.astype(jnp.bfloat16)]


def sum_of(parts: Iterable[Any]) -> Matrix:
    """Return the matrix whose parts these references are, in fp32."""
    first, *more = (part[...].astype(jnp.float32) for part in parts)
    return sum(more, start=first)


def _terms(x: Parts, y: Parts) -> Iterator[tuple[Any, Any]]:
    """Yield, of the product of sums of parts, the terms that are not smaller than the last part, smallest first."""
    pairs = [
        (i + j, a, b)
        for xs, ys in zip(x, y, strict=True)
        for i, a in enumerate(xs)
        for j, b in enumerate(ys)
        if i + j < max(len(xs), len(ys))
    ]
    for _, a, b in sorted(pairs, key=lambda pair: -pair[0]):
        yield a, b


def products(
    factors: Sequence[Factors], meanwhile: Callable[[], Any] = lambda: None
) -> tuple[list[Matrix], Any]:
    """Return products, and what is computed while tensor cores are at them."""

    def multiply(*accumulators: Any) -> tuple[list[Matrix], Any]:
        for accumulator, (x, y) in zip(accumulators, factors, strict=True):
            for a, b in _terms(x() if callable(x) else x, y):
                plgpu.wgmma(accumulator, a, b)
        other = meanwhile()
        return [accumulator[...] for accumulator in accumulators], other

    return pl.run_scoped(multiply, *[plgpu.ACC((BLOCK, BLOCK), jnp.float32) for _ in factors])


def transpose(ref: Any) -> Any:
    """Return a reference to the transposed matrix."""
    return ref.transpose((1, 0))


def load(ref: Any) -> Matrix:
    """Load from global memory."""
    # JAX 0.10 wants an index besides, 0.11 does not want it, and 0.12 does not take it.
    index = inspect.signature(plgpu.load).parameters.get("idx")
    needed = index is not None and index.default is inspect.Parameter.empty
    return plgpu.load(ref, *([()] if needed else []), optimized=False)


# The interpreter knows products of two references alone, none of them transposed.


def _emulated_products(
    factors: Sequence[Factors], meanwhile: Callable[[], Any] = lambda: None
) -> tuple[list[Matrix], Any]:
    return [_emulated_product(x() if callable(x) else x, y) for x, y in factors], meanwhile()


def _emulated_product(x: Parts, y: Parts) -> Matrix:
    left, right = zip(*_terms(x, y), strict=True)
    a = jnp.stack([ref[...].astype(jnp.float32) for ref in left])
    b = jnp.stack([ref[...].astype(jnp.float32) for ref in right])
    a = a.reshape(len(left), BLOCK, -1, WGMMA_DEPTH)
    b = b.reshape(len(left), -1, WGMMA_DEPTH, BLOCK)
    sums = jnp.einsum("tiks,tksj->tkij", a, b).reshape(-1, BLOCK, BLOCK)
    start = jnp.zeros((BLOCK, BLOCK), jnp.float32)
    return jax.lax.scan(lambda total, more: (_cut_off_sum(total, more), None), start, sums)[0]


def _cut_off_sum(x: Matrix, y: Matrix) -> Matrix:
    """Return x + y, rounded towards zero."""
    total = x + y
    of_y = total - x
    rest = (x - (total - of_y)) + (y - of_y)
    return jnp.where(total * rest < 0, jnp.nextafter(total, jnp.float32(0)), total)


def _emulated_transpose(ref: Any) -> BFloat16[Array, "64 64"]:
    return ref[...].T


def _emulated_load(ref: Any) -> Matrix:
    return ref[...]


COMPILED = products, transpose, load
"""What a kernel multiplies with, on a GPU."""
EMULATED = _emulated_products, _emulated_transpose, _emulated_load
"""The same for the interpreter."""


def interpreter() -> Any:
    """Return what tells `plgpu.kernel` to interpret."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public from jax 0.12 on

    return InterpretGPUParams()
