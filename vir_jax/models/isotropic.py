"""The isotropic models: blocks of one width over one grid of patches, from the stem to the head."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from vir_jax.models.embedding import EMBEDDINGS
from vir_jax.models.layers import LAYER_NORM_EPSILON
from vir_jax.models.layout import ClassTokenPlace, Layout
from vir_jax.models.likelihood import make_likelihood
from vir_jax.models.mixers import mixer_type
from vir_jax.models.model import VisionModel
from vir_jax.models.options import check_channels, check_option, check_positive
from vir_jax.models.pixel_stem import PixelStem, check_no_pixel_options, check_predicts_pixels
from vir_jax.models.position import POSITIONS, ROPE
from vir_jax.models.readout import DENSE, READOUTS, Readout, Reads
from vir_jax.models.stage import Block, Stage
from vir_jax.models.stem import Stem, patch_grid
from vir_jax.models.upernet import FINEST, WIDTH, UperNetReadout


@dataclasses.dataclass(frozen=True)
class Size:
    """Width and depth of a model: channels, blocks, heads, and the MLP's hidden units to a channel."""

    dim: int
    depth: int
    heads: int
    mlp_ratio: int = 4


# s, b and l are those of docs/method.md, section 3; ti is by analogy with DeiT, pico for tests and small data; vix is
# that of Vision X-formers on CIFAR-10 (arXiv 2107.02239).
SIZES = {
    "pico": Size(dim=64, depth=4, heads=4),
    "ti": Size(dim=192, depth=12, heads=3),
    "s": Size(dim=384, depth=12, heads=6),
    "b": Size(dim=768, depth=12, heads=12),
    "l": Size(dim=1024, depth=24, heads=16),
    "vix": Size(dim=128, depth=4, heads=4, mlp_ratio=2),
}


def make_isotropic(
    name: str,
    size: Size,
    patch: int,
    *,
    image_size: tuple[int, int],
    num_classes: int,
    channels: int | None,
    stem: str,
    mixer: str,
    mixer_options: Mapping[str, Any],
    mlp_dim: int | None,
    levels: int | None,
    mixtures: int | None,
    local_context: int | None,
    readout: str | None,
    readout_dim: int | None,
    position: str | None,
    bidirectional: bool,
    flips: bool,
    layer_scale: float | None,
    norm_epsilon: float,
    drop_path_rate: float,
    remat: str,
    dtype: DTypeLike,
    mode: str,
    rngs: nnx.Rngs,
) -> VisionModel:
    """Make a model of `size` with patches of `patch` pixels; `create_model` explains the rest.

    Raises:
        ValueError: an unknown value, or options that make no sense together.
    """
    position = position or "learned"
    if mlp_dim is not None:
        check_positive("mlp_dim", mlp_dim)
    check_option("stem", stem, stem in (*EMBEDDINGS, "pixels"), f"one of {(*EMBEDDINGS, 'pixels')}")
    check_option("readout", readout, readout in (None, *READOUTS), f"one of {READOUTS}, or None")
    check_option("position", position, position in POSITIONS, f"one of {tuple(POSITIONS)}")
    kind = mixer_type(mixer)
    class_token: ClassTokenPlace | None = "last" if kind.causal else "first"
    if not kind.takes_class_token:
        class_token, readout = None, readout or "average"
        if readout not in ("average", *DENSE):
            raise ValueError(
                f"readout={readout!r} makes no sense with the mixer {mixer!r}, which has no place for a class token; "
                f"expected 'average', or None for it, or one of {DENSE}."
            )
    if bidirectional and flips:
        raise ValueError(
            "flips=True makes no sense with bidirectional=True, with which every block reads the patches in both "
            "directions. Choose one of the two."
        )
    of_pixels: dict[str, Any] = {"levels": levels, "mixtures": mixtures}
    if stem == "pixels":
        check_predicts_pixels(
            patch,
            mixer,
            both_ways={
                "bidirectional": bidirectional,
                "flips": flips,
                "directions": mixer_options.get("directions"),
            },
            readout=readout,
            local_context=local_context,
        )
        of_pixels["channels"] = channels or 1
    else:
        check_no_pixel_options({**of_pixels, "local_context": local_context})
        check_channels(channels)
    if readout == "dense_upernet" and patch < FINEST:
        raise ValueError(
            f"readout='dense_upernet' makes no sense for {name}: its finest map has {FINEST} places to a patch's side, "
            f"which here has {patch} pixels. Use a model with larger patches, or readout='dense_patch'."
        )
    rows, cols = patch_grid(image_size, patch)
    layout = Layout(cols=cols, patches=rows * cols, class_token=class_token, passes=1 + bidirectional)

    def make_block(rngs: nnx.Rngs) -> Block:
        made = kind(size.dim, size.heads, layout, dtype=dtype, rngs=rngs, **mixer_options)
        if position in ROPE:
            made.use_rope(ROPE[position])
        hidden = mlp_dim or size.mlp_ratio * size.dim
        return Block(size.dim, made, mlp_dim=hidden, layer_scale=layer_scale, dtype=dtype, rngs=rngs)

    made_stem: Stem | PixelStem
    if stem == "pixels":
        made_stem = PixelStem(
            image_size=image_size,
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
            made_stem.layout(image_size),
        )
        of_pixels["local_context"] = local_context or 0
    else:
        made_stem = Stem(
            embedding=stem,
            image_size=image_size,
            patch=patch,
            channels=channels or 3,
            dim=size.dim,
            position=position,
            class_token=class_token,
            passes=layout.passes,
            dtype=dtype,
            rngs=rngs,
        )
    # The order in which parts draw their parameters belongs to the seed: stem, blocks, readout.
    stage = Stage(
        make_block,
        drop_path_rates=np.linspace(0.0, drop_path_rate, size.depth).tolist(),
        remat=remat,
        flips=flips,
        rngs=rngs,
    )
    head: Readout
    if readout == "dense_upernet":
        width = readout_dim or WIDTH
        head = UperNetReadout(size.dim, num_classes, patch=patch, width=width, dtype=dtype, rngs=rngs)
    else:
        reads = cast(Reads, readout or "class_token")
        head = Readout(size.dim, num_classes, reads, patch=patch, rngs=rngs)
    return VisionModel(
        options={
            "name": name,
            "mixer": mixer,
            "readout": readout or "class_token",
            "position": position,
            "bidirectional": bidirectional,
            "dtype": jnp.dtype(dtype).name,
            # What is as it always was is left out: states saved before these options came are read.
            **({"stem": stem} if stem != "linear" else {}),
            **({"channels": channels} if stem != "pixels" and channels not in (None, 3) else {}),
            **({"mlp_dim": mlp_dim} if mlp_dim is not None else {}),
            **({"flips": True} if flips else {}),
            **({} if readout_dim in (None, WIDTH) else {"readout_dim": readout_dim}),
            **({} if norm_epsilon == LAYER_NORM_EPSILON else {"norm_epsilon": norm_epsilon}),
            **(of_pixels if stem == "pixels" else {}),
            **mixer_options,
        },
        stem=made_stem,
        stage=stage,
        readout=head,
        mode=mode,
    )
