"""ViR on CIFAR-10 (32 x 32 pixels, 64 tokens), small enough to train on two CPU cores.

    python -m vir_jax.data.prepare --dataset=cifar10
    python train.py --config=configs/vir_cifar10.py --workdir=runs/vir_cifar10
    python train.py --config=configs/vir_cifar10.py:model=vit_pico4 --workdir=runs/vit_cifar10

Arguments: `model`, any name of vir_jax.models, by default vir_pico4; `epochs`, by default 10.

Positions are rotary, of rows and columns. The paper's are learned, `--config.model.position=learned`: so ViR has
60.3 %, ViT 61.5 %.

Cost: 204,426 parameters, 15.1 M multiply-adds per image, 10 epochs: not measured; 8 take a quarter of an hour of one
CPU core. Result, of `epochs=8`, means of three seeds: 61.9 % top-1; vit_pico4 61.8 %; cvir_pico4, as large with
`--config.model.mlp_dim=214`, 72.0 % (docs/results.md).
"""

import ml_collections

from vir_jax.models import parse_name
from vir_jax.runs.config import default_config, parse_arguments


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
    arguments = parse_arguments(argument, model="vir_pico4", epochs=10.0)
    family, *_ = parse_name(arguments.model)

    config = default_config()
    config.epochs = arguments.epochs  # 390.6 steps each.
    config.batch_size = 128
    config.accumulation_steps = (
        8  # 16 images fit the caches of a CPU's core: the same step in 0.6 of the time.
    )
    config.label_smoothing = 0.1
    config.ema_decay = 0.999

    config.model.name = arguments.model
    config.model.image_size = (32, 32)
    # Ours: from the release's 1e-5 the blocks are silent for much of a run this short. ViT has none.
    config.model.layer_scale = None if family == "vit" else 0.1
    # Ours: with learned positions, the paper's, ViR has 1.5 points less, ViT 0.3 (docs/results.md).
    config.model.position = "rope_2d"
    config.model.dtype = "float32"  # Many CPUs compute bfloat16 in float32, and slower.

    config.data.dataset = "cifar10"
    config.data.train_split = "train"
    config.data.eval_split = "test"
    config.data.threads = 2
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2470, 0.2435, 0.2616)

    # A run this short underfits: shifts and flips alone.
    config.augment.crop = "pad"
    config.augment.crop_padding = 4
    config.augment.hflip = 0.5

    config.optim.name = "adamw"
    config.optim.lr = 2e-3
    config.optim.warmup_lr = 1e-6
    config.optim.final_lr = 5e-6
    config.optim.warmup_epochs = 1.0
    config.optim.weight_decay = 0.05
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.clip_norm = 5.0

    config.log_every = 100
    config.eval_every = 800  # Two epochs.
    config.eval_batch_size = 500
    config.checkpoint_every = 1000
    return config
