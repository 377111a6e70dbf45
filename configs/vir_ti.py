"""ViR-Ti/16 on ImageNet-1k, 224 px: the recipe of `vir_b`, with less drop path. The size is ours, after DeiT's.

    python train.py --config=configs/vir_ti.py --workdir=runs/vir_ti

Cost: 5.7 M parameters, 1.3 G multiply-adds per image. Result: not run on ImageNet.
"""

import ml_collections

from vir_jax.runs.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.name = "vir_ti16"
    config.model.drop_path = 0.1
    return config
