"""Code by its place: objects by name, "package.module:name", and files such as recipes, which are in no package."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
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


def load_file(path: Path) -> ModuleType:
    """Return a Python file as a module, whatever the working directory and Python's path are.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is no Python file.
    """
    spec = importlib.util.spec_from_file_location(f"{path.stem}_of_{path.parent.name}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file; expected one such as configs/vir_b.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
