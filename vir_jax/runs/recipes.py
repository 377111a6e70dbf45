"""Recipes by name: "vir_b" for the one that comes with the package, "vir_cifar10:epochs=8" with its arguments.

They are the files of `configs/`: in a checkout beside the package, in an installed one inside of it.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from vir_jax.imports import load_file
from vir_jax.runs.config import nearest

# A flag defined by a function of this module is its caller's.
flags.disclaim_key_flags()

_PACKAGE = Path(__file__).parents[1]
FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


@cache
def recipes() -> dict[str, Path]:
    """Return the recipes that come with the package, by name."""
    folder = next(folder for folder in FOLDERS if folder.is_dir())
    return {
        path.stem: path for path in sorted(folder.glob("*.py")) if "\ndef get_config(" in path.read_text()
    }


def find_recipe(recipe: str) -> str:
    """Return the file of a recipe, with its arguments.

    Args:
      recipe: a name, or a path: what ends with ".py" or has a folder. What follows the first colon is passed on.

    Raises:
      ValueError: no recipe has that name; the nearest is named.
    """
    name, colon, arguments = recipe.partition(":")
    if name.endswith(".py") or os.path.basename(name) != name:
        return recipe
    if name not in recipes():
        raise ValueError(
            f"no recipe is called {name!r}; did you mean {nearest(name, recipes())!r}? Known are"
            f" {', '.join(recipes())}; a file of your own is named by its path, configs/{name or 'x'}.py"
        )
    return f"{recipes()[name]}{colon}{arguments}"


def load_recipe(recipe: str) -> ml_collections.ConfigDict:
    """Return the config of a recipe: `train(load_recipe("vir_digits"), workdir)`.

    Args:
      recipe: a name or a path, with arguments after a colon; see `find_recipe`.

    Raises:
      ValueError: no such name, or arguments that the recipe does not take.
      FileNotFoundError: no such file.
    """
    path, _, arguments = find_recipe(recipe).partition(":")
    return load_file(Path(path)).get_config(arguments or None)


def define_recipe(
    name: str,
    help_string: str,
    *,
    flag_values: flags.FlagValues = flags.FLAGS,
    sys_argv: list[str] | None = None,
) -> flags.FlagHolder[Any]:
    """Define a flag whose value is the config of a recipe, and whose fields are flags: --config.optim.lr=1e-3."""
    holder = config_flags.DEFINE_config_file(
        name, help_string=help_string, flag_values=flag_values, sys_argv=sys_argv
    )
    flag_values[name].parser = _RecipeParser(name=name)
    return holder


class _RecipeParser(ConfigFileFlagParser):
    """Load a recipe by name or path."""

    def parse(self, path: str) -> Any:
        """Return its config."""
        return super().parse(find_recipe(path))
