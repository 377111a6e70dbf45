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

from vir_jax.models.layout import ClassTokenPlace, Layout
from vir_jax.models.likelihood import make_likelihood
from vir_jax.models.mixers import mixer_names, mixer_options, mixer_type
from vir_jax.models.model import VisionModel
from vir_jax.models.pixel_stem import PixelStem
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
    stem: str | None = None,
    levels: int | None = None,
    channels: int | None = None,
    mixtures: int | None = None,
    local_context: int | None = None,
    readout: str | None = None,
    position: str = "learned",
    bidirectional: bool = False,
    layer_scale: int | float | Literal["default"] | None = "default",
    drop_path_rate: int | float = 0.0,
    remat: str = "elementwise",
    dtype: DTypeLike = "float32",
    mode: str = "auto",
    **mixer_options: Any,
) -> VisionModel:
    """Make a named ViR or ViT with fresh parameters (docs/method.md, section 3).

    Args:
        name: `{vir|vit}_{pico|ti|s|b|l}{patch in pixels}`, e.g. "vir_b16"; `MODEL_NAMES` lists the usual ones.
        num_classes: width of the head; that of a model of pixels has the width that its distribution needs.
        rngs: source of the parameters' random keys.
        image_size: pixels, a square's side or (height, width), that the position embeddings are made for. The
            model takes images of other sizes and resamples the embeddings.
        mixer: name of the token mixer (`vir_jax.models.mixers`); None: "retention" for vir_*, "softmax" for vit_*.
        stem: what a token is made of: None: a patch; "pixels": the pixels before the one that the token predicts
            (`vir_jax.models.pixel_stem`), in a model of images that reads their levels; the patch is 1 then.
        levels: of a model of pixels: how many a channel has.
        channels: of a model of pixels: 1 (grey) or 3 (RGB). None: 1.
        mixtures: of a model of pixels: logistic distributions that a pixel's is mixed of; None: it is categorical.
        local_context: of a model of pixels: how far a token sees its earlier neighbours, in rows and columns; None: the
            pixel before alone.
        readout: what the head reads: the "class_token", the "average" of the patch tokens (of both passes where
            bidirectional), or "every_token" but the class token. None: the class token, in models of pixels every one.
        position: position embeddings of the patches: "learned" for a grid and resampled to others, or "sincos": fixed,
            of rows and columns, so that an image of unknown height can be read as it arrives.
        bidirectional: read the patches forwards, then backwards: [p1..pN, pN..p1, class token]; for causal mixers.
        layer_scale: initial LayerScale; None: the model has none; "default": 1e-5 for vir_*, none for vit_*.
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
    of_pixels: dict[str, Any] = {"levels": levels, "channels": channels, "mixtures": mixtures}
    _check("stem", stem, stem in (None, "pixels"), "'pixels', or None for patches")
    if stem == "pixels":
        _check_predicts_pixels(
            patch, mixer, bidirectional=bidirectional, readout=readout, local_context=local_context
        )
        of_pixels["channels"] = channels or 1
    else:
        _check_patches({**of_pixels, "local_context": local_context})
    rows, cols = patch_grid((height, width), patch)
    layout = Layout(cols=cols, patches=rows * cols, class_token=class_token, passes=1 + bidirectional)

    def make_block(rngs: nnx.Rngs) -> Block:
        made = kind(size.dim, size.heads, layout, dtype=dtype, rngs=rngs, **given)
        return Block(size.dim, made, layer_scale=scale, dtype=dtype, rngs=rngs)

    made_stem: Stem | PixelStem
    if stem == "pixels":
        made_stem = PixelStem(
            image_size=(height, width),
            dim=size.dim,
            likelihood=make_likelihood(**of_pixels),
            local_context=local_context or 0,
            position=position,
            dtype=dtype,
            rngs=rngs,
        )
        num_classes, readout, layout = (
            made_stem.likelihood.num_outputs,
            "every_token",
            made_stem.layout((height, width)),
        )
        of_pixels |= {"stem": stem, "local_context": local_context or 0}
    else:
        made_stem = Stem(
            image_size=(height, width),
            patch=patch,
            dim=size.dim,
            position=position,
            class_token=class_token,
            passes=layout.passes,
            dtype=dtype,
            rngs=rngs,
        )
    model = VisionModel(
        options={
            "name": name,
            "mixer": mixer,
            "readout": readout or "class_token",
            "position": position,
            "bidirectional": bidirectional,
            "dtype": jnp.dtype(dtype).name,
            **(of_pixels if stem == "pixels" else {}),
            **given,
        },
        stem=made_stem,
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
    model.eval()
    return model


def model_options() -> dict[str, Any]:
    """Return every keyword of `create_model` that describes a model, the options of all mixers too, with its default.

    Mixers' options are None here: not given.
    """
    parameters = inspect.signature(create_model).parameters.values()
    given = {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY and p.default is not p.empty}
    return given | {option: None for name in mixer_names() for option in mixer_options(name)}


def _check_predicts_pixels(
    patch: int, mixer: str, *, bidirectional: bool, readout: str | None, local_context: int | None
) -> None:
    """Check the options of a model whose tokens predict pixels.

    Raises:
        ValueError: a token would be more than a pixel, or see what it predicts, or nothing would read it.
    """
    if patch != 1:
        raise ValueError(
            f"stem='pixels' makes a token of every pixel, and the model's name says patches of {patch} x {patch}; "
            "expected a name that ends in 1, such as vir_pico1."
        )
    if bidirectional or not mixer_type(mixer).causal:
        causal = [name for name in mixer_names() if mixer_type(name).causal]
        given = "bidirectional=True" if bidirectional else f"mixer={mixer!r}"
        raise ValueError(
            f"stem='pixels' makes no sense with {given}: a token would see the pixel that it predicts. Read the image "
            f"once, with one of the mixers {causal}."
        )
    _check("readout", readout, readout in (None, "every_token"), "'every_token' with stem='pixels', or None")
    valid = local_context is None or (_is_integer(local_context) and local_context >= 0)
    _check("local_context", local_context, valid, "a radius of 0 or more pixels, or None")


def _check_patches(of_pixels: Mapping[str, Any]) -> None:
    """Check that a model of patches was given no option of models of pixels.

    Raises:
        ValueError: it was.
    """
    for option, value in of_pixels.items():
        if value is not None:
            raise ValueError(
                f"{option}={value!r} is of models of pixels. Leave it out, or say stem='pixels'."
            )


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
