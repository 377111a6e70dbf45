"""ViR-S/16 on ImageNet-1k, 224 px: the recipe of `vir_b`, drop path 0.2 as the release states for S.

    python train.py --config=configs/vir_s.py --workdir=runs/vir_s

Cost: 22,059,496 parameters, 4.6 G multiply-adds per image, 320 epochs. Result: not run on ImageNet.
"""

import ml_collections

from vir_jax.runs.config import load_beside, parse_arguments

imagenet = load_beside(__file__, "imagenet")


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
    parse_arguments(argument)  # None are known.
    config = imagenet.imagenet_config()
    config.model.name = "vir_s16"
    config.model.layer_scale = 1e-5
    config.model.drop_path_rate = 0.2
    return config
