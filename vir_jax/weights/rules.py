"""A bijection between our parameters and the tensors of another layout, rule by rule, and what is left over.

A rule takes some of our parameters to some of their tensors and back. Each name stands in one rule, so that the whole
is a bijection where its rules are. Our blocks are apart here, `stage.blocks.3.norm1.scale`, while a model holds those
of all blocks in one array (`split_blocks`, `join_blocks`).
"""

import dataclasses
import difflib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np

from vir_jax.weights.errors import WeightsError

Arrays = tuple[np.ndarray, ...]
Move = Callable[..., Arrays]
Shapes = Mapping[str, tuple[int, ...]]

BLOCKS = "stage.blocks."
STAGES = "stages."
"""What the names of a pyramid's stages begin with; no other library has them."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """Some of our parameters, and the tensors that hold the same.

    Attributes:
        ours: names.
        theirs: names.
        export: from arrays of `ours` to those of `theirs`.
        take: back.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    export: Move
    take: Move


# ---------------------------------------------------------------- the parts that layouts of PyTorch share


def same(ours: str, theirs: str) -> Rule:
    """Return the rule of one that is the same in both."""
    return Rule((ours,), (theirs,), _identity, _identity)


def norm(ours: str, theirs: str) -> list[Rule]:
    """Return the rules of a layer norm: scale and weight, bias."""
    return [same(f"{ours}.scale", f"{theirs}.weight"), same(f"{ours}.bias", f"{theirs}.bias")]


def linear(ours: str, theirs: str) -> list[Rule]:
    """Return the rules of a linear layer: kernel [in, out] and weight [out, in], bias."""
    kernel = Rule((f"{ours}.kernel",), (f"{theirs}.weight",), _transpose, _transpose)
    return [kernel, same(f"{ours}.bias", f"{theirs}.bias")]


def convolution(ours: str, theirs: str) -> list[Rule]:
    """Return the rules of a convolution: kernel [y, x, in, out] and weight [out, in, y, x], bias."""
    kernel = Rule(
        (f"{ours}.kernel",),
        (f"{theirs}.weight",),
        lambda kernel: (kernel.transpose(3, 2, 0, 1),),
        lambda weight: (weight.transpose(2, 3, 1, 0),),
    )
    return [kernel, same(f"{ours}.bias", f"{theirs}.bias")]


def heads_in(ours: str, theirs: Sequence[str], heads: int) -> list[Rule]:
    """Return the rules of q, k and v: kernel [c, 3, h, d], bias [3, h, d].

    Args:
        ours: the layer.
        theirs: one layer [3 h d, c] for all of them, or one [h d, c] for each.
        heads: h.
    """

    def export_kernel(kernel: np.ndarray) -> Arrays:
        together = kernel.reshape(kernel.shape[0], -1).T
        return tuple(np.split(together, len(theirs)))

    def take_kernel(*weights: np.ndarray) -> Arrays:
        together = np.concatenate(weights).T
        return (together.reshape(together.shape[0], 3, heads, -1),)

    def export_bias(bias: np.ndarray) -> Arrays:
        return tuple(np.split(bias.reshape(-1), len(theirs)))

    def take_bias(*biases: np.ndarray) -> Arrays:
        return (np.concatenate(biases).reshape(3, heads, -1),)

    return [
        Rule((f"{ours}.kernel",), tuple(f"{name}.weight" for name in theirs), export_kernel, take_kernel),
        Rule((f"{ours}.bias",), tuple(f"{name}.bias" for name in theirs), export_bias, take_bias),
    ]


def heads_out(ours: str, theirs: str, heads: int) -> list[Rule]:
    """Return the rules of the layer after the heads: kernel [h, d, c] and weight [c, h d], bias."""
    kernel = Rule(
        (f"{ours}.kernel",),
        (f"{theirs}.weight",),
        lambda kernel: (kernel.reshape(-1, kernel.shape[-1]).T,),
        lambda weight: (weight.T.reshape(heads, -1, weight.shape[0]),),
    )
    return [kernel, same(f"{ours}.bias", f"{theirs}.bias")]


def positions(theirs: str, grid: tuple[int, int], *, class_token: bool) -> Rule:
    """Return the rule of the position embedding [1, rows, cols, c] and theirs [1, rows cols, c].

    Args:
        theirs: name.
        grid: (rows, cols).
        class_token: whether theirs begins with the class token's [1, 1, c], which is a parameter of its own here.
    """
    first = int(class_token)
    own = ("stem.position.embedding", *("stem.class_position_embedding",) * first)

    def export(embedding: np.ndarray, *of_class: np.ndarray) -> Arrays:
        flat = embedding.reshape(1, -1, embedding.shape[-1])
        return (np.concatenate([*of_class, flat], axis=1),)

    def take(together: np.ndarray) -> Arrays:
        embedding = together[:, first:].reshape(1, *grid, together.shape[-1])
        return embedding, *([together[:, :1]] * first)

    return Rule(own, (theirs,), export, take)


def of_blocks(rules: Iterable[Rule], depth: int) -> list[Rule]:
    """Return rules for each block of those that have {i} in their names."""

    def of(rule: Rule, i: int) -> Rule:
        ours, theirs = (tuple(name.format(i=i) for name in names) for names in (rule.ours, rule.theirs))
        return dataclasses.replace(rule, ours=ours, theirs=theirs)

    return [of(rule, i) for rule in rules for i in range(depth)]


def _identity(array: np.ndarray) -> Arrays:
    return (array,)


def _transpose(array: np.ndarray) -> Arrays:
    return (array.T,)


# ---------------------------------------------------------------- applying them


def export(rules: Sequence[Rule], ours: Mapping[str, np.ndarray], *, where: str) -> dict[str, np.ndarray]:
    """Return their tensors.

    Args:
        rules: with all names.
        ours: parameters by name, blocks apart.
        where: what the tensors are for, for messages.

    Raises:
        WeightsError: a parameter that no rule takes, or that is missing.
    """
    known = [name for rule in rules for name in rule.ours]
    _check_names({name: array.shape for name, array in ours.items()}, dict.fromkeys(known), where=where)
    return {
        name: array
        for rule in rules
        for name, array in zip(rule.theirs, rule.export(*(ours[name] for name in rule.ours)), strict=True)
    }


def take(
    rules: Sequence[Rule],
    theirs: Mapping[str, np.ndarray],
    *,
    shapes: Shapes,
    ignored: Collection[str] = (),
    where: str,
) -> dict[str, np.ndarray]:
    """Return our parameters, blocks apart: each tensor is used or listed, each parameter filled.

    Args:
        rules: with all names.
        theirs: tensors by name.
        shapes: of our parameters.
        ignored: names of tensors that the model has no use for.
        where: the tensors come from, for messages.

    Raises:
        WeightsError: with the names and shapes of all tensors that are left over, missing or of another shape, and the
            nearest names.
    """
    found = {name: tensor.shape for name, tensor in theirs.items() if name not in ignored}
    _check_names(found, _expected(rules, shapes), where=where)
    return {
        name: array
        for rule in rules
        for name, array in zip(rule.ours, rule.take(*(theirs[name] for name in rule.theirs)), strict=True)
    }


def split_blocks(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return parameters with those of blocks, stacked along a first axis, apart."""
    apart: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if name.startswith(BLOCKS):
            apart |= {f"{BLOCKS}{i}.{name.removeprefix(BLOCKS)}": part for i, part in enumerate(array)}
        else:
            apart[name] = array
    return apart


def join_blocks(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return parameters with those of blocks stacked."""
    blocks: dict[str, dict[int, np.ndarray]] = {}
    joined = {}
    for name, array in arrays.items():
        if name.startswith(BLOCKS):
            index, _, rest = name.removeprefix(BLOCKS).partition(".")
            blocks.setdefault(BLOCKS + rest, {})[int(index)] = array
        else:
            joined[name] = array
    return joined | {name: np.stack([parts[i] for i in sorted(parts)]) for name, parts in blocks.items()}


def _expected(rules: Sequence[Rule], shapes: Shapes) -> dict[str, tuple[int, ...] | None]:
    """Return the shapes that their tensors should have, from those of ours."""
    expected: dict[str, tuple[int, ...] | None] = {}
    for rule in rules:
        # Of a byte that stands for all: the shapes come out of the moves themselves.
        ours = (np.broadcast_to(np.uint8(0), shapes[name]) for name in rule.ours)
        expected |= {name: array.shape for name, array in zip(rule.theirs, rule.export(*ours), strict=True)}
    return expected


def _check_names(found: Shapes, expected: Mapping[str, tuple[int, ...] | None], *, where: str) -> None:
    """Check that the same names are found as are expected, in the same shapes where these are known."""
    extra = [name for name in found if name not in expected]
    missing = [name for name in expected if name not in found]
    other = [
        name for name, shape in expected.items() if shape is not None and found.get(name, shape) != shape
    ]
    if not (extra or missing or other):
        return
    lines = [
        *(f"  left over: {text}{_nearest(name, missing)}" for name, text in _grouped(extra, found)),
        *(f"  missing: {text}{_nearest(name, extra)}" for name, text in _grouped(missing, expected)),
        *(f"  of another shape: {name} {found[name]}; expected {expected[name]}" for name in other),
    ]
    raise WeightsError(f"{where} does not fit, tensor by tensor:\n" + "\n".join(lines))


def _grouped(names: Sequence[str], shapes: Mapping[str, tuple[int, ...] | None]) -> list[tuple[str, str]]:
    """Return names in words, those that differ in a block's number alone together, each with one of them."""
    groups = {(re.sub(r"\.\d+\.", ".*.", name), shapes[name]): name for name in reversed(names)}
    counts = Counter((re.sub(r"\.\d+\.", ".*.", name), shapes[name]) for name in names)
    return [
        (
            name,
            f"{pattern if counts[pattern, shape] > 1 else name} {'' if shape is None else shape}".rstrip()
            + (f" in {counts[pattern, shape]} blocks" if counts[pattern, shape] > 1 else ""),
        )
        for (pattern, shape), name in reversed(groups.items())
    ]


def _nearest(name: str, others: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, others, n=1, cutoff=0.7)
    return f" (nearest: {near[0]})" if near else ""
