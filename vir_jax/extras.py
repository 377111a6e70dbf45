"""Optional packages: `pip install "vir-jax[train]"` and the like bring them; this says which one is missing.

The ops and the models need none of them.
"""

import importlib.util
import sys


class MissingPackageError(ImportError):
    """A package is not installed that an extra of this project brings."""


def require(extra: str, *modules: str) -> None:
    """Check that what an extra brings can be imported; nothing is imported.

    Args:
      extra: a key of `project.optional-dependencies` in pyproject.toml.
      *modules: top-level modules that the caller imports next.

    Raises:
      MissingPackageError: some are not there; they are named, with the command that installs them.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        told = (
            f'{", ".join(missing)} {verb} not installed: pip install "vir-jax[{extra}]", or, in a checkout, '
            f'pip install -e ".[{extra}]"'
        )
        if sys.argv[:1] == [
            "-m"
        ]:  # `python -m vir_jax.weights` imports the package before any code of the command.
            sys.exit(told)
        raise MissingPackageError(told)
