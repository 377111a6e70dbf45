"""What a run is evaluated on: its evaluation data, and further sets by name."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

import ml_collections

DEFAULT, ALL = "default", "all"
"""What no set is called: these are the run's evaluation data, and all of them."""

OWN = "own"
"""Of an evaluation set's `classes`: those that the set has."""


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """One of `config.evaluations`, or, without a name, the evaluation data of `config.data`.

    Attributes:
      name: that its metrics are called by, "name/top1".
      dataset: see `vir_jax.data.open_source`.
      split: of it.
      data_dir: where the data lie.
      classes: names of the classes that count: their examples alone are taken, and the model chooses among them alone.
        "own": those that the data have. None: all examples, and the model chooses among all that it knows.
    """

    name: str
    dataset: str
    split: str
    data_dir: str | None
    classes: tuple[str, ...] | Literal["own"] | None = None

    @property
    def called(self) -> str:
        """What it is called in messages."""
        return f"the evaluation set {self.name!r}" if self.name else "the evaluation data"


def default_set(config: ml_collections.ConfigDict) -> EvaluationSet:
    """Return the evaluation data of a config, which "best" goes by."""
    data = config.data
    return EvaluationSet("", data.dataset, data.eval_split, data.data_dir)


def named_sets(config: ml_collections.ConfigDict) -> tuple[EvaluationSet, ...]:
    """Return the further evaluation sets of a config, in its order.

    Raises:
      ValueError: an entry that is none, naming it and what it should be.
    """
    sets = tuple(_read(entry, default_set(config)) for entry in config.evaluations)
    names = [one.name for one in sets]
    if len(set(names)) < len(names):
        raise ValueError(f"config.evaluations has sets of the same name: {names}; expected a name for each")
    return sets


def _read(entry: Any, default: EvaluationSet) -> EvaluationSet:
    wrong = ValueError(
        f"config.evaluations has {entry!r}; expected {{'name': letters, digits and _ . -, and what differs from"
        " config.data of 'dataset', 'split', 'data_dir' and 'classes' (their names, or 'own')}"
    )
    if not isinstance(entry, Mapping) or entry.keys() - {f.name for f in dataclasses.fields(EvaluationSet)}:
        raise wrong
    classes = entry.get("classes")
    names = list(classes) if isinstance(classes, tuple | list) else []
    texts = [entry.get("name"), *names, *(entry[f] for f in ("dataset", "split", "data_dir") if f in entry)]
    if not (names or classes in (None, OWN)) or not all(isinstance(text, str) and text for text in texts):
        raise wrong
    if not re.fullmatch(r"\w[\w.-]*", entry["name"]):
        raise wrong
    found = dataclasses.replace(default, **{**entry, "classes": tuple(names) or classes})
    if found.name in (DEFAULT, ALL):
        raise ValueError(
            f"config.evaluations has a set {found.name!r}, which is taken; expected another name"
        )
    return found
