"""Starting from the weights of another run: at another resolution, with other classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from jaxtyping import Array

from vir_jax.data.classes import class_difference
from vir_jax.models import VisionModel
from vir_jax.models.grids import fit_grid
from vir_jax.parallel.sharding import dotted
from vir_jax.runs.checkpoint_reader import NotEvaluatedError
from vir_jax.runs.load import Run, load_run
from vir_jax.runs.model import model_functions
from vir_jax.runs.state import Params

# Fields of config.model in which the two runs may differ: the weights mean the same. What has a vector for each patch
# is resampled to another image size (`vir_jax.models.grids`). Every other field, one that is added later too, must
# agree.
MAY_DIFFER = (
    "image_size",
    "drop_path_rate",
    "layer_scale",
    "remat",
    "dtype",
    "mode",
    "implementation",
    "chunk_size",
)

Pretrained = dict[str, np.ndarray]
"""Weights by dotted parameter name, on the host; what is not there starts afresh."""


def read_pretrained(
    config: ml_collections.ConfigDict, *, shapes: Params, class_names: Sequence[str]
) -> Pretrained:
    """Return the best weights of the run in `config.init_from`, fitted to the model of `config`.

    The moving average is taken where the run kept one, and the last weights where it was never evaluated, which is
    logged. What has a vector for each patch is resampled to the new grid. Where the task is the same and so are the
    classes by name, in any order, the head keeps what it knows of each; else it starts afresh. A head that has no
    output for each class (`Task.of_classes`) is kept where the task is the same.

    Args:
      config: of the new run.
      shapes: of its parameters.
      class_names: of its data.

    Raises:
      FileNotFoundError: there is no run in `config.init_from`.
      ValueError: the models differ in more than `MAY_DIFFER` and classes.
      DamagedCheckpointError: the checkpoint is not what was written.
    """
    run = _best_or_last(config.init_from)
    check_same_model(run, config)
    changed = class_difference(run.class_names, class_names)
    same_task = run.config.task == config.task
    of_classes = run.task.of_classes
    same = same_task and (set(run.class_names) == set(class_names) or not of_classes)
    if not same_task:
        logging.warning("the pretrained model's task is %s; the head starts afresh", run.config.task)
    elif changed and of_classes:
        logging.warning(
            "the pretrained model knows %s; the head %s",
            changed,
            "is put into the new order" if same else "starts afresh",
        )
    head: Sequence[int] | None = None
    if same:
        numbers = range(run.task.num_outputs)
        head = [run.class_names.index(name) for name in class_names] if of_classes else numbers
    logging.info("starting from the %s weights of step %d in %s", run.weights, run.step, run.workdir)
    return fit_params(run.params, shapes=shapes, head=head)


def start_from(pretrained: Mapping[str, np.ndarray], fresh: Params) -> Params:
    """Return `fresh` with the pretrained weights in place of its own, in its shardings."""

    def replace(path: tuple[Any, ...], new: Array) -> Array:
        old = pretrained.get(dotted(path))
        # NumPy arrays can be put on the devices of other processes as well.
        return new if old is None else jax.device_put(old, new.sharding)

    return jax.tree_util.tree_map_with_path(replace, fresh)


def check_same_model(run: Run, config: ml_collections.ConfigDict) -> None:
    """Check that the weights of a run mean in the model of `config` what they meant in their own.

    Other colour statistics are logged: the weights mean the same, but see other inputs at first.

    Raises:
      ValueError: with each field of config.model that differs.
    """
    old, new = _meaning(run.model), _meaning(model_functions(config.model, 1).abstract)
    # The head of another task starts afresh, whatever it reads.
    free = () if run.config.task == config.task else ("readout", "readout_dim")
    different = [name for name in sorted(old | new) if old.get(name) != new.get(name) and name not in free]
    if different:
        lines = "\n".join(
            f"  model.{name}: {old.get(name)!r} there, {new.get(name)!r} here" for name in different
        )
        raise ValueError(
            f"the weights in config.init_from = {config.init_from!r} are those of another model:\n{lines}\nGive these"
            f" fields the values of that run; the models may differ in {', '.join(MAY_DIFFER)} and in their classes."
        )
    for name in ("mean", "std"):
        there, here = (tuple(data[name]) for data in (run.config.data, config.data))
        if there != here:
            logging.warning("data.%s is %s here, the pretrained model was trained with %s", name, here, there)


def fit_params(params: Params, *, shapes: Params, head: Sequence[int] | None) -> Pretrained:
    """Return `params` in other shapes; see `read_pretrained`.

    Args:
      params: of the pretrained model.
      shapes: wanted, with dtypes.
      head: for each class of the new model, which one of the old it is; None leaves the head out.

    Raises:
      ValueError: parameters that only one of the models has, or whose shapes differ otherwise than by image size and
        classes.
    """
    loaded = {dotted(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    wanted = {dotted(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]}
    # What one readout has and another has not starts afresh; whether they may differ is checked by their options.
    difference = sorted(name for name in loaded.keys() ^ wanted.keys() if not name.startswith("readout."))
    if difference:
        raise ValueError(
            f"the pretrained model has other parameters than this one; only one of them has {difference[:5]}"
            f" ({len(difference)} in all). config.model must name the same family, size and options."
        )
    fitted: Pretrained = {}
    for name, new in wanted.items():
        if name not in loaded:
            continue
        old = loaded[name]
        if name.startswith("readout.head."):
            if head is None:
                continue
            old = old[..., np.asarray(head)]
        old = fit_grid(name, old, new.shape)
        if old.shape != new.shape:
            raise ValueError(
                f"pretrained {name} has shape {old.shape}, this model's has {new.shape};"
                " config.model must name the same family and size"
            )
        fitted[name] = np.asarray(old, new.dtype)
    return fitted


def _best_or_last(workdir: str) -> Run:
    try:
        return load_run(workdir, "best")
    except NotEvaluatedError:
        logging.warning("the run in %s was never evaluated: starting from its last weights", workdir)
        return load_run(workdir, "last")


def _meaning(model: VisionModel) -> dict[str, Any]:
    """Return the options that give a model's weights their meaning, defaults filled in."""
    options = {name: value for name, value in model.options.items() if name not in MAY_DIFFER}
    return options | {"retention": options.get("retention") or "1d"}
