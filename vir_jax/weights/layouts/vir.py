"""Our own layout: parameters by their dotted names, as they are; blocks stacked."""

from collections.abc import Collection, Mapping

import numpy as np

from vir_jax.weights.card import KEY, Card
from vir_jax.weights.errors import WeightsError
from vir_jax.weights.files import CONFIG, Json
from vir_jax.weights.layouts.layout import Tensors, WeightLayout
from vir_jax.weights.rules import BLOCKS, STAGES, Rule, Shapes, same, take


class Vir(WeightLayout):
    """Of any of our models."""

    name = "vir"

    def is_of(self, names: Collection[str]) -> bool:
        """Return whether there are blocks of ours."""
        return any(name.startswith((BLOCKS, STAGES)) for name in names)

    def card(self, shapes: Shapes, beside: Mapping[str, Json], *, where: str) -> Card:
        """Refuse: options of ours are not all to be seen in shapes."""
        raise WeightsError(
            f"{where} has no {CONFIG} with a {KEY!r} section beside it, which says what model it is of"
        )

    def config(self, card: Card) -> dict[str, Json]:
        """Return nothing besides the card."""
        return {CONFIG: {}}

    def rules(self, card: Card, shapes: Shapes | None = None) -> list[Rule]:
        """Return the identity."""
        return [same(name, name) for name in shapes or ()]

    def export(self, params: Tensors, card: Card) -> dict[str, np.ndarray]:
        """Return the parameters."""
        return dict(params)

    def take(self, tensors: Tensors, card: Card, *, shapes: Shapes, where: str) -> dict[str, np.ndarray]:
        """Return the parameters, checked."""
        return take(self.rules(card, shapes), tensors, shapes=shapes, where=where)
