"""ViR-B/16 on ImageNet-1k, 224 px: schedule and augmentation of the paper's reviewer release.

Ours are the optimiser, LAMB at a total batch of 4096: the release defaults to AdamW at 128 per device, but its learning
rate is what the same group uses with LAMB at 4096; which one the paper used is not known. The release states a
drop path of 0.2 for S; that B takes it too is ours.

    python train.py --config=configs/vir_b.py --workdir=runs/vir_b

Cost: 86.6 M parameters, 17.6 G multiply-adds per image. Result: not run on ImageNet.
"""

import ml_collections

from vir_jax.runs.config import default_config


def get_config() -> ml_collections.ConfigDict:
    return default_config()
