"""The variables of a module: parameters, and statistics that no gradient changes."""

from typing import Any, TypeVar

from flax import nnx

M = TypeVar("M", bound=nnx.Module)


def split_variables(module: M) -> tuple[nnx.GraphDef[M], Any, Any]:
    """Return what of a module is no array, its parameters, and its other variables, both `nnx.State`."""
    graph, *states = nnx.split(module, nnx.Param, ...)
    params, statistics = states
    return graph, params, statistics
