"""What stored configs of earlier versions say, in the fields of today's.

A run outlives the code that started it: its config was written when fields had other names, or did not exist yet.
Whoever changes `default_config` so that an older config would be misread adds a line to one of the tables below. A name
that has been used is never used again for something else, so that today's configs pass unchanged.
"""

import difflib
import json
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from vir_jax.runs.config import default_config

Fields = dict[str, Any]  # By dotted name.

RENAMED: dict[str, str] = {}
"""Fields by their former names -> their names today."""

RESPELT: dict[str, Callable[[Any], Any]] = {
    "model.image_size": lambda size: [size, size] if isinstance(size, int) else [size[0], size[-1]],
}
"""Fields that have or had several spellings for one value: by today's name, stored value -> value in one spelling."""

ABSENT: dict[str, Callable[[Fields], Any]] = {}
"""Later fields whose default is not what runs did before there was a choice: stored fields, by today's names -> value.

A later field that is not here gets its default.
"""


def migrate(stored: Mapping[str, Any], *, where: str) -> ml_collections.ConfigDict:
    """Return a stored config of any version as one of today's: complete, typed and locked.

    Args:
      stored: what was written as JSON.
      where: it was found, for messages.

    Raises:
      ValueError: a field that no version knows, or one with a value of another type; it is named.
    """
    fields: Fields = {}
    for name, value in flatten(stored).items():
        today = RENAMED.get(name, name)
        if today in fields:
            raise ValueError(f"{where} has config.{today} twice, once under its former name")
        fields[today] = value
    fields |= {name: respell(fields[name]) for name, respell in RESPELT.items() if name in fields}
    fields |= {name: value(fields) for name, value in ABSENT.items() if name not in fields}

    config = default_config()
    known = flatten(json.loads(config.to_json()))
    for name, value in fields.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"{where} has a field that this version does not know, config.{name} = {value!r}; the nearest is"
                f" config.{near}. It was written by a later version, or by hand: use that version"
            )
        section, _, field = name.rpartition(".")
        try:
            (config[section] if section else config)[field] = value
        except TypeError as error:
            raise ValueError(f"{where} has config.{name} = {value!r}: {error}") from error
    return config


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Fields:
    """Return the fields of nested sections by their dotted names."""
    fields: Fields = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            fields |= flatten(value, f"{prefix}{name}.")
        else:
            fields[f"{prefix}{name}"] = value
    return fields
