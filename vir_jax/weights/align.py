"""From ViT to ViR: the same skeleton with retention in place of attention, each mixer brought near to its attention.

The shapes of both are the same. Taken over as they are, weights that were learned under a softmax mean something else
in retention; so first each block's mixer learns to give what the attention gave of the same tokens, all blocks side by
side (the first stage of ViT-AdaLA, arXiv 2603.16063). No labels are used. Then one fine-tunes.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging
from flax import nnx
from jaxtyping import Array, Float, Num

from vir_jax.models.layout import Layout
from vir_jax.models.pixels import normalize
from vir_jax.models.stage import Block
from vir_jax.runs.model import ModelFunctions, image_size, model_functions
from vir_jax.runs.state import Params
from vir_jax.weights.errors import WeightsError
from vir_jax.weights.exchange import PretrainedModel, normalisation

LOG_EVERY = 100  # Steps.


def to_vir(vit: PretrainedModel, *, retention: str | None = None) -> PretrainedModel:
    """Return the ViR that has a ViT's weights: the class token comes last, its position embedding added to it.

    Args:
        vit: with softmax attention.
        retention: "1d" or "2d"; None: "1d".

    Raises:
        WeightsError: another model.
    """
    options = vit.card.model
    name, mixer = options["name"], options.get("mixer")
    if not name.startswith("vit_") or mixer not in (None, "softmax"):
        raise WeightsError(
            f"expected a vit_* with softmax attention; got {name} with the mixer {mixer or 'of its family'}"
        )
    model = {**options, "name": name.replace("vit_", "vir_", 1), "mixer": "retention", "retention": retention}
    functions = model_functions(model, vit.card.num_classes)
    stem = dict(vit.params["stem"])
    stem["class_token"] = stem["class_token"] + stem.pop("class_position_embedding")
    card = dataclasses.replace(vit.card, model=model, score={}, scored_on={}, trained={})
    return PretrainedModel(card, functions, {**vit.params, "stem": stem})


def align(
    vit: PretrainedModel,
    vir: PretrainedModel,
    batches: Iterator[Mapping[str, Any]],
    *,
    steps: int,
    learning_rate: float = 1e-3,
) -> PretrainedModel:
    """Return a ViR whose mixers give, block by block, nearly what a ViT's attention gives of the same tokens.

    The loss is the squared difference of a block's outputs over their square, mean over blocks. AdamW without weight
    decay; the learning rate rises over a tenth of the steps and falls to 0 along a cosine.

    Args:
        vit: that is learned from.
        vir: of `to_vir`; its mixers alone are trained.
        batches: with uint8 images under "image".
        steps: a batch each.
        learning_rate: the highest.

    Raises:
        WeightsError: the images' normalisation is not known.
    """
    mean, std = normalisation(vit.card)
    size = image_size(vit.card.model)
    layouts = vit.functions.abstract.layout(size), vir.functions.abstract.layout(size)
    optimizer = optax.adamw(
        optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(steps // 10, 1), max(steps, 2)),
        weight_decay=0.0,
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(mixers: Params, state: Any, images: Num[Array, "b H W 3"]) -> tuple[Params, Any, Array]:
        tokens = block_inputs(vit, normalize(images, mean, std))
        wanted = class_token_last(mixed(vit.functions, vit.params["stage"]["blocks"], tokens, layouts[0]))
        tokens = class_token_last(tokens)

        def loss(mixers: Params) -> Float[Array, ""]:
            blocks = {**vir.params["stage"]["blocks"], "mixer": mixers}
            return relative_error(mixed(vir.functions, blocks, tokens, layouts[1]), wanted)

        value, gradients = jax.value_and_grad(loss)(mixers)
        updates, state = optimizer.update(gradients, state, mixers)
        return optax.apply_updates(mixers, updates), state, value

    mixers = jax.tree.map(jnp.array, vir.params["stage"]["blocks"]["mixer"])
    state = optimizer.init(mixers)
    for number in range(1, steps + 1):
        mixers, state, value = step(mixers, state, jnp.asarray(next(batches)["image"]))
        if number % LOG_EVERY == 0 or number in (1, steps):
            logging.info("alignment, step %d of %d: relative squared error %.4f", number, steps, float(value))
    stage = {**vir.params["stage"], "blocks": {**vir.params["stage"]["blocks"], "mixer": mixers}}
    return dataclasses.replace(vir, params={**vir.params, "stage": stage})


def block_inputs(vit: PretrainedModel, images: Float[Array, "b H W 3"]) -> Float[Array, "l b n c"]:
    """Return what each block reads."""
    depth = vit.functions.abstract.depth
    names = ["tokens", *(f"blocks.{i}.tokens" for i in range(depth - 1))]
    found = vit.functions.model(vit.params).intermediates(images, names)
    return jnp.stack([found[name] for name in names])


def mixed(
    functions: ModelFunctions, blocks: Params, tokens: Float[Array, "l b n c"], layout: Layout
) -> Float[Array, "l b n c"]:
    """Return what the mixer of each block gives of its tokens, normalised as the block does.

    Args:
        functions: of the model.
        blocks: its parameters of all blocks.
        tokens: by block.
        layout: where they stand.
    """
    graph: nnx.GraphDef[Block] = nnx.graphdef(functions.abstract.stage.blocks)

    def of(params: Params, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        block = nnx.merge(graph, params)
        return block.mixer(block.norm1(x), layout)[0]

    return jax.vmap(of)(blocks, tokens)


def class_token_last(tokens: Float[Array, "l b n c"]) -> Float[Array, "l b n c"]:
    """Return tokens whose first one was moved behind the others."""
    return jnp.roll(tokens, -1, axis=2)


def relative_error(actual: Float[Array, "l b n c"], wanted: Float[Array, "l b n c"]) -> Float[Array, ""]:
    """Return the squared difference over the square of what is wanted, mean over blocks."""
    axes = (1, 2, 3)
    return jnp.mean(jnp.sum((actual - wanted) ** 2, axes) / jnp.sum(wanted**2, axes))
