"""The data that a run is evaluated on, opened and labelled as the model knows the classes."""

import dataclasses
from collections.abc import Sequence

import ml_collections
from jax.sharding import Mesh

from vir_jax.data import EvalLoader, Source, check_labels, eval_loader, open_source
from vir_jax.data.classes import match_classes, select_classes
from vir_jax.parallel.mesh import local_rows
from vir_jax.runs.evaluation_sets import OWN, EvaluationSet
from vir_jax.tasks import Task


@dataclasses.dataclass(frozen=True)
class EvaluationData:
    """An evaluation set, open.

    Attributes:
      name: its metrics are called by; empty of the run's evaluation data.
      source: its examples, under the class names of the model.
      task: that judges the outputs.
    """

    name: str
    source: Source
    task: Task


def open_evaluation(
    given: EvaluationSet, task: Task, class_names: Sequence[str], *, source: Source | None = None
) -> EvaluationData:
    """Open an evaluation set.

    Args:
      given: which.
      task: of the run.
      class_names: that the model knows, in the order of its outputs.
      source: examples to use instead of those that `given` names.

    Raises:
      ValueError: data with other labels than the task's; classes that the data do not have, or that the model does
        not know.
      FileNotFoundError: the data are not there.
    """
    source = source or open_source(
        given.dataset, given.split, data_dir=given.data_dir, per_pixel=task.per_pixel
    )
    check_labels(source, task.per_pixel, given.called)
    if given.classes is not None:
        chosen = source.class_names if given.classes == OWN else given.classes
        source, task = select_classes(source, chosen, given.called), task.among(chosen)
    return EvaluationData(given.name, match_classes(source, class_names, given.called), task)


def evaluation_batches(
    config: ml_collections.ConfigDict, source: Source, mesh: Mesh, *, image_size: tuple[int, int]
) -> EvalLoader:
    """Return this process's rows of the batches of a source.

    Args:
      config: of the run.
      source: the examples.
      mesh: that batches are split over.
      image_size: (height, width) of what the model is given.
    """
    data = config.data
    return eval_loader(
        source,
        batch_size=config.eval_batch_size,
        image_size=image_size,
        crop_fraction=data.crop_fraction,
        rows=local_rows(mesh, config.eval_batch_size),
        num_threads=data.threads,
        max_corrupt_fraction=data.max_corrupt_fraction,
        background=tuple(data.background),
    )
