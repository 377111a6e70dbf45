"""What a field of a config may hold: kinds of values, each with the words that an error says it in."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of value.

    Attributes:
        expected: completes "expected ...".
        accepts: whether a value, of any type, is of this kind.
    """

    expected: str
    accepts: Callable[[Any], bool]


def integer(low: int | None = None, high: int | None = None) -> Kind:
    """Return the integers from `low` to `high`, both included; True and False are none."""
    described = "a positive integer" if (low, high) == (1, None) else f"an integer{_between(low, high, '[]')}"
    return Kind(
        described,
        lambda value: (
            type(value) is int and (low is None or low <= value) and (high is None or value <= high)
        ),
    )


def number(low: int | float | None = None, high: int | float | None = None, ends: str = "[]") -> Kind:
    """Return the finite numbers from `low` to `high`; True and False are none.

    Args:
        low: None for no bound.
        high: None for no bound.
        ends: "[" or "(" and "]" or ")": whether the bounds belong to it.
    """

    def accepts(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        above = low is None or low < value or (low == value and ends[0] == "[")
        below = high is None or value < high or (high == value and ends[1] == "]")
        return above and below

    if (low, high, ends[0]) == (0, None, "("):
        return Kind("a positive number, finite", accepts)
    return Kind(f"{'a finite' if high is None else 'a'} number{_between(low, high, ends)}", accepts)


def _between(low: int | float | None, high: int | float | None, ends: str) -> str:
    below, above = (f"{bound:.4g}" if isinstance(bound, float) else str(bound) for bound in (low, high))
    if low is None:
        return ""
    if high is None:
        return f" of at least {below}" if ends[0] == "[" else f" above {below}"
    return f" equal to {below}" if low == high else f" in {ends[0]}{below}, {above}{ends[1]}"


def text() -> Kind:
    """Return the strings, but for the empty one."""
    return Kind("a text that is not empty", lambda value: isinstance(value, str) and value != "")


def one_of(*choices: str) -> Kind:
    """Return these strings."""
    return Kind(
        f"one of {', '.join(map(repr, choices))}", lambda value: isinstance(value, str) and value in choices
    )


def truth() -> Kind:
    """Return True and False."""
    return Kind("True or False", lambda value: isinstance(value, bool))


def sequence(count: int, kind: Kind) -> Kind:
    """Return tuples (or lists, as JSON gives them) of `count` values of one kind."""
    return Kind(
        f"{count} values, each {kind.expected}",
        lambda value: (
            isinstance(value, tuple | list) and len(value) == count and all(map(kind.accepts, value))
        ),
    )


def interval(kind: Kind) -> Kind:
    """Return pairs (low, high) of one kind with low <= high."""
    pair = sequence(2, kind)
    return Kind(
        f"(low, high) with low <= high, each {kind.expected}",
        lambda value: pair.accepts(value) and value[0] <= value[1],
    )


def either(one: Kind, other: Kind) -> Kind:
    """Return what is of one kind or of the other."""
    return Kind(
        f"{one.expected}, or {other.expected}", lambda value: one.accepts(value) or other.accepts(value)
    )


def optional(kind: Kind) -> Kind:
    """Return a kind and None."""
    return either(kind, Kind("None", lambda value: value is None))


def names_of(*choices: str) -> Kind:
    """Return texts that hold some of these names, separated by commas; the empty one holds none."""
    return Kind(
        f"some of {', '.join(choices)}, separated by commas, or nothing",
        lambda value: isinstance(value, str) and (not value or set(value.split(",")) <= set(choices)),
    )


def steps() -> Kind:
    """Return texts "first:last" of two steps in their order; the empty one holds none."""
    return Kind(
        "two steps as first:last, or nothing",
        lambda value: (
            value == ""
            or (
                isinstance(value, str)
                and re.fullmatch(r"[1-9]\d*:[1-9]\d*", value) is not None
                and int(value.partition(":")[0]) <= int(value.partition(":")[2])
            )
        ),
    )
