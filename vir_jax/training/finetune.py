"""Starting from the weights of another run: at another resolution, with other classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Array

from vir_jax.models import resample_position_embedding
from vir_jax.parallel.sharding import dotted
from vir_jax.runs.checkpoint import Checkpoints
from vir_jax.runs.state import Params


def pretrained_params(workdir: str | Path, *, fresh: Params, class_names: Sequence[str], task: str) -> Params:
    """The best weights of a finished run, fitted to another model of the same family and size.

    The moving average is taken where the run kept one. The position embedding is resampled to the new grid; the
    head starts afresh where the classes or the tasks differ.

    Args:
      workdir: of the finished run.
      fresh: initial parameters of the new model; their shapes and shardings are kept.
      class_names: of the new model.
      task: `config.task` of the new run.

    Raises:
      ValueError: the models differ in more than resolution and classes.
    """
    with Checkpoints(workdir, read_only=True) as checkpoints:
        step = checkpoints.resolve("best")
        weights = "ema" if checkpoints.has_ema(step) else "raw"
        params = checkpoints.restore_params(step, weights=weights)
        config, metadata = checkpoints.restore_config(step)
        logging.info("starting from the %s weights of step %d in %s", weights, step, workdir)
    keep_head = list(metadata["class_names"]) == list(class_names) and config.task == task
    if not keep_head:
        logging.info(
            "the head starts afresh: the pretrained model tells other classes apart, or has another task"
        )
    return fit_params(params, fresh=fresh, keep_head=keep_head)


def fit_params(params: Params, *, fresh: Params, keep_head: bool) -> Params:
    """`params` in the shapes and shardings of `fresh`, but for the head unless kept; see `pretrained_params`."""
    loaded = {dotted(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    wanted = {dotted(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(fresh)[0]}
    if loaded.keys() != wanted.keys():
        difference = sorted(loaded.keys() ^ wanted.keys())
        raise ValueError(
            f"the pretrained model has other parameters than this one; only one of them has {difference[:5]}"
            f" ({len(difference)} in all). config.model must name the same family, size and options."
        )

    def fit(path: tuple[Any, ...], new: Array) -> Array:
        name = dotted(path)
        if name.startswith("head.") and not keep_head:
            return new
        old = loaded[name]
        if name == "position_embedding":
            _, rows, cols, _ = new.shape
            old = resample_position_embedding(old, (rows, cols))
        if old.shape != new.shape:
            raise ValueError(
                f"pretrained {name} has shape {old.shape}, this model's has {new.shape};"
                " config.model must name the same family and size"
            )
        # NumPy arrays can be put on the devices of other processes as well.
        return jax.device_put(np.asarray(old, new.dtype), new.sharding)

    return jax.tree_util.tree_map_with_path(fit, fresh)
