"""ViR-L/16 on ImageNet-1k, 224 px: the recipe of `vir_b`, parameters split over 8 devices, blocks recomputed.

    python train.py --config=configs/vir_l.py --workdir=runs/vir_l

Cost: 304.4 M parameters, 61.6 G multiply-adds per image. Result: not run on ImageNet.
"""

import ml_collections

from vir_jax.runs.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.name = "vir_l16"
    config.model.drop_path = 0.4  # Ours; the release states S alone.
    config.model.remat = True
    config.mesh.fsdp = 8
    return config
