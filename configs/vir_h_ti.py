"""ViR-H-Ti, a pyramid of convolutions and retention, on ImageNet-1k, 224 px (docs/pyramids.md). Its size is ours.

Schedule and augmentation are those of `imagenet.py`, beside this file. What MambaVision-T, of the same group, has of
them in its published configuration is the same: LAMB at 5e-3, weight decay 0.05, gradients clipped to norm 5, an
average of 0.9998, 20 epochs of warm-up, 310 and 10 in all; drop path 0.2, and no LayerScale. Other than there: no
self-distillation, and the statistics of batch normalisation are those of the global batch of 4096 where theirs were
each GPU's, of 128.

    python train.py --config=configs/vir_h_ti.py --workdir=runs/vir_h_ti

Cost: 34,144,328 parameters, 4.9 G multiply-adds per image, 320 epochs. Result: not run on ImageNet.
"""

import ml_collections

from vir_jax.runs.config import load_beside, parse_arguments

imagenet = load_beside(__file__, "imagenet")


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
    parse_arguments(argument)  # None are known.
    config = imagenet.imagenet_config()
    config.model.name = "vir_h_ti"
    config.model.position = "none"  # Convolutions know where the border is.
    config.model.layer_scale = None
    config.model.drop_path_rate = 0.2
    return config
