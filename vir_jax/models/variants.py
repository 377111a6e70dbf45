"""The named models: one table of sizes, two families, any patch."""

import dataclasses
import difflib
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from vir_jax.models.layers import LAYER_NORM_EPSILON, set_norm_epsilon
from vir_jax.models.layout import ClassTokenPlace, Layout
from vir_jax.models.mixers import mixer_names, mixer_options, mixer_type
from vir_jax.models.model import VisionModel
from vir_jax.models.position import POSITIONS
from vir_jax.models.readout import READOUTS, Readout, Reads
from vir_jax.models.stage import REMAT, Block, Stage
from vir_jax.models.stem import Stem, patch_grid


@dataclasses.dataclass(frozen=True)
class Size:
    """Width and depth of a model: channels, blocks, heads."""

    dim: int
    depth: int
    heads: int


# s, b and l are those of docs/method.md, section 3; ti is by analogy with DeiT, pico for tests and small data.
SIZES = {
    "pico": Size(dim=64, depth=4, heads=4),
    "ti": Size(dim=192, depth=12, heads=3),
    "s": Size(dim=384, depth=12, heads=6),
    "b": Size(dim=768, depth=12, heads=12),
    "l": Size(dim=1024, depth=24, heads=16),
}

MODEL_NAMES = (
    "vir_pico1",
    "vir_ti16",
    "vir_s16",
    "vir_b16",
    "vir_l16",
    "vir_l14",
    "vit_pico1",
    "vit_ti16",
    "vit_s16",
    "vit_b16",
    "vit_l16",
)
"""The variants whose parameter counts are asserted. Any `{vir|vit}_{size}{patch}` can be made."""


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family of models is when nothing else is said."""

    mixer: str
    layer_scale: float | None


FAMILIES = {"vir": Family("retention", layer_scale=1e-5), "vit": Family("softmax", layer_scale=None)}


def parse_name(name: str) -> tuple[str, Size, int]:
    """Split a model's name: (family, size, patch) of `{vir|vit}_{pico|ti|s|b|l}{patch in pixels}`.

    Raises:
        ValueError: on any other name, naming the nearest known ones.
    """
    families, sizes = "|".join(FAMILIES), "|".join(SIZES)
    match = re.fullmatch(rf"({families})_({sizes})([1-9]\d*)", str(name))
    if match is None:
        near = ", ".join(difflib.get_close_matches(str(name), MODEL_NAMES, n=3, cutoff=0.0))
        raise ValueError(
            f"no model is called {name!r}; expected {{{families}}}_{{{sizes}}}{{patch}}, such as the nearest: {near}."
        )
    family, size, patch = match.groups()
    return family, SIZES[size], int(patch)


def create_model(
    name: str,
    *,
    num_classes: int,
    rngs: nnx.Rngs,
    image_size: int | Sequence[int] = 224,
    mixer: str | None = None,
    readout: str | None = None,
    position: str = "learned",
    bidirectional: bool = False,
    layer_scale: int | float | Literal["default"] | None = "default",
    norm_epsilon: int | float = LAYER_NORM_EPSILON,
    drop_path_rate: int | float = 0.0,
    remat: str = "elementwise",
    dtype: DTypeLike = "float32",
    mode: str = "auto",
    **mixer_options: Any,
) -> VisionModel:
    """Make a named ViR or ViT with fresh parameters (docs/method.md, section 3).

    Args:
        name: `{vir|vit}_{pico|ti|s|b|l}{patch in pixels}`, e.g. "vir_b16"; `MODEL_NAMES` lists the usual ones.
        num_classes: width of the head.
        rngs: source of the parameters' random keys.
        image_size: pixels, a square's side or (height, width), that the position embeddings are made for. The
            model takes images of other sizes and resamples the embeddings.
        mixer: name of the token mixer (`vir_jax.models.mixers`); None: "retention" for vir_*, "softmax" for vit_*.
        readout: what the head reads: the "class_token" or the "average" of the patch tokens (of both passes where
            bidirectional). None: the class token.
        position: position embeddings of the patches: "learned" for a grid and resampled to others, or "sincos": fixed,
            of rows and columns, so that an image of unknown height can be read as it arrives.
        bidirectional: read the patches forwards, then backwards: [p1..pN, pN..p1, class token]; for causal mixers.
        layer_scale: initial LayerScale; None: the model has none; "default": 1e-5 for vir_*, none for vit_*.
        norm_epsilon: what layer norms add to the variance; other libraries' weights want their own.
        drop_path_rate: stochastic depth of the last block, in [0, 1); it rises linearly from 0 at the first.
        remat: what of a block to compute anew in the backward pass: "none", "elementwise" or "full"
            (`vir_jax.models.stage.REMAT`).
        dtype: of the computation. Parameters, residual stream, decays, states and logits are float32 always.
        mode: form of the mixer where a call names none: "auto", or one of the mixer's.
        **mixer_options: of the mixer, None for its default; of retention: `retention`, `chunk_size`,
            `implementation`.

    Raises:
        ValueError: on an unknown name or option, or options that make no sense together.
    """
    family, size, patch = parse_name(name)
    height, width = _image_size(image_size)
    _check(
        "num_classes", num_classes, _is_integer(num_classes) and num_classes >= 1, "an integer of at least 1"
    )
    _check("rngs", rngs, isinstance(rngs, nnx.Rngs), "flax.nnx.Rngs, such as nnx.Rngs(0)")
    _check("readout", readout, readout in (None, *READOUTS), f"one of {READOUTS}, or None")
    _check("position", position, position in POSITIONS, f"one of {tuple(POSITIONS)}")
    _check("bidirectional", bidirectional, isinstance(bidirectional, bool | np.bool_), "True or False")
    _check(
        "drop_path_rate",
        drop_path_rate,
        _is_number(drop_path_rate) and 0 <= drop_path_rate < 1,
        "a probability in [0, 1)",
    )
    if layer_scale == "default":
        layer_scale = FAMILIES[family].layer_scale
    positive = layer_scale is None or (_is_number(layer_scale) and 0 < float(layer_scale) < math.inf)
    _check("layer_scale", layer_scale, positive, "a positive number, None for none, or 'default'")
    scale = None if layer_scale is None else float(layer_scale)
    positive = _is_number(norm_epsilon) and 0 < float(norm_epsilon) < math.inf
    _check("norm_epsilon", norm_epsilon, positive, "a positive number")
    _check("remat", remat, isinstance(remat, str) and remat in REMAT, f"one of {tuple(REMAT)}")
    _check("dtype", dtype, _is_float(dtype), "'float32', 'bfloat16' or 'float16'")

    mixer = mixer or FAMILIES[family].mixer
    kind = mixer_type(mixer)
    given = {option: value for option, value in mixer_options.items() if value is not None}
    _check_options(name, mixer, given)
    class_token: ClassTokenPlace = "last" if kind.causal else "first"
    if bidirectional and not kind.causal:
        raise ValueError(
            f"bidirectional=True makes no sense for {name} with the mixer {mixer!r}, whose tokens see all others in "
            "one pass. Leave it out, or use a causal mixer, as vir_* models have."
        )
    rows, cols = patch_grid((height, width), patch)
    layout = Layout(cols=cols, patches=rows * cols, class_token=class_token, passes=1 + bidirectional)

    def make_block(rngs: nnx.Rngs) -> Block:
        made = kind(size.dim, size.heads, layout, dtype=dtype, rngs=rngs, **given)
        return Block(size.dim, made, layer_scale=scale, dtype=dtype, rngs=rngs)

    model = VisionModel(
        options={
            "name": name,
            "mixer": mixer,
            "readout": readout or "class_token",
            "position": position,
            "bidirectional": bidirectional,
            "dtype": jnp.dtype(dtype).name,
            # Named only where it is another than it always was, as in states that streams saved then.
            **({} if norm_epsilon == LAYER_NORM_EPSILON else {"norm_epsilon": float(norm_epsilon)}),
            **given,
        },
        stem=Stem(
            image_size=(height, width),
            patch=patch,
            dim=size.dim,
            position=position,
            class_token=class_token,
            passes=layout.passes,
            dtype=dtype,
            rngs=rngs,
        ),
        stage=Stage(
            make_block,
            drop_path_rates=np.linspace(0.0, drop_path_rate, size.depth).tolist(),
            remat=remat,
            rngs=rngs,
        ),
        readout=Readout(size.dim, num_classes, cast(Reads, readout or "class_token"), rngs=rngs),
        mode=mode,
    )
    known = ("auto", *model.modes)
    _check("mode", mode, mode in known, f"one of {known}, which {mixer} has")
    set_norm_epsilon(model, float(norm_epsilon))
    model.eval()
    return model


def model_options() -> dict[str, Any]:
    """Return every keyword of `create_model` that describes a model, the options of all mixers too, with its default.

    Mixers' options are None here: not given.
    """
    parameters = inspect.signature(create_model).parameters.values()
    given = {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY and p.default is not p.empty}
    return given | {option: None for name in mixer_names() for option in mixer_options(name)}


def _check_options(name: str, mixer: str, options: Mapping[str, Any]) -> None:
    """Check that the mixer has these options."""
    for option, value in options.items():
        if option in mixer_options(mixer):
            continue
        owners = [repr(name) for name in mixer_names() if option in mixer_options(name)]
        if owners:
            raise ValueError(
                f"{option}={value!r} makes no sense for {name} with the mixer {mixer!r}: it is an option of "
                f"{', '.join(owners)}. Leave it out, or use such a mixer (vir_* models have 'retention')."
            )
        known = ("name", "num_classes", "rngs", *model_options())
        near = difflib.get_close_matches(option, known, n=1, cutoff=0.0)
        raise ValueError(f"create_model has no option {option!r}; did you mean {near[0]!r}?")


def _image_size(image_size: Any) -> tuple[int, int]:
    sides = (
        tuple(image_size)
        if isinstance(image_size, Sequence) and not isinstance(image_size, str)
        else (image_size,)
    )
    if len(sides) not in (1, 2) or not all(_is_integer(side) and side >= 1 for side in sides):
        raise ValueError(
            f"image_size={image_size!r}; expected pixels: (height, width), or one number for a square"
        )
    return int(sides[0]), int(sides[-1])


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _is_float(dtype: Any) -> bool:
    try:
        return jnp.dtype(dtype).name in ("float32", "bfloat16", "float16")
    except TypeError:
        return False


def _check(option: str, value: object, valid: bool, expected: str) -> None:
    if not valid:
        raise ValueError(f"{option}={value!r}; expected {expected}.")
