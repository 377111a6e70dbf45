"""What stands before the first step: the run's data, and that they belong to the run that the workdir holds."""

import functools
from collections.abc import Mapping
from typing import Any

import ml_collections
from absl import logging

from vir_jax.data import Source, check_labels, open_source
from vir_jax.data.classes import check_classes, class_difference, match_classes
from vir_jax.data.fingerprint import difference, fingerprint
from vir_jax.runs.storage import RunPath


def open_sources(
    data: ml_collections.ConfigDict,
    train_source: Source | None,
    eval_source: Source | None,
    *,
    per_pixel: bool = False,
) -> tuple[Source, Source]:
    """Return the examples to train and to evaluate on, labelled alike.

    The training data say what the classes are; those of the evaluation data are matched to them by name.

    Args:
      data: `config.data`.
      train_source: to use instead of `data.train_split`.
      eval_source: to use instead of `data.eval_split`.
      per_pixel: whether labels are masks; `Task.per_pixel`.

    Raises:
      ValueError: data with other labels, or that do not say what their classes are, a single class, or evaluation data
        with a class that the training data lack.
      FileNotFoundError: the data are not there.
    """
    open_split = functools.partial(open_source, data.dataset, data_dir=data.data_dir, per_pixel=per_pixel)
    train_source = train_source or open_split(data.train_split)
    eval_source = eval_source or open_split(data.eval_split)
    check_labels(train_source, per_pixel, "the training data")
    check_labels(eval_source, per_pixel, "the evaluation data")
    check_classes(train_source, "the training data", at_least=2)
    return train_source, match_classes(eval_source, train_source.class_names, "the evaluation data")


def data_identity(source: Source) -> dict[str, Any]:
    """Return what a checkpoint says of the data that it was trained on, as JSON data; `check_same_data` compares it."""
    return {"class_names": list(source.class_names), "training_data": fingerprint(source)}


def check_same_data(workdir: RunPath, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that a run goes on with the data that it was trained on.

    Args:
      workdir: folder of the run.
      stored: metadata of its checkpoint.
      now: `data_identity` of the data.

    Raises:
      ValueError: other classes or other examples, and how they differ.
    """
    changed = class_difference(stored["class_names"], now["class_names"])
    if not changed and "training_data" in stored:
        changed = difference(stored["training_data"], now["training_data"])
    if changed:
        raise ValueError(
            f"{workdir} holds a run that was trained on other data: {changed}.\nGive it the data that it was trained"
            " on, or choose another workdir, where config.init_from may start from this run's weights."
        )
    if "training_data" not in stored:
        logging.warning(
            "the checkpoint in %s is of an earlier version, which kept the class names and no more of its data: whether"
            " the training data are the same is not checked",
            workdir,
        )
