"""The named pyramids: a table of sizes, and how a model is made of one (docs/pyramids.md)."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from vir_jax.models.conv_stage import STEM_STRIDES, ConvBlock, PyramidStem
from vir_jax.models.layers import LAYER_NORM_EPSILON
from vir_jax.models.layout import Layout
from vir_jax.models.mixers import mixer_type
from vir_jax.models.options import check_channels, check_option, is_integer
from vir_jax.models.pyramid import MakeBlock, Pyramid, PyramidStage
from vir_jax.models.pyramid_readout import PyramidReadout
from vir_jax.models.stage import Block
from vir_jax.models.upernet import WIDTH, PyramidUperNetReadout

MIXER_STAGES = (2, 3)
"""The stages whose blocks mix tokens; those before them are convolutional."""

MLP_RATIO = 4
STRIDE = 4
"""Pixels to a token of the first stage, where `stem_stride` says nothing else."""

LATE = "softmax"
"""The mixer of the last blocks of a stage with `late_attention`."""


@dataclasses.dataclass(frozen=True)
class PyramidSize:
    """Widths and depths of a pyramid.

    Attributes:
        dim: channels of the first stage; each next stage has twice as many.
        stem_dim: channels between the stem's two convolutions.
        depths: blocks of each stage.
        heads: of the mixers, in each of the stages that have some.
        layer_scale: initial value in blocks with mixers; None: there is none.
    """

    dim: int
    stem_dim: int
    depths: tuple[int, int, int, int]
    heads: tuple[int, int]
    layer_scale: float | None = None


# All are ours. Widths, depths and stems of ti, s and b are those of MambaVision (T, S, B); the last stages of s are as
# wide as ViR-S and ViR-B, and so are their heads. nano, micro and pico are for small images; nano has no more
# parameters than vir_pico4.
PYRAMID_SIZES = {
    "vir_h_nano": PyramidSize(dim=10, stem_dim=16, depths=(2, 2, 3, 1), heads=(4, 8)),
    "vir_h_micro": PyramidSize(dim=16, stem_dim=16, depths=(2, 2, 3, 1), heads=(4, 8)),
    "vir_h_pico": PyramidSize(dim=32, stem_dim=32, depths=(1, 1, 3, 1), heads=(4, 8)),
    "vir_h_ti": PyramidSize(dim=80, stem_dim=32, depths=(1, 3, 8, 4), heads=(8, 16)),
    "vir_h_s": PyramidSize(dim=96, stem_dim=64, depths=(3, 3, 7, 5), heads=(6, 12)),
    "vir_h_b": PyramidSize(dim=128, stem_dim=64, depths=(3, 3, 10, 5), heads=(8, 16), layer_scale=1e-5),
}


def check_pyramid_options(name: str, mixer: str, **options: Any) -> None:
    """Check that a pyramid is given no option that isotropic models alone have.

    Args:
        name: of the pyramid.
        mixer: of its last stages.
        **options: of `create_model`, as they were given.

    Raises:
        ValueError: one of them says something; it is named.
    """
    expected = {
        "readout": (None, "average", "dense_upernet"),
        "position": (None, "none"),
        "bidirectional": (False,),
    }
    for option, value in options.items():
        known = expected.get(option, (None,))
        if value not in known:
            raise ValueError(
                f"{option}={value!r} makes no sense for {name}, a pyramid of convolutions and {mixer}: it has no class "
                f"token and no patches, and reads the image once; expected {' or '.join(map(repr, known))}."
            )


def check_no_pyramid_options(name: str, **options: Any) -> None:
    """Check that an isotropic model is given no option that pyramids alone have.

    Raises:
        ValueError: it is; the option is named.
    """
    for option, value in options.items():
        if value is not None and value is not False:
            raise ValueError(
                f"{option}={value!r} makes no sense for {name}: it is of pyramids, {', '.join(PYRAMID_SIZES)}. Leave "
                "it out."
            )


def make_pyramid(
    name: str,
    *,
    image_size: tuple[int, int],
    num_classes: int,
    channels: int | None,
    mixer: str,
    mixer_options: Mapping[str, Any],
    stem_stride: int | None,
    late_attention: bool,
    readout: str | None,
    readout_dim: int | None,
    flips: bool,
    layer_scale: float | None,
    norm_epsilon: float,
    drop_path_rate: float,
    remat: str,
    dtype: DTypeLike,
    mode: str,
    rngs: nnx.Rngs,
) -> Pyramid:
    """Make a pyramid of `PYRAMID_SIZES`; `create_model` explains the arguments.

    Raises:
        ValueError: an unknown value, or options that make no sense together.
    """
    size = PYRAMID_SIZES[name]
    strides = tuple(STEM_STRIDES)
    known = stem_stride is None or (is_integer(stem_stride) and stem_stride in strides)
    check_option("stem_stride", stem_stride, known, f"one of {strides}, or None")
    check_channels(channels)
    if late_attention and mixer == LATE:
        raise ValueError(
            f"late_attention=True makes no sense with the mixer {mixer!r}, which all blocks have then. Choose one of "
            "the two."
        )
    stem = PyramidStem(
        channels=channels or 3,
        hidden=size.stem_dim,
        dim=size.dim,
        stride=stem_stride or STRIDE,
        dtype=dtype,
        rngs=rngs,
    )
    rates = np.linspace(0.0, drop_path_rate, sum(size.depths)).tolist()
    stages, side = [], stem.layout(image_size).grid
    for i, depth in enumerate(size.depths):
        dim, own, rates = size.dim << i, rates[:depth], rates[depth:]
        parts: list[tuple[MakeBlock, list[float]]] = [(partial(_conv_block, dim, dtype), own)]
        if i in MIXER_STAGES:
            make = partial(
                _mixer_block,
                dim,
                size.heads[MIXER_STAGES.index(i)],
                Layout(cols=side[1], patches=side[0] * side[1], class_token=None),
                layer_scale,
                dtype,
            )
            first = depth - (depth // 2 if late_attention else 0)
            parts = [
                (partial(make, mixer, mixer_options), own[:first]),
                (partial(make, LATE, {}), own[first:]),
            ]
        stages.append(
            PyramidStage(
                dim,
                parts,
                flips=flips and i in MIXER_STAGES,
                last=not rates,
                remat=remat,
                dtype=dtype,
                rngs=rngs,
            )
        )
        side = -(-side[0] // 2), -(-side[1] // 2)
    dims = [size.dim << i for i in range(len(size.depths))]
    head: PyramidReadout
    if readout == "dense_upernet":
        head = PyramidUperNetReadout(
            dims, num_classes, stride=stem.patch, width=readout_dim or WIDTH, dtype=dtype, rngs=rngs
        )
    else:
        head = PyramidReadout(dims[-1], num_classes, rngs=rngs)
    return Pyramid(
        options={
            "name": name,
            "mixer": mixer,
            "readout": readout or "average",
            "position": "none",
            "bidirectional": False,
            "dtype": jnp.dtype(dtype).name,
            # What is as it is by default is left out.
            **({"stem_stride": stem_stride} if stem_stride not in (None, STRIDE) else {}),
            **({"channels": channels} if channels not in (None, 3) else {}),
            **({"flips": True} if flips else {}),
            **({} if readout_dim in (None, WIDTH) else {"readout_dim": readout_dim}),
            **({} if norm_epsilon == LAYER_NORM_EPSILON else {"norm_epsilon": norm_epsilon}),
            **({"late_attention": True} if late_attention else {}),
            **mixer_options,
        },
        stem=stem,
        stages=stages,
        readout=head,
        mode=mode,
    )


def _conv_block(dim: int, dtype: DTypeLike, rngs: nnx.Rngs) -> ConvBlock:
    return ConvBlock(dim, dtype=dtype, rngs=rngs)


def _mixer_block(
    dim: int,
    heads: int,
    layout: Layout,
    layer_scale: float | None,
    dtype: DTypeLike,
    mixer: str,
    options: Mapping[str, Any],
    rngs: nnx.Rngs,
) -> Block:
    made = mixer_type(mixer)(dim, heads, layout, dtype=dtype, rngs=rngs, **options)
    return Block(dim, made, mlp_dim=MLP_RATIO * dim, layer_scale=layer_scale, dtype=dtype, rngs=rngs)
