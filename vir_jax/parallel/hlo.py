"""The text of a compiled program (HLO): its computations, and how often each is run."""

import re
from collections.abc import Iterator, Mapping

INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\((.*)$", re.M)
"""A line of a computation: its result's shape, the operation, and the rest."""

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", re.M)
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# The end of JAX's loops, which count up from 0: TPUs' programs say no more than that.
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_BOUND = re.compile(r"^\s+ROOT [^\n]* compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT", re.M)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def read_computations(hlo: str) -> tuple[dict[str, str], dict[str, int]]:
    """Return the text of each computation, and how often those that are run are run.

    Args:
      hlo: `jax.stages.Compiled.as_text()`.

    Returns:
      Both by name. A loop of unknown length counts as one iteration.

    Raises:
      ValueError: a text that is no compiled program's.
    """
    entry = _entry(hlo)
    computations = dict(_computations(hlo))
    return computations, _runs(computations, entry=entry)


def estimated_cycles(hlo: str) -> int:
    """Return the clock cycles that the compiler expects a program to take, one instruction after the other.

    Compilers for TPUs write an estimate beside each instruction that computes or copies; what one does while another
    waits for memory is not taken off.

    Args:
      hlo: `jax.stages.Compiled.as_text()`, of a program compiled for a TPU.

    Raises:
      ValueError: a text without an estimate, such as a CPU's.
    """
    computations, runs = read_computations(hlo)
    cycles = {name: [int(each) for each in _CYCLES.findall(body)] for name, body in computations.items()}
    if not any(cycles.values()):
        raise ValueError("this program says no estimated_cycles: expected one that was compiled for a TPU")
    return sum(runs.get(name, 0) * sum(each) for name, each in cycles.items())


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
            for _, opcode, rest in INSTRUCTION.findall(body)
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
