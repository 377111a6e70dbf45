"""ViT-B/16 on ImageNet-1k, 224 px: the baseline, with the very recipe of `vir_b`.

    python train.py --config=configs/vit_b.py --workdir=runs/vit_b

Cost: 86.6 M parameters, 17.6 G multiply-adds per image. Result: not run on ImageNet.
"""

import ml_collections

from vir_jax.runs.config import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.model.name = "vit_b16"
    return config
