"""ViR-B/16 on ImageNet-1k, 224 px: the schedule and augmentation of `imagenet.py`, beside this file.

The release states a drop path of 0.2 for S; that B takes it too is ours.

    python train.py --config=configs/vir_b.py --workdir=runs/vir_b

Cost: 86,585,320 parameters, 17.6 G multiply-adds per image, 320 epochs. Result: not run on ImageNet.
"""

import ml_collections

from vir_jax.runs.config import load_beside, parse_arguments

imagenet = load_beside(__file__, "imagenet")


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
    parse_arguments(argument)  # None are known.
    config = imagenet.imagenet_config()
    config.model.name = "vir_b16"
    config.model.layer_scale = 1e-5
    config.model.drop_path_rate = 0.2
    return config
