"""What inspection asks of a model: that its class token reads last, and by which decays."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from vir_jax.inspection.decay import RetentionKind, decay_at_arrival, decay_row
from vir_jax.models import VisionModel
from vir_jax.models.layout import Layout
from vir_jax.models.mixers import Mixer
from vir_jax.models.stage import Block


def check_class_token(model: VisionModel) -> None:
    """Check that the model's mixer is retention with a decay per head, and that its head reads the class token.

    Raises:
        ValueError: it mixes tokens otherwise, so that nothing is a sum over patches, or its head reads other tokens.
    """
    retention_kind(mixer_of(model))
    if model.readout.reads != "class_token":
        raise ValueError(
            f"the model's head reads {model.readout.reads!r}; expected the class token: a vir_* model made without "
            "readout"
        )


def check_one_order(model: VisionModel) -> None:
    """Check that all blocks read the patches in the order of the image.

    Raises:
        ValueError: every second one reads them backwards.
    """
    if model.stage.flips:
        raise ValueError(
            "the model was made with flips=True: every second block reads the patches from the last to the first, and "
            "has no state of those that were read so far; expected a model made without flips"
        )


def mixer_of(model: VisionModel) -> Any:
    """Return the mixer of all layers, its parameters stacked."""
    return model.mixer


def retention_kind(mixer: Mixer) -> RetentionKind:
    """Return which retention the mixer is, "1d" or "2d".

    Raises:
        ValueError: it is none.
    """
    if mixer.retention is None:
        raise ValueError(
            f"the model mixes tokens by {mixer.described}; expected retention with a decay per head (a vir_* model), "
            "whose output is a sum over tokens that no softmax ties together, of weights that are known"
        )
    return mixer.retention


def layout_of(model: VisionModel, images: Float[Array, "b H W 3"]) -> Layout:
    """Return where the tokens of the images stand."""
    return model.layout(images.shape[1:3])


def class_token_decay(mixer: Mixer, n: int, grid: tuple[int, int]) -> Float32[Array, "h n"]:
    """Return D[cls, m]: what is left of each of n tokens when the class token, the last of them, reads."""
    kind = retention_kind(mixer)
    line = (1, n - 1)  # In 1-D the order is all there is, be it that of one pass over the grid or of two.
    return decay_row(mixer.log_decay, -1, grid if kind == "2d" else line, kind)


def arrival_decay(mixer: Mixer, n: int, grid: tuple[int, int]) -> Float32[Array, "h t m"]:
    """Return `decay_at_arrival` of the n - 1 patches that come before the class token."""
    return decay_at_arrival(mixer.log_decay, n - 1, grid, retention_kind(mixer))


def retention_scale(block: Block) -> Float32[Array, "c"]:
    """Return, per channel, what the block's LayerScale multiplies its retention by."""
    scale = block.layer_scale1
    return jnp.ones(block.norm1.num_features, jnp.float32) if scale is None else scale.scale[...]


def exact_einsum(equation: str, *operands: Array) -> Array:
    """Compute an einsum in fp32, on accelerators too."""
    operands = tuple(x.astype(jnp.float32) for x in operands)
    return jnp.einsum(equation, *operands, precision=jax.lax.Precision.HIGHEST)
