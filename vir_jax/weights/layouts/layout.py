"""The contract of a layout: what tensors are called and how they lie, and what stands in the JSON beside them."""

import abc
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from vir_jax.models import model_options
from vir_jax.models.position import resampling_weights
from vir_jax.models.readout import DENSE
from vir_jax.models.stem import patch_grid
from vir_jax.models.variants import SIZES, Size, parse_name
from vir_jax.weights.card import Card
from vir_jax.weights.errors import WeightsError
from vir_jax.weights.files import Json
from vir_jax.weights.rules import Rule, Shapes, export, join_blocks, split_blocks, take

Tensors = Mapping[str, np.ndarray]

# Options of which each layout says itself what it has, and those that leave weights as they are.
_ANY = {"name", "channels", "image_size", "readout", "layer_scale", "norm_epsilon"} | {
    *("dtype", "drop_path_rate", "mode", "remat", "chunk_size", "implementation")
}


class WeightLayout(abc.ABC):
    """One library's or release's way to lay out a model. Its rules are a bijection (`vir_jax.weights.rules`).

    Attributes:
        name: that `--layout` finds it by.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def is_of(self, names: Collection[str]) -> bool:
        """Return whether tensors of these names are in this layout."""

    @abc.abstractmethod
    def card(self, shapes: Shapes, beside: Mapping[str, Json], *, where: str) -> Card:
        """Return what tensors that come without a card of ours are of: sizes from their shapes, the rest from JSON.

        Args:
            shapes: of the tensors.
            beside: contents of JSON files, by name.
            where: they lie, for messages.

        Raises:
            WeightsError: no model of ours computes the same.
        """

    @abc.abstractmethod
    def config(self, card: Card) -> dict[str, Json]:
        """Return the contents of the JSON files that readers of this layout want beside the weights, by name.

        Raises:
            WeightsError: the layout has no such model.
        """

    @abc.abstractmethod
    def rules(self, card: Card, shapes: Shapes | None = None) -> list[Rule]:
        """Return the rules of a model, in the variant that `shapes` show; None: the one that is written."""

    def kernel(self, names: Collection[str]) -> str | None:
        """Return the name of the patch embedding's kernel [c, channels, y, x], which may be of other channels."""
        return None

    def ignored(self, names: Collection[str]) -> list[str]:
        """Return names of tensors that a classifier has no use for."""
        return []

    def resampling(self, size: int, new_size: int) -> np.ndarray:
        """Return the matrix [new_size, size] with which the layout's own code resamples a side of positions."""
        return np.asarray(resampling_weights(size, new_size, count=new_size))

    def export(self, params: Tensors, card: Card) -> dict[str, np.ndarray]:
        """Return a model's tensors, from its parameters by dotted name.

        Raises:
            WeightsError: the model has parameters that the layout has no place for.
        """
        return export(self.rules(card), split_blocks(params), where=f"the layout {self.name!r}")

    def take(self, tensors: Tensors, card: Card, *, shapes: Shapes, where: str) -> dict[str, np.ndarray]:
        """Return a model's parameters by dotted name; without its head, where the tensors have none.

        Args:
            tensors: by name.
            card: of them.
            shapes: of the parameters.
            where: the tensors lie, for messages.

        Raises:
            WeightsError: tensors that are left over, missing or of another shape.
        """
        found = {name: tensor.shape for name, tensor in tensors.items()}
        apart = split_blocks({name: np.broadcast_to(np.uint8(0), shape) for name, shape in shapes.items()})
        taken = take(
            self.rules(card, found),
            tensors,
            shapes={name: array.shape for name, array in apart.items()},
            ignored=self.ignored(found),
            where=where,
        )
        return join_blocks(taken)


def size_of(card: Card) -> tuple[Size, tuple[int, int]]:
    """Return width, depth and heads of a card's model, and its grid of patches."""
    _, size, patch = parse_name(card.model["name"])
    side = card.model["image_size"]
    return size, patch_grid((side, side) if isinstance(side, int) else tuple(side), patch)


def name_from_shapes(
    family: str, *, kernel: tuple[int, ...], depth: int, heads: int | None, where: str
) -> tuple[str, int]:
    """Return a model's name and patch.

    Args:
        family: "vir" or "vit".
        kernel: shape of the patch embedding's, [c, channels, y, x].
        depth: blocks.
        heads: of each; None where nothing says so.
        where: it was found, for messages.

    Raises:
        WeightsError: there is no model of this size.
    """
    if len(kernel) != 4 or kernel[2] != kernel[3]:
        raise WeightsError(f"{where}: the patch embedding's kernel is {kernel}; expected [c, channels, p, p]")
    dim, _, patch, _ = kernel
    for name, size in SIZES.items():
        if (size.dim, size.depth) == (dim, depth) and heads in (None, size.heads):
            return f"{family}_{name}{patch}", patch
    known = ", ".join(f"{name} ({size.dim}, {size.depth}, {size.heads})" for name, size in SIZES.items())
    raise WeightsError(
        f"{where}: a model {dim} wide with {depth} blocks{f' of {heads} heads' if heads else ''}; there are (width,"
        f" blocks, heads) {known}. Another size is a line in vir_jax.models.variants.SIZES"
    )


def image_size_from_shapes(
    patches: int, patch: int, *, said: Sequence[int] | int | None, where: str
) -> int | list[int]:
    """Return the image size of position embeddings: the one that is said where it fits, else a square.

    Raises:
        WeightsError: the number of patches is no square, and nothing that is said fits.
    """
    if said is not None:
        height, width = (said, said) if isinstance(said, int) else said
        if (height // patch) * (width // patch) == patches:
            return height if height == width else [height, width]
    side = math.isqrt(patches)
    if side * side != patches:
        raise WeightsError(
            f"{where}: {patches} position embeddings are no square grid, and the configuration says images of {said!r}"
            f" in patches of {patch}: expected an image size of so many patches"
        )
    return side * patch


def channels_of(card: Card) -> int:
    """Return the channels of a card's images."""
    return card.model.get("channels") or 3


def refuse(where: str, what: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Check that settings are those that our models compute with.

    Raises:
        WeightsError: with those that are not.
    """
    other = [
        f"{name} is {what[name]!r}, here {value!r}"
        for name, value in expected.items()
        if name in what and what[name] != value
    ]
    if other:
        raise WeightsError(
            f"{where} is of a model that computes otherwise than any of ours: {'; '.join(other)}"
        )


def check_plain_vit(card: Card, layout: str) -> None:
    """Check that a model is the ViT that other libraries have.

    Raises:
        WeightsError: it is not; what differs is named.
    """
    wanted = {"mixer": "softmax", "position": "learned", "bidirectional": False}
    check_model(card, layout, wanted)


def check_model(card: Card, layout: str, wanted: Mapping[str, Any]) -> None:
    """Check that a model is one that a layout is of: with these options, and the defaults of `create_model` else.

    Raises:
        WeightsError: it is not; what differs is named.
    """
    expected = {**model_options(), **wanted}
    differs = [
        f"{name}={value!r} (the layout: {expected.get(name)!r})"
        for name, value in card.model.items()
        if name not in _ANY and value not in (expected.get(name), None)
    ]
    if card.model.get("readout") in DENSE:
        differs.append(f"readout={card.model['readout']!r} (the layout: one that reads the image)")
    if differs:
        raise WeightsError(
            f"the layout {layout!r} has no such model as {card.model['name']} with {', '.join(differs)}; --layout=vir"
            " writes any of ours"
        )


def label_names(names: Any) -> tuple[str, ...] | None:
    """Return class names from a list, or from a mapping of numbers to names; None where these are no names."""
    if isinstance(names, Mapping):
        try:
            names = [names[key] for key in sorted(names, key=int)]
        except ValueError:
            return None
    if not isinstance(names, list) or len(set(map(str, names))) != len(names):
        return None
    return tuple(map(str, names))
