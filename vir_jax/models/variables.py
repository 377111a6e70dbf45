"""The variables of a module: parameters, statistics of batches, and constants that were drawn at random."""

from typing import Any, TypeVar

from flax import nnx


class Constant(nnx.Variable[Any]):
    """An array that was drawn when the module was made, and stays: no parameter, and no statistic of a batch either."""


M = TypeVar("M", bound=nnx.Module)


def split_variables(module: M) -> tuple[nnx.GraphDef[M], Any, Any]:
    """Return what of a module is no array, its parameters, and its other variables, both `nnx.State`."""
    graph, *states = nnx.split(module, nnx.Param, ...)
    params, statistics = states
    return graph, params, statistics


def batch_statistics(module: nnx.Module) -> Any:
    """Return what a call in training changes, an `nnx.State`: statistics of the batch, in which its examples meet."""
    return nnx.state(module, nnx.BatchStat)
