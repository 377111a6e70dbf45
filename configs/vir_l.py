"""ViR-L/16 on ImageNet-1k, 224 px: the recipe of `vir_b`, parameters split over 8 devices, blocks recomputed.

    python train.py --config=configs/vir_l.py --workdir=runs/vir_l

Cost: 304,374,760 parameters, 61.6 G multiply-adds per image, 320 epochs. Result: not run on ImageNet.
"""

import ml_collections

from vir_jax.runs.config import load_beside, parse_arguments

imagenet = load_beside(__file__, "imagenet")


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
    parse_arguments(argument)  # None are known.
    config = imagenet.imagenet_config()
    config.model.name = "vir_l16"
    config.model.layer_scale = 1e-5
    config.model.drop_path_rate = 0.4  # Ours; the release states S alone.
    config.model.remat = "full"
    config.mesh.fsdp = 8
    return config
