"""ViR-Ti/16 on ImageNet-1k, 224 px: the recipe of `vir_b`, with less drop path. The size is ours, after DeiT's.

    python train.py --config=configs/vir_ti.py --workdir=runs/vir_ti

Cost: 5,721,832 parameters, 1.3 G multiply-adds per image, 320 epochs. Result: not run on ImageNet.
"""

import ml_collections

from vir_jax.runs.config import load_beside, parse_arguments

imagenet = load_beside(__file__, "imagenet")


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
    parse_arguments(argument)  # None are known.
    config = imagenet.imagenet_config()
    config.model.name = "vir_ti16"
    config.model.layer_scale = 1e-5
    config.model.drop_path_rate = 0.1
    return config
