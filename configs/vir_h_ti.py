"""ViR-H-Ti, a pyramid of convolutions and retention, on ImageNet-1k, 224 px (docs/pyramids.md). Its size is ours.

Schedule and augmentation are those of `imagenet.py`, beside this file, which are also what the same group's MambaVision-T
has of them in its published configuration: LAMB at 5e-3, weight decay 0.05, gradients clipped to norm 5, an average of
0.9998, drop path 0.2; without its self-distillation. Theirs has no LayerScale, nor has this: LAMB moves one of 1e-5
as Adam does, but then it is not theirs. Statistics of batch normalisation are those of the global batch of 4096; theirs
were each GPU's own, of 128 images.

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
