"""ViR-B/16 on ImageNet-1k, 224 px: the recipe of the paper's reviewer release (LAMB, batch 4096, 320 epochs).

    python train.py --config=configs/vir_b.py --workdir=runs/vir_b

Cost: 86.6 M parameters, 17.6 G multiply-adds per image. Result: not run on ImageNet.
"""

import ml_collections

from vir_jax.training.config import default_config


def get_config() -> ml_collections.ConfigDict:
    return default_config()
