"""The prediction as patches arrive: the class token can be read at any time."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from vir_jax.inspection.model import (
    arrival_decay,
    check_class_token,
    check_one_order,
    exact_einsum,
    layout_of,
    mixer_of,
)
from vir_jax.models import VisionModel
from vir_jax.models.layout import Layout
from vir_jax.models.rope import rotate, token_angles


def logits_as_read(model: VisionModel, images: Float[Array, "b H W 3"]) -> Float32[Array, "b t classes"]:
    """Return logits of a class token that comes after the first t patches, for every t = 0 .. patches.

    No patch sees one that comes later, so the patches' keys and values are those of the whole image, and the class
    tokens of all times are computed side by side: each reads the patches before it and itself. The last one's logits
    are the model's. In 2-D it stands one row below the row that is being read, whose unread patches are absent; at
    the end of a row that is what the model does with an image that ends there. Position embeddings are those of the
    whole image. A bidirectional model reads every patch twice, t counting both.

    Args:
        model: a ViR, 1-D or 2-D.
        images: normalised pixels.

    Raises:
        ValueError: another model than `check_class_token` asks for, one whose blocks read backwards, or one with a
            short convolution, through which each class token would read other patches.
    """
    check_class_token(model)
    check_one_order(model)
    if getattr(mixer_of(model), "short_conv", None) is not None:
        raise ValueError(
            f"the model was made with short_conv={mixer_of(model).short_conv.width}, which ties the class token to the "
            "patches right before it; expected a model made without"
        )
    return _logits_as_read(*nnx.split(model), images)


@partial(jax.jit, static_argnums=0)
def _logits_as_read(graph: Any, params: Any, images: Array) -> Array:
    model = nnx.merge(graph, params)
    layout = layout_of(model, images)
    grid = layout.grid
    names = [f"blocks.{layer}.mixer.{name}" for layer in range(model.depth) for name in "kv"]
    found = model.intermediates(images, names)
    b, n = found[names[0]].shape[:2]

    x = jnp.broadcast_to(model.stem.class_tokens(b), (b, n, model.dim))  # One class token for each t.
    for layer in range(model.depth):
        block = model.block(layer)
        mixer = block.mixer
        k, v = (found[f"blocks.{layer}.mixer.{name}"][:, :-1] for name in "kv")
        read = block.norm1(x)
        q, own_k, own_v = (y.astype(jnp.float32) for y in mixer.project(read))
        q *= mixer.head_dim**-0.5
        own_scores = jnp.sum(q * own_k, axis=-1, keepdims=True)
        if mixer.rope is not None:
            q = rotate(q, _angles(mixer, layout, n))

        decay = jnp.exp(mixer.log_decay)[:, None, None] * arrival_decay(mixer, n, grid)
        outputs = exact_einsum("bhtm,bmhd->bthd", exact_einsum("bthd,bmhd->bhtm", q, k) * decay, v)
        outputs += own_scores * own_v
        gain = mixer.gain(read, outputs)
        outputs = outputs if gain is None else outputs * gain
        x = block.add_mlp(block.add_mixed(x, mixer.out(outputs)))
    return model.readout.logits(x)


def _angles(mixer: Any, layout: Layout, n: int) -> Float32[Array, "t i"]:
    """Rotary angles of a class token after t = 0 .. n - 1 patches, as if the image ended there."""

    def after(t: Array) -> Array:
        # In the second of two passes no further row begins.
        read = jnp.minimum(t, layout.patches) if mixer.rope == "2d" else t
        return token_angles(layout.piece(read, 0, class_token="last"), mixer.rope, mixer.head_dim)[0]

    return jax.vmap(after)(jnp.arange(n, dtype=jnp.int32))
