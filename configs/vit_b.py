"""ViT-B/16 on ImageNet-1k, 224 px: the baseline, with the very recipe of `vir_b`. ViT has no LayerScale.

    python train.py --config=configs/vit_b.py --workdir=runs/vit_b

Cost: 86,567,656 parameters, 17.6 G multiply-adds per image, 320 epochs. Result: not run on ImageNet.
"""

import ml_collections

from vir_jax.runs.config import load_beside, parse_arguments

imagenet = load_beside(__file__, "imagenet")


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
    parse_arguments(argument)  # None are known.
    config = imagenet.imagenet_config()
    config.model.name = "vit_b16"
    config.model.layer_scale = None
    config.model.drop_path_rate = 0.2
    return config
