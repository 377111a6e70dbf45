"""Checks of options, as `create_model` and mixers are given them: from recipes and command lines, of any type."""

from typing import Any

import numpy as np

CHANNELS = (1, 3, 4)
"""Of images that models of patches read."""


def check_option(option: str, value: object, valid: bool, expected: str) -> None:
    """Check an option's value.

    Raises:
        ValueError: it is not valid; what was expected is said.
    """
    if not valid:
        raise ValueError(f"{option}={value!r}; expected {expected}.")


def check_bool(option: str, value: object) -> None:
    """Check that an option is True or False."""
    check_option(option, value, isinstance(value, bool | np.bool_), "True or False")


def check_positive(option: str, value: Any) -> None:
    """Check that an option is a positive integer."""
    check_option(option, value, is_integer(value) and value >= 1, "an integer of at least 1")


def check_channels(channels: Any) -> None:
    """Check the channels of a model of patches."""
    known = channels is None or (is_integer(channels) and channels in CHANNELS)
    check_option("channels", channels, known, f"one of {CHANNELS}, or None")


def is_integer(value: Any) -> bool:
    """Return whether it is an integer, and not True or False."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether it is a number, and not True or False."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
