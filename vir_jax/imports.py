"""Objects by name, "package.module:name", for what a config names in code of one's own."""

import importlib
from typing import Any


def load_object(spec: str, what: str) -> Any:
    """Return an object by its name.

    Args:
      spec: "package.module:name".
      what: it is, for messages.

    Raises:
      ValueError: it cannot be imported.
    """
    module, _, name = spec.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{what} is {spec!r}, which cannot be imported: {error}; expected 'package.module:name'. Python looks in"
            " the folder of the command and in those of PYTHONPATH"
        ) from error
