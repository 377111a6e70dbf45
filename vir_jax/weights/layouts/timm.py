"""timm's ViT (pytorch-image-models, `vision_transformer`): vit_* in and out."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from absl import logging

from vir_jax.models.layers import LAYER_NORM_EPSILON
from vir_jax.models.variants import parse_name
from vir_jax.weights.card import Card
from vir_jax.weights.errors import WeightsError
from vir_jax.weights.files import CONFIG, Json
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

KERNEL, POSITION, HEAD = "patch_embed.proj.weight", "pos_embed", "head.weight"
BLOCK, OURS = "blocks.{i}.", "stage.blocks.{i}."

# What a configuration may say besides sizes, which the tensors show, and what it says where the model is one of ours.
_ARGUMENTS = {
    "class_token": True,
    "qkv_bias": True,
    "qk_norm": False,
    "pre_norm": False,
    "reg_tokens": 0,
    "mlp_ratio": 4,
}
_SIZES = (
    "img_size",
    "patch_size",
    "embed_dim",
    "depth",
    "num_heads",
    "num_classes",
    "in_chans",
    "init_values",
    "no_embed_class",
    "global_pool",
    "drop_path_rate",
    "dynamic_img_size",
    "strict_img_size",
)
_ARCHITECTURES = {192: "tiny", 384: "small", 768: "base", 1024: "large"}


class Timm(WeightLayout):
    """`timm.models.VisionTransformer` with a class token, learned positions and a linear head."""

    name = "timm"
    family, mixer, out = "vit", "attn", "proj"

    def is_of(self, names: Collection[str]) -> bool:
        """Return whether there is a block with fused q, k and v."""
        return {KERNEL, f"blocks.0.{self.mixer}.qkv.weight"} <= set(names)

    def kernel(self, names: Collection[str]) -> str:
        """Return the patch embedding's kernel."""
        return KERNEL

    def card(self, shapes: Shapes, beside: Mapping[str, Json], *, where: str) -> Card:
        """Return the card of a timm model; `config.json` is that of timm's hub."""
        config = beside.get(CONFIG, {})
        data, arguments = config.get("pretrained_cfg", {}), config.get("model_args", {})
        if unknown := sorted(arguments.keys() - _ARGUMENTS.keys() - set(_SIZES)):
            raise WeightsError(f"{where}: model_args has {', '.join(unknown)}, which no model of ours has")
        refuse(where, arguments, _ARGUMENTS)
        for needed in (KERNEL, POSITION):
            if needed not in shapes:
                raise WeightsError(f"{where} has no {needed}, and is no ViT of timm's with learned positions")
        averages = "fc_norm.weight" in shapes
        said = config.get("global_pool", arguments.get("global_pool"))
        if said not in (None, "token", "token_last") and not averages:
            raise WeightsError(
                f"{where}: global_pool is {said!r} after the norm; ours normalises the average (fc_norm)"
            )
        depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
        name, patch = name_from_shapes(
            self.family, kernel=shapes[KERNEL], depth=depth, heads=arguments.get("num_heads"), where=where
        )
        size = data.get("input_size")
        patches = shapes[POSITION][1]
        said_size = tuple(size[1:]) if size else None
        try:
            image_size = image_size_from_shapes(
                patches - self._rows(patches), patch, said=said_size, where=where
            )
        except WeightsError:
            image_size = image_size_from_shapes(patches, patch, said=said_size, where=where)
        classes = shapes[HEAD][0] if HEAD in shapes else 0
        labels = label_names(config.get("label_names", data.get("label_names")))
        return Card(
            model=self._model(name, image_size, shapes, averages),
            num_classes=classes,
            class_names=labels if labels and len(labels) == classes else None,
            mean=tuple(data["mean"]) if "mean" in data else None,
            std=tuple(data["std"]) if "std" in data else None,
            crop_fraction=data.get("crop_pct"),
        )

    def config(self, card: Card) -> dict[str, Json]:
        """Return the `config.json` of timm's hub."""
        self.check(card)
        size, _ = size_of(card)
        _, _, patch = parse_name(card.model["name"])
        side = card.model["image_size"]
        height, width = (side, side) if isinstance(side, int) else side
        averages = card.model["readout"] == "average"
        arguments: dict[str, Any] = {
            "img_size": [height, width],
            "patch_size": patch,
            "embed_dim": size.dim,
            "depth": size.depth,
            "num_heads": size.heads,
            "in_chans": channels_of(card),
            "init_values": card.model["layer_scale"],
            "global_pool": "avg" if averages else "token",
        }
        data = {
            "input_size": [channels_of(card), height, width],
            "num_classes": card.num_classes,
            "mean": card.mean,
            "std": card.std,
            "crop_pct": card.crop_fraction,
            "interpolation": "bicubic",
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        config = {
            "architecture": f"vit_{_ARCHITECTURES.get(size.dim, 'tiny')}_patch16_224",
            "num_classes": card.num_classes,
            "num_features": size.dim,
            "global_pool": arguments["global_pool"],
            "model_args": arguments,
            "pretrained_cfg": {name: value for name, value in data.items() if value is not None},
        }
        if card.class_names is not None:
            config["label_names"] = list(card.class_names)
        return {CONFIG: config}

    def check(self, card: Card) -> None:
        """Check that the layout has a model.

        Raises:
            WeightsError: it has not.
        """
        check_plain_vit(card, self.name)
        if (epsilon := card.model.get("norm_epsilon", LAYER_NORM_EPSILON)) != LAYER_NORM_EPSILON:
            logging.warning(
                "timm's norms add %g to the variance, this model's add %g: its logits will differ a little there",
                LAYER_NORM_EPSILON,
                epsilon,
            )

    def rules(self, card: Card, shapes: Shapes | None = None) -> list[Rule]:
        """Return the rules; in `shapes` there may be no position of the class token, and no head."""
        size, grid = size_of(card)
        rows, cols = grid
        first = self._rows(rows * cols + 1)
        if shapes is not None and POSITION in shapes and shapes[POSITION][1] == rows * cols:
            first = 0
        block = [
            *norm(f"{OURS}norm1", f"{BLOCK}norm1"),
            *heads_in(f"{OURS}mixer.qkv", [f"{BLOCK}{self.mixer}.qkv"], size.heads),
            *heads_out(f"{OURS}mixer.out", f"{BLOCK}{self.mixer}.{self.out}", size.heads),
            *norm(f"{OURS}norm2", f"{BLOCK}norm2"),
            *linear(f"{OURS}mlp.up", f"{BLOCK}mlp.fc1"),
            *linear(f"{OURS}mlp.down", f"{BLOCK}mlp.fc2"),
        ]
        if card.model["layer_scale"] is not None:
            block += [same(f"{OURS}layer_scale{i}.scale", f"{BLOCK}ls{i}.gamma") for i in (1, 2)]
        rules = [
            *convolution("stem.embedding.conv", "patch_embed.proj"),
            same("stem.class_token", "cls_token"),
            positions(POSITION, grid, class_token=bool(first)),
            *of_blocks(block, size.depth),
            *norm("readout.norm", "fc_norm" if card.model["readout"] == "average" else "norm"),
        ]
        if self.family == "vit" and not first:  # no_embed_class: what is added to the class token is nothing.
            rules.append(
                Rule(
                    ("stem.class_position_embedding",),
                    (),
                    lambda _: (),
                    lambda: (np.zeros((1, 1, size.dim), np.float32),),
                )
            )
        return rules if shapes is not None and HEAD not in shapes else rules + linear("readout.head", "head")

    def _rows(self, patches: int) -> int:
        """Return how many of the position embeddings are the class token's, where it has one."""
        return 1

    def _model(
        self, name: str, image_size: int | list[int], shapes: Shapes, averages: bool
    ) -> dict[str, Any]:
        """Return the keywords of `create_model`."""
        return {
            "name": name,
            "image_size": image_size,
            "readout": "average" if averages else "class_token",
            "layer_scale": 1e-5 if "blocks.0.ls1.gamma" in shapes else None,
        }
