"""What a compiled program sends between devices, read from its text (HLO)."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from vir_jax.parallel.hlo import INSTRUCTION, read_computations

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives of one kind in one step.

    Attributes:
      count: how often one is executed; those in a loop count once per iteration.
      bytes: of the whole (gathered, or not yet scattered) arrays on one device, summed over them. What crosses a link
        depends on the algorithm: in a ring nearly these bytes, for an all-reduce twice.
      dtypes: these bytes by the arrays' dtype, as the compiler spells it: "f32", "bf16".
    """

    count: int
    bytes: int
    dtypes: Mapping[str, int]


def collectives(hlo: str) -> dict[str, Traffic]:
    """Count the collectives that each device takes part in when the program runs once.

    Args:
      hlo: `jax.stages.Compiled.as_text()`.

    Returns:
      By kind, those that occur.
    """
    computations, runs = read_computations(hlo)
    # TPUs overlap a collective with other work by splitting it over several fusions, each of which has the same
    # channel and arrays. Several collectives made of one `psum` have one channel too, but stand side by side.
    found: dict[Any, tuple[str, int, Counter[str]]] = {}
    for name, body in computations.items():
        seen: Counter[Any] = Counter()
        for number, (result, opcode, rest) in enumerate(INSTRUCTION.findall(body)):
            kind = opcode.removesuffix("-start")
            if kind in KINDS and name in runs:
                channel = re.search(r"\bchannel_id=(\d+)", rest)
                arrays = channel.group(1) if channel else (name, number), tuple(_SHAPE.findall(result))
                sizes = _sizes(kind, result, rest, asynchronous=opcode.endswith("-start"))
                found[arrays, seen[arrays]] = kind, runs[name], sizes
                seen[arrays] += 1
    counts: Counter[str] = Counter()
    dtypes: dict[str, Counter[str]] = {}
    for kind, times, sizes in found.values():
        counts[kind] += times
        for dtype, size in sizes.items():
            dtypes.setdefault(kind, Counter())[dtype] += times * size
    return {kind: Traffic(counts[kind], dtypes[kind].total(), dict(dtypes[kind])) for kind in sorted(counts)}


def _sizes(kind: str, result: str, rest: str, *, asynchronous: bool) -> Counter[str]:
    """Return the bytes of a collective's whole arrays, by dtype."""
    arrays = _SHAPE.findall(result)
    if asynchronous and kind == "all-gather":  # (operands, results)
        arrays = arrays[len(arrays) // 2 :]
    elif asynchronous and kind == "collective-permute":  # (operand, result, contexts)
        arrays = arrays[1:2]
    parts = _group_size(rest) if kind == "reduce-scatter" else 1
    sizes: Counter[str] = Counter()
    for dtype, dims in arrays:
        sizes[dtype] += parts * _itemsize(dtype) * math.prod(int(dim) for dim in dims.split(",") if dim)
    return sizes


def _itemsize(dtype: str) -> int:
    """Return the bytes of an element; `pred` and types below a byte take one."""
    digits = re.search(r"\d+", dtype)
    return max(int(digits.group()) // 8, 1) if digits else 1


def _group_size(rest: str) -> int:
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if listed:
        return len(listed.group(1).split(","))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest)
    if iota:
        return int(iota.group(1))
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", rest)
    if mesh:
        sizes = dict(re.findall(r"('\w+')=(\d+)", mesh.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'\w+'", mesh.group(2)))
    raise ValueError(f"no replica_groups in {rest[:200]!r}")
