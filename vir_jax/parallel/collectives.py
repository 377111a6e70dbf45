"""What a compiled program sends between devices, read from its text (HLO)."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", re.M)
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\((.*)$", re.M)
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# The end of JAX's loops, which count up from 0: TPUs' programs say no more than that.
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_BOUND = re.compile(r"^\s+ROOT [^\n]* compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT", re.M)


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
    entry = _entry(hlo)
    computations = dict(_computations(hlo))
    runs = _runs(computations, entry=entry)
    # TPUs overlap a collective with other work by splitting it over several fusions, each of which has the same
    # channel and arrays. Several collectives made of one `psum` have one channel too, but stand side by side.
    found: dict[Any, tuple[str, int, Counter[str]]] = {}
    for name, body in computations.items():
        seen: Counter[Any] = Counter()
        for number, (result, opcode, rest) in enumerate(_INSTRUCTION.findall(body)):
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


def _entry(hlo: str) -> str:
    match = re.search(r"^ENTRY %?([\w.\-]+) ", hlo, re.M)
    if match is None:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
    return match.group(1)


def _computations(hlo: str) -> Iterator[tuple[str, str]]:
    """Return (name, text) of each computation."""
    starts = list(_COMPUTATION.finditer(hlo))
    ends = [match.start() for match in starts[1:]] + [len(hlo)]
    for match, end in zip(starts, ends, strict=True):
        yield match.group(1), hlo[match.end() : end]


def _runs(computations: Mapping[str, str], *, entry: str) -> dict[str, int]:
    """Return how often each computation is run; a loop of unknown length counts as one iteration."""
    calls = {
        name: [
            (called.strip(" %"), _trips(rest, computations) if opcode == "while" else 1)
            for _, opcode, rest in _INSTRUCTION.findall(body)
            for group in _CALLED.findall(rest)
            for called in group.strip("{}").split(",")
        ]
        for name, body in computations.items()
    }
    runs: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        runs[name] = runs.get(name, 0) + times
        for called, trips in calls.get(name, ()):
            visit(called, times * trips)

    visit(entry, 1)
    return runs


def _trips(loop: str, computations: Mapping[str, str]) -> int:
    """Return how often a loop runs; 1 where that is not known."""
    if known := _TRIPS.search(loop):
        return int(known.group(1))
    named = _CONDITION.search(loop)
    condition = computations.get(named.group(1), "") if named else ""
    bound = _BOUND.search(condition)
    if bound is None:
        return 1
    constant = rf"^\s+%?{re.escape(bound.group(1))} = s32\[\]\S* constant\((\d+)\)"
    value = re.search(constant, condition, re.M)
    return int(value.group(1)) if value else 1


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
