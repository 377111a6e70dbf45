"""A pyramid of convolutions and retention on CIFAR-10 (32 x 32 pixels), small enough for two CPU cores. It is all ours.

    python -m vir_jax.data.prepare --dataset=cifar10
    python train.py --config=configs/vir_h_cifar10.py --workdir=runs/vir_h_cifar10
    python train.py --config=configs/vir_h_cifar10.py:model=vir_h_micro,epochs=30 --workdir=runs/vir_h_micro

Arguments: `model`, a name of vir_jax.models.pyramid_variants, by default vir_h_nano, which has no more parameters than
vir_pico4; `epochs`, by default 12, which take as long as 8 of vir_pico4; `stem_stride`, 1, 2 or 4, by default 2.

At a `stem_stride` of 2 the stages have 16 x 16, 8 x 8, 4 x 4 and 2 x 2 tokens; at 4 the last one would have a single
token. Schedule, optimiser and augmentation are those of `vir_cifar10.py`, beside this file, so that the models can be
compared. Batch normalisation sees the 16 images of a slice at a time.

Cost: 196,054 parameters, 4.0 M multiply-adds per image, 12 epochs: a quarter of an hour of one CPU core. Result: 72.9 %
top-1, the mean of three seeds; vir_pico4, in as many seconds, 61.9 %; vit_pico4, in more, 61.8 %.
`model=vir_h_micro,epochs=30`: 495,994 parameters, half an hour of one core; 81.6 %, of three seeds (docs/results.md).
"""

import ml_collections

from vir_jax.runs.config import load_beside, parse_arguments

vir_cifar10 = load_beside(__file__, "vir_cifar10")


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
    arguments = parse_arguments(argument, model="vir_h_nano", epochs=12.0, stem_stride=2)
    config = vir_cifar10.get_config(f"epochs={arguments.epochs}")
    config.model.name = arguments.model
    config.model.stem_stride = arguments.stem_stride
    config.model.position = "none"  # Convolutions know where the border is.
    config.model.layer_scale = None
    return config
