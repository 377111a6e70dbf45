"""What each patch, through each head, adds to the class token and to a logit: exactly, for retention has no softmax.

The class token's retention is a sum over tokens m and heads h, through the output projection W_h and its bias,

    sum_{h,m} a[h,m] (v[m,h] * gain_h) W_h + bias,    a[h,m] = d^-1/2 (q_cls . k_m) D_h[cls,m],

The gain is 1 in ViR. Where heads are normalised or gated it is what the very class token's sums are divided by, and its
gate, both held. Behind a short convolution a token stands for itself and the few before it.

and what a layer adds to the residual stream reaches the head by the final LayerNorm alone. With the mean and the
variance of the very class token held, that is linear: a term t of the residual stream adds

    t . direction,    direction = r (g w - mean(g w)),    r = (variance + epsilon)^-1/2,

to the logit of a class whose head weights are w, the norm's gain being g. (Taking the mean off t or off g w is the
same.) So a logit is a sum of terms, none of them estimated. They are *direct* terms: the MLP of a block reads what
its retention wrote, and what it makes of it is counted as the MLP's.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from vir_jax.inspection.model import (
    check_class_token,
    class_token_decay,
    exact_einsum,
    layout_of,
    mixer_of,
    retention_scale,
)
from vir_jax.models import VisionModel


class LayerContributions(NamedTuple):
    """What one layer's retention gives the class token: terms summed over heads and tokens, plus bias.

    That is the output of the mixer, before LayerScale.
    """

    terms: Float32[Array, "b h n c"]
    bias: Float32[Array, "c"]

    def shares(self) -> Float32[Array, "b h n"]:
        """Return each term's part of the sum of all, along its direction: they sum to 1, and may be negative."""
        total = self.terms.sum(axis=(1, 2))
        along = exact_einsum("bhnc,bc->bhn", self.terms, total)
        return along / exact_einsum("bc,bc->b", total, total)[:, None, None]


class LogitContributions(NamedTuple):
    """The terms of one logit of every image; all of them together are the logit.

    The last of the n tokens is the class token, which reads itself, too.
    """

    retention: Float32[Array, "b l h n"]  # Token n through head h of layer l.
    retention_bias: Float32[Array, "b l"]  # Of the output projection of layer l.
    mlp: Float32[Array, "b l"]
    class_token: Float32[Array, "b"]  # What the class token starts as.
    constant: Float32[Array, "b"]  # The shift of the final norm and the bias of the head.

    def total(self) -> Float32[Array, "b"]:
        """Return the logit."""
        layers = self.retention.sum(axis=(2, 3)) + self.retention_bias + self.mlp
        return layers.sum(axis=1) + self.class_token + self.constant

    def before_layer(self, layer: int) -> Float32[Array, "b"]:
        """Return what the residual stream carries into a layer, all that was added before it."""
        layers = self.retention.sum(axis=(2, 3)) + self.retention_bias + self.mlp
        return layers[:, :layer].sum(axis=1) + self.class_token


def layer_contributions(
    model: VisionModel, images: Float[Array, "b H W 3"], layers: Sequence[int]
) -> dict[int, LayerContributions]:
    """Return what each token, through each head, adds to the class token in each of some layers.

    Args:
        model: a ViR, 1-D or 2-D, bidirectional or not.
        images: normalised pixels.
        layers: 0, 1, ...

    Raises:
        ValueError: another model than `check_class_token` asks for; no such layer.
    """
    check_class_token(model)
    for layer in layers:
        if not 0 <= layer < model.depth:
            raise ValueError(f"layer {layer}: the model has layers 0 to {model.depth - 1}")
    return _layer_contributions(*nnx.split(model), images, tuple(layers))


@partial(jax.jit, static_argnums=(0, 3))
def _layer_contributions(
    graph: Any, params: Any, images: Array, layers: tuple[int, ...]
) -> dict[int, LayerContributions]:
    model = nnx.merge(graph, params)
    found = model.intermediates(
        images, [f"blocks.{layer}.{name}" for layer in layers for name in _kept(model, "q", "k", "v")]
    )
    contributions = {}
    for layer in layers:
        mixer = model.block(layer).mixer
        q, k, v = (found[f"blocks.{layer}.mixer.{name}"] for name in "qkv")
        weights = _class_token_weights(model, layer, q, k, layout_of(model, images).grid)
        gain = _class_token_gain(v, found.get(f"blocks.{layer}.mixer.gain"))
        terms = exact_einsum("bhn,bnhd,bhd,hdc->bhnc", weights, v, gain, mixer.out.kernel[...])
        contributions[layer] = LayerContributions(terms, mixer.out.bias[...])
    return contributions


def logit_contributions(
    model: VisionModel, images: Float[Array, "b H W 3"], classes: Int[Array, "b"]
) -> LogitContributions:
    """Return the terms that one logit of each image is the sum of.

    The sum is that of the model to the precision of its compute dtype: about 1e-6, relatively, in fp32.

    Args:
        model: a ViR, 1-D or 2-D, bidirectional or not.
        images: normalised pixels.
        classes: whose logit, one for each image.

    Raises:
        ValueError: another model than `check_class_token` asks for.
    """
    check_class_token(model)
    return _logit_contributions(*nnx.split(model), images, classes)


@partial(jax.jit, static_argnums=0)
def _logit_contributions(graph: Any, params: Any, images: Array, classes: Array) -> LogitContributions:
    model = nnx.merge(graph, params)
    grid = layout_of(model, images).grid
    kept = _kept(model, "q", "k", "v", "head_outputs")
    names = ["tokens", *(f"blocks.{layer}.{name}" for layer in range(model.depth) for name in kept)]
    found = model.intermediates(images, [*names, f"blocks.{model.depth - 1}.tokens"])

    norm, head = model.readout.norm, model.readout.head
    read = found[f"blocks.{model.depth - 1}.tokens"][:, -1]
    gain = norm.scale[...] * head.kernel[...].T[classes]
    gain -= gain.mean(axis=-1, keepdims=True)
    direction = gain * jax.lax.rsqrt(jnp.var(read, axis=-1, keepdims=True) + norm.epsilon)
    constant = exact_einsum("c,cb->b", norm.bias[...], head.kernel[...][:, classes]) + head.bias[...][classes]

    retention, retention_bias, mlp = [], [], []
    x = found["tokens"][:, -1:]
    class_token = exact_einsum("bc,bc->b", x[:, 0], direction)
    for layer in range(model.depth):
        block = model.block(layer)
        q, k, v, outputs, *gain = (found[f"blocks.{layer}.{name}"] for name in kept)
        mixer, scaled = block.mixer, retention_scale(block) * direction
        weights = _class_token_weights(model, layer, q, k, grid)
        values = exact_einsum(
            "bnhd,bhd,hdc,bc->bhn", v, _class_token_gain(v, *gain), mixer.out.kernel[...], scaled
        )
        retention.append(weights * values)
        retention_bias.append(exact_einsum("c,bc->b", mixer.out.bias[...], scaled))

        x = block.add_mixed(x, mixer.out(outputs[:, -1:]))
        after = block.add_mlp(x)
        mlp.append(exact_einsum("bc,bc->b", (after - x)[:, 0], direction))
        x = after
    return LogitContributions(
        jnp.stack(retention, axis=1),
        jnp.stack(retention_bias, axis=1),
        jnp.stack(mlp, axis=1),
        class_token,
        constant,
    )


def _kept(model: VisionModel, *names: str) -> list[str]:
    """Return the names of these intermediates of a block's mixer, and last that of its gain if it has one."""
    gain = ("gain",) if "gain" in mixer_of(model).intermediate_names else ()
    return [f"mixer.{name}" for name in (*names, *gain)]


def _class_token_weights(
    model: VisionModel,
    layer: int,
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    grid: tuple[int, int],
) -> Float32[Array, "b h n"]:
    """Return a[h,m] = d^-1/2 (q_cls . k_m) D_h[cls,m]."""
    mixer = model.block(layer).mixer
    scores = q.shape[-1] ** -0.5 * exact_einsum("bhd,bnhd->bhn", q[:, -1], k)
    decay = class_token_decay(mixer, q.shape[1], grid)
    if model.stage.reads_backwards(layer):
        decay = jnp.concatenate([decay[:, :-1][:, ::-1], decay[:, -1:]], axis=1)
    return scores * decay


def _class_token_gain(
    v: Float[Array, "b n h d"], gain: Float32[Array, "b n h d"] | None = None
) -> Float32[Array, "b h d"]:
    """Return what the class token's sums over v are multiplied by, channel by channel."""
    return jnp.ones_like(v[:, -1], jnp.float32) if gain is None else gain[:, -1]
