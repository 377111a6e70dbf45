"""Bytes that a device holds: of sharded arrays, and of a compiled program."""

import math
from typing import Any

import jax


def bytes_per_device(state: Any) -> int:
    """Return the bytes of a tree of shapes with shardings that one device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
    )


def compiled_memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Return the bytes on each device of a compiled step: arguments, outputs not aliased to them, temporaries, sum.

    Empty where the backend does not tell.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        return {}
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
    return {**parts, "total": sum(parts.values())}
