"""ViR on CIFAR-10 (32 x 32 pixels, 64 tokens), small enough to train on two CPU cores.

    python -m vir_jax.data.prepare --dataset=cifar10
    python train.py --config=configs/vir_cifar10.py --workdir=runs/vir_cifar10
    python train.py --config=configs/vir_cifar10.py:model=vit_mu4 --workdir=runs/vit_cifar10

Arguments: `model`, any name of vir_jax.models; `epochs`.

Cost: 15 minutes on two CPU cores for 8 epochs. Result: 57.2 % top-1; vit_mu4 62.3 % in 15 minutes, 8 epochs (one run
each, seed 0).
"""

import ml_collections

from vir_jax.runs.config import default_config, parse_arguments


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
    arguments = parse_arguments(argument, model="vir_mu4", epochs=10.0)
    config = default_config()
    config.epochs = arguments.epochs
    config.batch_size = 128
    config.ema_decay = 0.999

    config.model.name = arguments.model
    config.model.image_size = (32, 32)
    config.model.drop_path = 0.0
    config.model.dtype = "float32"  # CPUs compute bfloat16 in float32, and slower.

    config.data.dataset = "cifar10"
    config.data.eval_split = "test"
    config.data.threads = 2
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2470, 0.2435, 0.2616)
    config.data.crop_fraction = 1.0

    # A run this short underfits: shifts and flips alone.
    config.augment.crop = "pad"
    config.augment.randaugment_ops = 0
    config.augment.color_jitter = 0.0
    config.augment.erase = 0.0
    config.mixing.mixup = 0.0
    config.mixing.cutmix = 0.0

    config.optim.name = "adamw"
    config.optim.lr = 2e-3
    config.optim.warmup_epochs = 1.0
    config.optim.cooldown_epochs = 0.0

    config.eval_every = 0
    config.eval_batch_size = 500
    return config
