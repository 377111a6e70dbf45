"""The named models: one table of sizes, two families, any patch."""

import dataclasses
import difflib
import inspect
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral, Real
from typing import Any, cast

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from vir_jax.models.backbone import POLICIES, Place, Position, Readout, VisionBackbone
from vir_jax.models.mixers import Retention, Retention2D, SoftmaxAttention
from vir_jax.ops.checks import DTYPES, MODES
from vir_jax.ops.kernels import PLATFORMS as KERNELS


@dataclasses.dataclass(frozen=True)
class Size:
    """Width and depth of a model: channels, blocks, heads."""

    dim: int
    depth: int
    heads: int


# s, b and l are those of PAPER.md section 3; ti is by analogy with DeiT, mu for tests and small data.
SIZES = {
    "mu": Size(dim=64, depth=4, heads=4),
    "ti": Size(dim=192, depth=12, heads=3),
    "s": Size(dim=384, depth=12, heads=6),
    "b": Size(dim=768, depth=12, heads=12),
    "l": Size(dim=1024, depth=24, heads=16),
}

MODEL_NAMES = (
    "vir_mu1",
    "vir_ti16",
    "vir_s16",
    "vir_b16",
    "vir_l16",
    "vir_l14",
    "vit_mu1",
    "vit_ti16",
    "vit_s16",
    "vit_b16",
    "vit_l16",
)
"""The variants whose parameter counts are asserted. Any `{vir|vit}_{size}{patch}` can be made."""


def parse_name(name: str) -> tuple[str, Size, int]:
    """Split a model's name: (family, size, patch) of `{vir|vit}_{mu|ti|s|b|l}{patch in pixels}`.

    Raises:
        ValueError: on any other name, naming the nearest known ones.
    """
    match = re.fullmatch(rf"(vir|vit)_({'|'.join(SIZES)})([1-9]\d*)", name)
    if match is None:
        near = ", ".join(difflib.get_close_matches(name, MODEL_NAMES, n=3, cutoff=0.0))
        raise ValueError(
            f"no model is called {name!r}; expected {{vir|vit}}_{{{'|'.join(SIZES)}}}{{patch}}, such as the "
            f"nearest: {near}."
        )
    family, size, patch = match.groups()
    return family, SIZES[size], int(patch)


REMAT = tuple(POLICIES)
_RETENTION_OPTIONS = ("retention", "chunk_size", "implementation")


def create_model(
    name: str,
    *,
    num_classes: int,
    rngs: nnx.Rngs,
    image_size: int | Sequence[int] = 224,
    readout: str | None = None,
    position: str = "learned",
    bidirectional: bool = False,
    layer_scale: int | float | str | None = "default",
    drop_path_rate: float = 0.0,
    remat: str = "elementwise",
    dtype: DTypeLike = "float32",
    mode: str = "auto",
    **mixer_options: Any,
) -> VisionBackbone:
    """Make a named ViR or ViT with fresh parameters (docs/method.md, section 3).

    Args:
        name: `{vir|vit}_{mu|ti|s|b|l}{patch in pixels}`, e.g. "vir_b16"; `MODEL_NAMES` lists the usual ones.
        num_classes: width of the head.
        rngs: source of the parameters' random keys.
        image_size: pixels, a square's side or (height, width), that the position embeddings are made for. The
            model takes images of other sizes and resamples the embeddings.
        readout: what the head reads: the "last" token, the "first", or the "average" of the patch tokens (of
            both passes where bidirectional). `None`: the class token, which is ViR's last and ViT's first. (ViR is
            causal: its first token, a patch, has seen itself alone.)
        position: position embeddings of the patches: "learned" for a grid and resampled to others, or "sincos": fixed,
            of rows and columns, so that an image of unknown height can be read as it arrives.
        bidirectional: let ViR read the patches forwards, then backwards: [p1..pN, pN..p1, class token].
        layer_scale: initial LayerScale; `None`: the model has none; "default": 1e-5 for ViR, none for ViT.
        drop_path_rate: stochastic depth of the last block, in [0, 1); it rises linearly from 0 at the first.
        remat: what of each block to compute anew in the backward pass: "none"; "elementwise": norms, GELU, attention's
            scores and what else costs little, while the outputs of linear layers and mixers are kept; "full":
            everything, from the block's input.
        dtype: of the computation. Parameters, residual stream, decays, states and logits are float32 always.
        mode: form of the mixer where a call names none: "auto", "parallel", "recurrent" or "chunkwise".
        **mixer_options: of retention alone; `None` is not given.
            `retention`: "1d" (raster order, the default) or "2d".
            `chunk_size`: tokens per chunk in 1-D chunkwise retention; `None`: the operator's choice.
            `implementation`: "xla", or a kernel for 1-D retention in the modes "auto" and "chunkwise"; `None`: see
            `vir_jax.ops.retention`. A kernel runs on each device of the mesh in context (`jax.set_mesh`), batch and
            heads split as everywhere.

    Raises:
        ValueError: on an unknown name or option, or options that make no sense together.
    """
    family, size, patch = parse_name(name)
    height, width = _sides(image_size)
    _check(
        "num_classes", num_classes, _is_integer(num_classes) and num_classes >= 1, "an integer, at least 1"
    )
    _check("rngs", rngs, isinstance(rngs, nnx.Rngs), "flax.nnx.Rngs, such as nnx.Rngs(0)")
    _check(
        "readout",
        readout,
        readout in (None, "last", "average", "first"),
        "'last', 'average', 'first' or None",
    )
    _check("position", position, position in ("learned", "sincos"), "'learned' or 'sincos'")
    _check("bidirectional", bidirectional, isinstance(bidirectional, bool), "True or False")
    scale: Any = layer_scale
    if layer_scale == "default":
        scale = 1e-5 if family == "vir" else None
    scales = scale is None or (_is_number(scale) and 0 < scale < math.inf)
    _check("layer_scale", layer_scale, scales, "a positive number, None for no LayerScale, or 'default'")
    valid = _is_number(drop_path_rate) and 0 <= drop_path_rate < 1
    _check("drop_path_rate", drop_path_rate, valid, "a probability in [0, 1)")
    _check("remat", remat, isinstance(remat, str) and remat in REMAT, f"one of {REMAT}")
    _check("dtype", dtype, _is_dtype(dtype), f"one of {DTYPES}")

    for option in mixer_options:
        if option not in _RETENTION_OPTIONS:
            known = [p for p in inspect.signature(create_model).parameters if p != "mixer_options"]
            near = difflib.get_close_matches(option, [*known, *_RETENTION_OPTIONS], n=1, cutoff=0.0)
            raise ValueError(f"create_model has no option {option!r}; did you mean {near[0]!r}?")
    retention, chunk_size, implementation = (mixer_options.get(option) for option in _RETENTION_OPTIONS)
    _check("retention", retention, retention in (None, "1d", "2d"), "'1d', '2d' or None")
    chunks = chunk_size is None or (_is_integer(chunk_size) and chunk_size >= 1)
    _check("chunk_size", chunk_size, chunks, "a positive integer or None")
    names = (None, "xla", *KERNELS)
    _check("implementation", implementation, implementation in names, f"one of {names}")
    if family == "vit":
        given = {name: value for name, value in mixer_options.items() if value is not None}
        for option, value in (given | ({"bidirectional": True} if bidirectional else {})).items():
            raise ValueError(
                f"{option}={value!r} makes no sense for {name}: it is an option of retention, and ViT "
                "mixes tokens by softmax attention. Leave it out, or use a vir_* model."
            )
    if retention == "2d" and bidirectional:
        raise ValueError(
            "bidirectional=True makes no sense with retention='2d': the flipped patches continue a sequence, "
            "and the 2-D mask is defined on one grid of patches. Choose one of the two."
        )
    if retention == "2d" and chunk_size is not None:
        raise ValueError(
            f"chunk_size={chunk_size} makes no sense with retention='2d': its chunks are whole rows of the "
            "grid. Leave it out."
        )
    if retention == "2d" and implementation in KERNELS:
        raise ValueError(
            f"implementation={implementation!r} makes no sense with retention='2d': there are kernels for 1-D "
            "retention alone. Leave it out."
        )
    if chunk_size is not None and implementation in KERNELS:
        raise ValueError(
            f"chunk_size={chunk_size} makes no sense with implementation={implementation!r}, which computes in chunks "
            "of its own. Leave it out."
        )
    modes: tuple[str, ...] = ("auto", *MODES)
    if family == "vit" or implementation in KERNELS:
        modes = ("auto", "parallel") if family == "vit" else ("auto", "chunkwise")
    _check("mode", mode, mode in modes, f"one of {modes}, which {implementation or name} computes")

    mixer: Callable[..., Retention | Retention2D | SoftmaxAttention]
    if family == "vit":
        mixer = SoftmaxAttention
    elif retention == "2d":
        mixer = Retention2D
    else:
        mixer = partial(Retention, chunk_size=chunk_size, implementation=implementation)
    class_token: Place = "last" if family == "vir" else "first"
    return VisionBackbone(
        image_size=(height, width),
        patch=patch,
        dim=size.dim,
        depth=size.depth,
        num_classes=num_classes,
        make_mixer=lambda rngs: mixer(size.dim, size.heads, dtype=dtype, rngs=rngs),
        class_token=class_token,
        readout=cast(Readout, readout or class_token),
        position=cast(Position, position),
        bidirectional=bidirectional,
        layer_scale=scale,
        drop_path_rate=drop_path_rate,
        remat=remat,
        dtype=dtype,
        mode=mode,
        rngs=rngs,
    )


def _sides(image_size: Any) -> tuple[int, int]:
    """(height, width) of a size given as one side or as a pair."""
    sides = tuple(image_size) if isinstance(image_size, list | tuple) else (image_size, image_size)
    valid = len(sides) == 2 and all(_is_integer(side) and side >= 1 for side in sides)
    _check("image_size", image_size, valid, "positive numbers of pixels: a square's side or (height, width)")
    return sides


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_dtype(dtype: Any) -> bool:
    try:
        return jnp.dtype(dtype).name in DTYPES
    except TypeError:
        return False


def _check(option: str, value: object, valid: bool, expected: str) -> None:
    if not valid:
        raise ValueError(f"{option}={value!r}; expected {expected}.")
