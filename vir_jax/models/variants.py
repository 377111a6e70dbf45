"""The named models: one table of sizes, three families, any patch; and pyramids, by a table of their own."""

import dataclasses
import difflib
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from vir_jax.models.isotropic import SIZES, Size, make_isotropic
from vir_jax.models.layers import LAYER_NORM_EPSILON, set_norm_epsilon
from vir_jax.models.mixers import mixer_names, mixer_options, mixer_type
from vir_jax.models.model import VisionModel
from vir_jax.models.options import check_bool, check_option, check_positive, is_integer, is_number
from vir_jax.models.pyramid_variants import (
    PYRAMID_SIZES,
    check_no_pyramid_options,
    check_pyramid_options,
    make_pyramid,
)
from vir_jax.models.stage import REMAT

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
    "vir_vix1",
    "vit_vix1",
    "cvir_pico4",
    "cvir_ti16",
    "cvir_s16",
    "cvir_b16",
    "cvir_l16",
    *PYRAMID_SIZES,
)
"""The variants whose parameter counts are asserted. Any `{vir|vit|cvir}_{size}{patch}` can be made besides."""


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family of models is when nothing else is said.

    Attributes:
        mixer: its name.
        layer_scale: initial value; None: there is none.
        stem: how patches are embedded.
        options: of the mixer.
    """

    mixer: str
    layer_scale: float | None
    stem: str = "linear"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# vir is the paper's and vit what it is compared with; cvir, with convolutions, is ours (docs/method.md, section 9).
FAMILIES = {
    "vir": Family("retention", layer_scale=1e-5),
    "vit": Family("softmax", layer_scale=None),
    "cvir": Family("retention", layer_scale=0.1, stem="conv", options={"short_conv": 4, "head_norm": True}),
}


def parse_name(name: str) -> tuple[str, Size, int]:
    """Split a model's name: (family, size, patch) of `{vir|vit|cvir}_{pico|ti|s|b|l|vix}{patch in pixels}`.

    Raises:
        ValueError: on any other name, naming the nearest known ones.
    """
    if name in PYRAMID_SIZES:
        raise ValueError(
            f"{name!r} is a pyramid: it has stages of several widths, and no patch. Expected an isotropic model, such "
            "as 'vir_s16'."
        )
    families, sizes = "|".join(FAMILIES), "|".join(SIZES)
    match = re.fullmatch(rf"({families})_({sizes})([1-9]\d*)", str(name))
    if match is None:
        near = ", ".join(difflib.get_close_matches(str(name), MODEL_NAMES, n=3, cutoff=0.0))
        raise ValueError(
            f"no model is called {name!r}; expected {{{families}}}_{{{sizes}}}{{patch}}, or a pyramid, "
            f"{', '.join(PYRAMID_SIZES)}, such as the nearest: {near}."
        )
    family, size, patch = match.groups()
    return family, SIZES[size], int(patch)


def create_model(
    name: str,
    *,
    num_classes: int,
    rngs: nnx.Rngs,
    image_size: int | Sequence[int] = 224,
    stem: str | None = None,
    mixer: str | None = None,
    mlp_dim: int | None = None,
    levels: int | None = None,
    channels: int | None = None,
    mixtures: int | None = None,
    local_context: int | None = None,
    readout: str | None = None,
    readout_dim: int | None = None,
    position: str | None = None,
    bidirectional: bool = False,
    flips: bool = False,
    late_attention: bool = False,
    stem_stride: int | None = None,
    layer_scale: int | float | Literal["default"] | None = "default",
    norm_epsilon: int | float = LAYER_NORM_EPSILON,
    drop_path_rate: int | float = 0.0,
    remat: str = "elementwise",
    dtype: DTypeLike = "float32",
    mode: str = "auto",
    **mixer_options: Any,
) -> VisionModel:
    """Make a named ViR, ViT or convolutional ViR (docs/method.md, section 3) with fresh parameters, or a pyramid.

    Args:
        name: `{vir|vit|cvir}_{pico|ti|s|b|l|vix}{patch in pixels}`, e.g. "vir_b16"; or that of a pyramid with
            convolutional stages (docs/pyramids.md), `vir_h_{nano|micro|pico|ti|s|b}`. `MODEL_NAMES` lists the
            usual ones.
        num_classes: width of the head; that of a model of pixels has the width that its distribution needs.
        rngs: source of the parameters' random keys.
        image_size: pixels, a square's side or (height, width), that the position embeddings are made for. The
            model takes images of other sizes and resamples the embeddings.
        stem: how patches are embedded: by one "linear" layer, by overlapping convolutions with norms and GELU, "conv",
            or by "conv_vix", those of Vision X-formers, which are linear (`vir_jax.models.embedding`). Or "pixels": a
            token is made of the pixels before the one that it predicts (`vir_jax.models.pixel_stem`), in a model of
            images that reads their levels; the patch is 1 then. None: "linear", for cvir_* "conv".
        mixer: name of the token mixer (`vir_jax.models.mixers`); None: "softmax" for vit_*, else "retention".
        mlp_dim: hidden units of the blocks' MLP; None: 4 to a channel, 2 for the size vix.
        levels: of a model of pixels: how many a channel has.
        channels: of the images: 1 (grey), 3 (RGB) or 4 (RGB and another). None: 3, in models of pixels 1; these have
            no fourth.
        mixtures: of a model of pixels: logistic distributions that a pixel's is mixed of; None: it is categorical.
        local_context: of a model of pixels: how far a token sees its earlier neighbours, in rows and columns; None: the
            pixel before alone.
        readout: what the head reads: the "class_token", the "average" of the patch tokens (of both passes where
            bidirectional), or "every_token" but the class token. Or it gives logits to each pixel, "dense_linear",
            "dense_patch" (`vir_jax.models.readout`) or "dense_upernet" (`vir_jax.models.upernet`), which alone pyramids
            have. None: the class token; the average where the mixer has no place
            for one (`mlp_mixer`), and in pyramids; in models of pixels every token.
        readout_dim: channels of the head "dense_upernet"; None: 512.
        position: how tokens know where they stand. Embeddings added to the patches: "learned" for a grid and resampled
            to others, or "sincos": fixed, of rows and columns. Or rotary positions, which turn queries and keys
            in every layer: "rope" by the index in the sequence, "rope_2d" by row and column (`vir_jax.models.rope`). Or
            "none". With all but learned ones an image of unknown height can be read as it arrives. None: "learned", in
            pyramids "none".
        bidirectional: read the patches forwards, then backwards: [p1..pN, pN..p1, class token]; for causal mixers.
        flips: read the patches backwards in every second block, [pN..p1, class token]; for causal mixers, which cannot
            be streamed then. Of a pyramid in the stages with mixers.
        late_attention: of a pyramid: the last half of the blocks of each stage with mixers, rounded down, has softmax
            attention.
        stem_stride: of a pyramid: pixels to a token of its first stage, 1, 2 or 4; each next one has half as many
            tokens each way. None: 4.
        layer_scale: initial LayerScale; None: the model has none; "default": 1e-5 for vir_*, 0.1 for cvir_*, none for
            vit_*; of pyramids 1e-5 for vir_h_b alone.
        norm_epsilon: what layer norms add to the variance; other libraries' weights want their own.
        drop_path_rate: stochastic depth of the last block, in [0, 1); it rises linearly from 0 at the first.
        remat: what of a block to compute anew in the backward pass: "none", "elementwise" or "full"
            (`vir_jax.models.stage.REMAT`).
        dtype: of the computation. Parameters, residual stream, decays, states and logits are float32 always.
        mode: form of the mixer where a call names none: "auto", or one of the mixer's.
        **mixer_options: of the mixer, None for its default; of retention: `retention`, `chunk_size`,
            `implementation`, `decays`, `qk_norm`, `head_norm`, `gate`, `short_conv`, `directions`
            (`vir_jax.models.mixers.retention`). cvir_* has defaults of its own (`FAMILIES`).

    Raises:
        ValueError: on an unknown name or option, or options that make no sense together.
    """
    pyramid = name in PYRAMID_SIZES
    if pyramid:
        family = Family("retention", layer_scale=PYRAMID_SIZES[name].layer_scale)
    else:
        name_of_family, size, patch = parse_name(name)
        family = FAMILIES[name_of_family]
    height, width = _image_size(image_size)
    check_positive("num_classes", num_classes)
    check_option("rngs", rngs, isinstance(rngs, nnx.Rngs), "flax.nnx.Rngs, such as nnx.Rngs(0)")
    check_bool("bidirectional", bidirectional)
    check_bool("flips", flips)
    check_bool("late_attention", late_attention)
    check_option(
        "drop_path_rate",
        drop_path_rate,
        is_number(drop_path_rate) and 0 <= drop_path_rate < 1,
        "a probability in [0, 1)",
    )
    if layer_scale == "default":
        layer_scale = family.layer_scale
    positive = layer_scale is None or (is_number(layer_scale) and 0 < float(layer_scale) < math.inf)
    check_option("layer_scale", layer_scale, positive, "a positive number, None for none, or 'default'")
    positive = is_number(norm_epsilon) and 0 < float(norm_epsilon) < math.inf
    check_option("norm_epsilon", norm_epsilon, positive, "a positive number")
    check_option("remat", remat, isinstance(remat, str) and remat in REMAT, f"one of {tuple(REMAT)}")
    check_option("dtype", dtype, _is_float(dtype), "'float32', 'bfloat16' or 'float16'")
    mixer = mixer or family.mixer
    given = _given(name, mixer, mixer_options, family.options if mixer == family.mixer else {})
    for option, value in {"bidirectional": bidirectional, "flips": flips}.items():
        if value and not mixer_type(mixer).causal:
            raise ValueError(
                f"{option}=True makes no sense for {name} with the mixer {mixer!r}, whose tokens see all others in "
                "one pass. Leave it out, or use a causal mixer, as vir_* models have."
            )
        if value and given.get("directions", 1) != 1:
            raise ValueError(
                f"{option}=True makes no sense with directions={given['directions']}, with which every block reads the "
                "patches in both directions. Choose one of the two."
            )
    if readout_dim is not None:
        check_positive("readout_dim", readout_dim)
        check_option(
            "readout_dim", readout_dim, readout == "dense_upernet", "None, but with readout='dense_upernet'"
        )
    common: dict[str, Any] = {
        "image_size": (height, width),
        "num_classes": num_classes,
        "channels": channels,
        "mixer": mixer,
        "mixer_options": given,
        "readout": readout,
        "readout_dim": readout_dim,
        "flips": bool(flips),
        "layer_scale": None if layer_scale is None else float(layer_scale),
        "norm_epsilon": float(norm_epsilon),
        "drop_path_rate": float(drop_path_rate),
        "remat": remat,
        "dtype": dtype,
        "mode": mode,
        "rngs": rngs,
    }
    of_isotropic: dict[str, Any] = {
        "stem": stem,
        "mlp_dim": mlp_dim,
        "levels": levels,
        "mixtures": mixtures,
        "local_context": local_context,
        "position": position,
        "bidirectional": bool(bidirectional),
    }
    of_pyramids: dict[str, Any] = {"stem_stride": stem_stride, "late_attention": late_attention}
    model: VisionModel
    if pyramid:
        check_pyramid_options(name, mixer, readout=readout, **of_isotropic)
        model = make_pyramid(name, **of_pyramids, **common)
    else:
        check_no_pyramid_options(name, **of_pyramids)
        of_isotropic["stem"] = family.stem if stem is None else stem
        model = make_isotropic(name, size, patch, **of_isotropic, **common)
    known = ("auto", *model.modes)
    check_option("mode", mode, mode in known, f"one of {known}, which {mixer} has")
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


def _given(name: str, mixer: str, options: Mapping[str, Any], of_family: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are not the mixer's defaults, having checked that it has them.

    Those that are not given are the family's.
    """
    defaults = mixer_options(mixer)
    given = {**of_family, **{option: value for option, value in options.items() if value is not None}}
    for option, value in given.items():
        if option in defaults:
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
    return {option: value for option, value in given.items() if value is not defaults[option]}


def _image_size(image_size: Any) -> tuple[int, int]:
    sides = (
        tuple(image_size)
        if isinstance(image_size, Sequence) and not isinstance(image_size, str)
        else (image_size,)
    )
    if len(sides) not in (1, 2) or not all(is_integer(side) and side >= 1 for side in sides):
        raise ValueError(
            f"image_size={image_size!r}; expected pixels: (height, width), or one number for a square"
        )
    return int(sides[0]), int(sides[-1])


def _is_float(dtype: Any) -> bool:
    try:
        return jnp.dtype(dtype).name in ("float32", "bfloat16", "float16")
    except TypeError:
        return False
