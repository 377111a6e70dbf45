"""Hugging Face's ViT (transformers, `ViTForImageClassification`): vit_* in and out.

Two sets of names: those of the files, `encoder.layer.0.attention.attention.query`, and since version 5 those of the
modules, `layers.0.attention.q_proj`, which `state_dict()` shows; version 5 writes the first set, too, and reads both.
Each comes with `vit.` before all but the head, or, of a `ViTModel`, without.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from vir_jax.models.layers import LAYER_NORM_EPSILON
from vir_jax.models.variants import parse_name
from vir_jax.weights.card import Card
from vir_jax.weights.errors import WeightsError
from vir_jax.weights.files import CONFIG, PREPROCESSOR, Json
from vir_jax.weights.fitting import bicubic_of_torch
from vir_jax.weights.layouts.layout import (
    WeightLayout,
    channels_of,
    check_plain_vit,
    image_size_from_shapes,
    label_names,
    name_from_shapes,
    refuse,
    size_of,
)
from vir_jax.weights.rules import (
    Rule,
    Shapes,
    convolution,
    heads_in,
    heads_out,
    linear,
    norm,
    of_blocks,
    positions,
    same,
)

EPSILON = 1e-12  # transformers' default.
KERNEL, HEAD = "embeddings.patch_embeddings.projection.weight", "classifier.weight"
POSITION = "embeddings.position_embeddings"
OURS = "stage.blocks.{i}."
# Of the pooler after the encoder, which no classifier has, and of masked image modelling.
_UNUSED = ("pooler.dense.weight", "pooler.dense.bias", "embeddings.mask_token")


@dataclasses.dataclass(frozen=True)
class _Names:
    """What the parts of a block are called."""

    block: str
    heads: tuple[str, str, str]
    out: str
    up: str
    down: str


_OF_FILES = _Names(
    block="encoder.layer.{i}.",
    heads=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    out="attention.output.dense",
    up="intermediate.dense",
    down="output.dense",
)
_OF_MODULES = _Names(
    block="layers.{i}.",
    heads=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    out="attention.o_proj",
    up="mlp.fc1",
    down="mlp.fc2",
)


class HuggingFace(WeightLayout):
    """`transformers.ViTForImageClassification`, or its `ViTModel` without a head."""

    name = "hf"

    def is_of(self, names: Collection[str]) -> bool:
        """Return whether there is a patch embedding of that name."""
        return any(name.endswith(KERNEL) for name in names)

    def kernel(self, names: Collection[str]) -> str:
        """Return the patch embedding's kernel."""
        return _prefix(names) + KERNEL

    def ignored(self, names: Collection[str]) -> list[str]:
        """Return the pooler's tensors, and the token that stands for what is masked."""
        return [_prefix(names) + name for name in _UNUSED if _prefix(names) + name in names]

    def resampling(self, size: int, new_size: int) -> np.ndarray:
        """Return PyTorch's bicubic interpolation, not antialiased, as `interpolate_pos_encoding` has it."""
        return bicubic_of_torch(size, new_size)

    def card(self, shapes: Shapes, beside: Mapping[str, Json], *, where: str) -> Card:
        """Return the card of a transformers model."""
        config, data = beside.get(CONFIG, {}), beside.get(PREPROCESSOR, {})
        refuse(where, config, {"model_type": "vit", "hidden_act": "gelu", "qkv_bias": True})
        prefix = _prefix(shapes)
        for needed in (KERNEL, POSITION):
            if prefix + needed not in shapes:
                raise WeightsError(f"{where} has no {prefix}{needed}, and is no ViT of transformers'")
        start, _, end = (prefix + _names(shapes).block).partition("{i}")
        depth = len({name.removeprefix(start).split(end)[0] for name in shapes if name.startswith(start)})
        name, patch = name_from_shapes(
            "vit",
            kernel=shapes[prefix + KERNEL],
            depth=depth,
            heads=config.get("num_attention_heads"),
            where=where,
        )
        classes = shapes[HEAD][0] if HEAD in shapes else 0
        labels = label_names(config.get("id2label"))
        if not labels or len(labels) != classes or labels == tuple(f"LABEL_{i}" for i in range(classes)):
            labels = None
        return Card(
            model={
                "name": name,
                "image_size": image_size_from_shapes(
                    shapes[prefix + POSITION][1] - 1, patch, said=config.get("image_size"), where=where
                ),
                "readout": "class_token",
                "layer_scale": None,
                "norm_epsilon": config.get("layer_norm_eps", EPSILON),
            },
            num_classes=classes,
            class_names=labels,
            mean=tuple(data["image_mean"]) if "image_mean" in data else None,
            std=tuple(data["image_std"]) if "image_std" in data else None,
            crop_fraction=1.0 if data else None,  # The whole image is resized.
        )

    def config(self, card: Card) -> dict[str, Json]:
        """Return the configuration, and the preprocessor's where the colours are known."""
        check_plain_vit(card, self.name)
        if card.model["readout"] != "class_token" or card.model["layer_scale"] is not None:
            raise WeightsError(
                "the layout 'hf' has neither an average readout nor LayerScale; --layout=timm has both"
            )
        size, _ = size_of(card)
        _, _, patch = parse_name(card.model["name"])
        config: dict[str, Any] = {
            "architectures": ["ViTForImageClassification"],
            "model_type": "vit",
            "hidden_size": size.dim,
            "num_hidden_layers": size.depth,
            "num_attention_heads": size.heads,
            "intermediate_size": 4 * size.dim,
            "image_size": card.model["image_size"],
            "patch_size": patch,
            "num_channels": channels_of(card),
            "hidden_act": "gelu",
            "qkv_bias": True,
            "layer_norm_eps": card.model.get("norm_epsilon", LAYER_NORM_EPSILON),
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
        names = card.class_names or [f"LABEL_{i}" for i in range(card.num_classes)]
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
        if card.mean is None or card.std is None:
            return {CONFIG: config}
        side = card.model["image_size"]
        height, width = (side, side) if isinstance(side, int) else side
        preprocessor = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": height, "width": width},
            "resample": 3,  # Bicubic.
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(card.mean),
            "image_std": list(card.std),
        }
        return {CONFIG: config, PREPROCESSOR: preprocessor}

    def rules(self, card: Card, shapes: Shapes | None = None) -> list[Rule]:
        """Return the rules, with the names that `shapes` show, or those of the files."""
        size, grid = size_of(card)
        prefix, names = (_prefix(shapes), _names(shapes)) if shapes is not None else ("vit.", _OF_FILES)
        block = prefix + names.block
        rules = [
            *convolution("stem.embedding.conv", f"{prefix}embeddings.patch_embeddings.projection"),
            same("stem.class_token", f"{prefix}embeddings.cls_token"),
            positions(f"{prefix}{POSITION}", grid, class_token=True),
            *of_blocks(
                [
                    *norm(f"{OURS}norm1", f"{block}layernorm_before"),
                    *heads_in(f"{OURS}mixer.qkv", [block + name for name in names.heads], size.heads),
                    *heads_out(f"{OURS}mixer.out", block + names.out, size.heads),
                    *norm(f"{OURS}norm2", f"{block}layernorm_after"),
                    *linear(f"{OURS}mlp.up", block + names.up),
                    *linear(f"{OURS}mlp.down", block + names.down),
                ],
                size.depth,
            ),
            *norm("readout.norm", f"{prefix}layernorm"),
        ]
        return (
            rules
            if shapes is not None and HEAD not in shapes
            else rules + linear("readout.head", "classifier")
        )


def _prefix(names: Collection[str]) -> str:
    return "vit." if f"vit.{KERNEL}" in names else ""


def _names(names: Collection[str]) -> _Names:
    """Return the set of names that a file uses."""
    return _OF_FILES if any(".layer." in f".{name}" for name in names) else _OF_MODULES
