"""Layouts of weights by name: a file each, one contract (`WeightLayout`)."""

from collections.abc import Collection

from vir_jax.weights.errors import WeightsError
from vir_jax.weights.layouts.hf import HuggingFace
from vir_jax.weights.layouts.layout import WeightLayout
from vir_jax.weights.layouts.release import Release
from vir_jax.weights.layouts.timm import Timm
from vir_jax.weights.layouts.vir import Vir

LAYOUTS: dict[str, WeightLayout] = {
    layout.name: layout for layout in (Vir(), Timm(), HuggingFace(), Release())
}

__all__ = ["LAYOUTS", "WeightLayout", "find_layout"]


def find_layout(name: str | None, tensors: Collection[str] = ()) -> WeightLayout:
    """Return the layout of a name; None: the one that tensors of these names are in.

    Raises:
        WeightsError: there is none.
    """
    known = ", ".join(LAYOUTS)
    if name is not None:
        if name not in LAYOUTS:
            raise WeightsError(f"no layout is called {name!r}; expected one of {known}")
        return LAYOUTS[name]
    for layout in LAYOUTS.values():
        if layout.is_of(tensors):
            return layout
    some = ", ".join(sorted(tensors)[:5])
    raise WeightsError(f"tensors such as {some} are in none of the layouts {known}")
