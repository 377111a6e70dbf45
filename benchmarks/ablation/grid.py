"""What a grid is: one recipe, the fields that all of its runs change, named rows that change a few more, and seeds."""

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from vir_jax.imports import load_file
from vir_jax.runs.config import default_config, flatten, nearest
from vir_jax.runs.recipes import load_recipe
from vir_jax.runs.validate import validate
from vir_jax.runs.workdir import HOST_FIELDS

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Grid:
    """A file of `benchmarks/grids/`, as it stands there.

    Attributes:
        name: of the file, without its ending.
        recipe: as `train.py --config` takes it, from the root of the repository.
        common: fields that all runs change, by dotted name.
        rows: fields that a row changes besides, by the row's name.
        seeds: that each row is run with.
    """

    name: str
    recipe: str
    common: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Run:
    """One row with one seed.

    Attributes:
        row: its name.
        seed: its seed.
        recipe: of the grid.
        fields: all that differ from the recipe, by dotted name.
        workdir: where the run is kept.
    """

    row: str
    seed: int
    recipe: str
    fields: Mapping[str, Any]
    workdir: Path

    @functools.cached_property
    def config(self) -> ml_collections.ConfigDict:
        """The config, checked.

        Raises:
            ValueError: naming the row, the field, its value and what it should be.
        """
        config = load_recipe(f"{ROOT}/{self.recipe}")
        known = flatten(config)
        for name, value in self.fields.items():
            if name not in known:
                raise ValueError(
                    f"row {self.row!r}: config has no field {name!r}; did you mean {nearest(name, known)!r}?"
                )
            section, _, field = name.rpartition(".")
            try:
                (config[section] if section else config)[field] = value
            except TypeError as error:
                raise ValueError(f"row {self.row!r}: config.{name} is {value!r}: {error}") from error
        try:
            validate(config)
        except ValueError as error:
            raise ValueError(f"row {self.row!r}: {error}") from error
        return config

    @property
    def identity(self) -> dict[str, Any]:
        """All that the config says beyond the defaults, but for what belongs to the machine; JSON data, by dotted name.

        Two runs of the same identity are the same run, wherever they were made.
        """
        defaults = flatten(default_config())
        fields = {
            name: value
            for name, value in flatten(self.config).items()
            if name not in HOST_FIELDS and (name not in defaults or value != defaults[name])
        }
        return json.loads(json.dumps(fields))

    def arguments(self) -> list[str]:
        """Return what follows `python` to train this run, in the root of the repository."""
        fields = [f"--config.{name}={value}" for name, value in self.fields.items()]
        return ["train.py", f"--config={self.recipe}", f"--workdir={self.workdir.resolve()}", *fields]


def load_grid(path: Path) -> Grid:
    """Read a grid's file: RECIPE, COMMON, ROWS and SEEDS.

    Raises:
        FileNotFoundError: there is none.
        ValueError: one of the four is missing, a row is no folder's name, or seeds are set as a field.
    """
    module = load_file(path)
    missing = [name for name in ("RECIPE", "COMMON", "ROWS", "SEEDS") if not hasattr(module, name)]
    if missing:
        raise ValueError(f"{path} does not define {', '.join(missing)}; see benchmarks/grids/digits.py")
    for row, fields in module.ROWS.items():
        if not re.fullmatch(r"\w[\w.,=+-]*", row):
            raise ValueError(
                f"row {row!r} of {path}: expected letters, digits and _ . , = + -, as of a folder"
            )
        if "seed" in {**module.COMMON, **fields}:
            raise ValueError(f"row {row!r} of {path} has a field 'seed'; seeds are those of SEEDS")
    return Grid(path.stem, module.RECIPE, module.COMMON, module.ROWS, tuple(module.SEEDS))


def runs_of(
    grid: Grid, folder: Path, *, rows: Iterable[str], seeds: Iterable[int], fields: Mapping[str, Any]
) -> list[Run]:
    """Return the runs of some rows and seeds, seed by seed, so that each row has a result early.

    Args:
        grid: that they belong to.
        folder: below which every run has its own.
        rows: which.
        seeds: which.
        fields: of this machine, that the grid leaves open.
    """
    rows = list(rows)
    return [
        Run(
            row,
            seed,
            grid.recipe,
            {**grid.common, **grid.rows[row], **fields, "seed": seed},
            folder / grid.name / row / f"seed_{seed}",
        )
        for seed in seeds
        for row in rows
    ]
