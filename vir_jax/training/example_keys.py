"""Random keys that know which examples of the batch they draw for.

The first axis of what is drawn is that of the examples. A part of a batch so draws what the whole batch would have
drawn for it, whether the part is one device's or one slice's of gradient accumulation: a run is the same on any mesh,
in any number of slices. JAX's own keys draw by shape, and would give every part the same numbers.
"""

from typing import Any

import jax
import jax.extend.random
import jax.numpy as jnp
from jaxtyping import Array, Int, Integer, Key, UInt32

Data = UInt32[Array, "4"]
"""A key of threefry, the number of the first example, and the step from one example to the next."""


def example_key(
    key: Key[Array, ""], *, start: int | Int[Array, ""] = 0, step: int | Int[Array, ""] = 1
) -> Key[Array, ""]:
    """Return a key whose draws are those of the examples start, start + step, start + 2 step, ... of the batch.

    Args:
      key: of the whole batch, an ordinary one of the kind "threefry2x32".
      start: number of the first example, counted over the whole batch.
      step: from one example to the next.
    """
    rows = jnp.stack([jnp.asarray(start), jnp.asarray(step)]).astype(jnp.uint32)
    return jax.random.wrap_key_data(jnp.concatenate([jax.random.key_data(key), rows]), impl=_IMPLEMENTATION)


def _plain(data: Data) -> Key[Array, ""]:
    return jax.random.wrap_key_data(data[:2], impl="threefry2x32")


def _with_rows(keys: Key[Array, "..."], data: Data) -> UInt32[Array, "... 4"]:
    rows = jnp.broadcast_to(data[2:], (*keys.shape, 2))
    return jnp.concatenate([jax.random.key_data(keys), rows], axis=-1)


def _seed(seed: Integer[Array, ""]) -> Data:
    key = jax.random.key(seed, impl="threefry2x32")
    return jnp.concatenate([jax.random.key_data(key), jnp.array([0, 1], jnp.uint32)])


def _split(data: Data, shape: tuple[int, ...]) -> UInt32[Array, "... 4"]:
    return _with_rows(jax.random.split(_plain(data), shape), data)


def _fold_in(data: Data, number: Any) -> Data:
    return _with_rows(jax.random.fold_in(_plain(data), number), data)


def _random_bits(data: Data, bit_width: int, shape: tuple[int, ...]) -> Array:
    dtype, key = f"uint{bit_width}", _plain(data)
    if not shape:
        return jax.random.bits(key, shape, dtype)
    rows = data[2] + data[3] * jnp.arange(shape[0], dtype=jnp.uint32)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    return jax.vmap(lambda each: jax.random.bits(each, shape[1:], dtype))(keys)


_IMPLEMENTATION = jax.extend.random.define_prng_impl(
    key_shape=(4,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="by_example",
    tag="by_example",
)
