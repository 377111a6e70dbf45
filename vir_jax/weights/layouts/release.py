"""The reviewer release's ViR (PyTorch): 1-D vir_* in and out.

Its weights are read as retention, which is what its recurrent and chunkwise forms compute. Its parallel form, the
one it trains with, puts a softmax after the mask (docs/method.md, section 1): weights that were trained so mean
something else, and the file does not say which form that was. So it is logged.
"""

from collections.abc import Mapping

from absl import logging

from vir_jax.weights.card import Card
from vir_jax.weights.files import CONFIG, Json
from vir_jax.weights.layouts.layout import check_model
from vir_jax.weights.layouts.timm import Timm
from vir_jax.weights.rules import Shapes


class Release(Timm):
    """timm's names, with a retention in place of the attention, and no position of the class token."""

    name = "release"
    family, mixer, out = "vir", "retention", "out_proj"

    def card(self, shapes: Shapes, beside: Mapping[str, Json], *, where: str) -> Card:
        """Return the card, from shapes alone: the release writes no configuration."""
        logging.warning(
            "%s is read as retention, as the release's recurrent and chunkwise forms compute it; its parallel form,"
            " which its training uses, has a softmax besides, and weights trained with it will not score here"
            " what they did",
            where,
        )
        return super().card(shapes, {}, where=where)

    def config(self, card: Card) -> dict[str, Json]:
        """Return nothing besides the card."""
        self.check(card)
        return {CONFIG: {}}

    def check(self, card: Card) -> None:
        """Check that it is a 1-D ViR that reads the patches once."""
        wanted = {"mixer": "retention", "position": "learned", "bidirectional": False, "retention": "1d"}
        check_model(card, self.name, wanted)

    def _rows(self, patches: int) -> int:
        return 0
