"""ViR-S/16 on ImageNet-1k, 224 px: the recipe of `vir_b`, drop path 0.2 as the release states for S.

    python train.py --config=configs/vir_s.py --workdir=runs/vir_s

Cost: 22.1 M parameters, 4.6 G multiply-adds per image. Result: not run on ImageNet.
"""

import ml_collections

from vir_jax.runs.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.name = "vir_s16"
    config.model.drop_path = 0.2
    return config
