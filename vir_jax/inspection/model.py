"""What inspection asks of a model: that its class token reads last, and by which decays."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from vir_jax.inspection.decay import RetentionKind, decay_at_arrival, decay_row
from vir_jax.models import VisionBackbone
from vir_jax.models.backbone import Block, patch_grid
from vir_jax.models.layers import LayerScale
from vir_jax.models.mixers import Mixer, Retention, Retention2D
from vir_jax.ops import vir_log_decay


def check_class_token(model: VisionBackbone) -> None:
    """The model is a ViR whose head reads the class token.

    Raises:
        ValueError: it mixes tokens otherwise, so that nothing is a sum over patches, or its head reads other tokens.
    """
    retention_kind(model.blocks.mixer)
    if (model.class_token_place, model.readout) != ("last", "last"):
        raise ValueError(
            f"the model's class token comes {model.class_token_place} and its head reads {model.readout!r}; expected "
            "a class token that comes last and is what the head reads: a vir_* model made without readout"
        )


def retention_kind(mixer: Mixer) -> RetentionKind:
    """Which retention the mixer is, "1d" or "2d".

    Raises:
        ValueError: it is none.
    """
    if isinstance(mixer, Retention):
        return "1d"
    if isinstance(mixer, Retention2D):
        return "2d"
    raise ValueError(
        f"the model mixes tokens by {type(mixer).__name__}; expected retention (a vir_* model), whose output is a "
        "sum over tokens that no softmax ties together"
    )


def grid_of(model: VisionBackbone, images: Float[Array, "b H W 3"]) -> tuple[int, int]:
    """(rows, columns) of the images' patches."""
    return patch_grid(images.shape[1:3], model.patch)


def class_token_decay(mixer: Mixer, n: int, grid: tuple[int, int]) -> Float32[Array, "h n"]:
    """D[cls, m]: what is left of each of n tokens when the class token, the last of them, reads."""
    kind = retention_kind(mixer)
    line = (1, n - 1)  # In 1-D the order is all there is, be it that of one pass over the grid or of two.
    return decay_row(vir_log_decay(mixer.heads), -1, grid if kind == "2d" else line, kind)


def arrival_decay(mixer: Mixer, n: int, grid: tuple[int, int]) -> Float32[Array, "h t m"]:
    """`decay_at_arrival` of the n - 1 patches that come before the class token."""
    return decay_at_arrival(vir_log_decay(mixer.heads), n - 1, grid, retention_kind(mixer))


def add_to_residual(
    x: Float[Array, "b t c"], update: Float[Array, "b t c"], scale: LayerScale | None
) -> Float[Array, "b t c"]:
    """What a branch adds to the residual stream, LayerScale included, as `Block` adds it."""
    return x + (update if scale is None else scale(update))


def retention_scale(block: Block) -> Float32[Array, "c"]:
    """Per channel, what the block's LayerScale multiplies its retention by."""
    return (
        jnp.ones(block.mixer.dim, jnp.float32)
        if block.layer_scale1 is None
        else block.layer_scale1.scale[...]
    )


def exact_einsum(equation: str, *operands: Array) -> Array:
    """einsum in fp32, on accelerators too."""
    operands = tuple(x.astype(jnp.float32) for x in operands)
    return jnp.einsum(equation, *operands, precision=jax.lax.Precision.HIGHEST)
