"""Small trained models inside the package, by name: folders as `python -m vir_jax.weights export` writes them.

To add one: python -m vir_jax.weights export --checkpoint=last runs/vir_cifar10 vir_jax/zoo/vir_cifar10
"""

import difflib
import os
from pathlib import Path

from vir_jax.weights.files import WEIGHTS

FOLDER = Path(__file__).parents[1] / "zoo"


def zoo_names() -> tuple[str, ...]:
    """Return the names of the models that there are."""
    return tuple(sorted(file.parent.name for file in FOLDER.glob(f"*/{WEIGHTS}")))


def find_weights(path: str | os.PathLike[str]) -> Path:
    """Return where weights lie: what exists at this path, else the model of this name.

    Raises:
        FileNotFoundError: neither; the names there are stand in the message.
    """
    path = Path(path)
    if path.exists():
        return path
    names = zoo_names()
    if str(path) in names:
        return FOLDER / path
    near = difflib.get_close_matches(str(path), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise FileNotFoundError(
        f"no such file or folder: {path}, and no model of the zoo ({', '.join(names)}){hint}"
    )
