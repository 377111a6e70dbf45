"""ViR that draws CIFAR-10's images, pixel by pixel (32 x 32 RGB pixels, 1,024 tokens).

    python -m vir_jax.data.prepare --dataset=cifar10
    python train.py --config=configs/vir_cifar10_pixels.py --workdir=runs/vir_cifar10_pixels
    python train.py --config=configs/vir_cifar10_pixels.py:mixer=causal_softmax --workdir=runs/vit_cifar10_pixels
    python generate.py --workdir=runs/vir_cifar10_pixels --num=16 --prompt=7 --rows=16 --out=completed.png

Arguments: `mixer`, by default retention, ViT's twin being causal_softmax; `epochs`, by default 1.

Cost: 275,236 parameters, 747.9 M multiply-adds per image, 1 epochs: not measured. Result: not run. What was run is
benchmarks/grids/cifar10_pixels.py, the same with batches of 16 for 26 minutes of one CPU core: 3.638 bits/dim after
0.85 epochs, its twin 3.957 after 0.22 (one run each, seed 0, the first 2,000 test images). Bits per dimension are those
of the images as the data set stores them: of a copy in JPEG they say nothing of the original.
"""

import ml_collections

from vir_jax.runs.config import default_config, parse_arguments


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
    arguments = parse_arguments(argument, mixer="retention", epochs=1.0)
    config = default_config()
    config.task = "pixels"
    config.epochs = arguments.epochs  # 1,562.5 steps each.
    config.batch_size = 32
    config.ema_decay = 0.999

    config.model.name = "vir_pico1"
    config.model.image_size = (32, 32)
    config.model.mixer = arguments.mixer
    config.model.stem = "pixels"
    config.model.levels = 256
    config.model.channels = 3
    config.model.mixtures = 10
    config.model.local_context = 2
    config.model.layer_scale = None  # From 1e-5 the blocks would need hundreds of steps to be heard.
    config.model.dtype = "float32"  # Many CPUs compute bfloat16 in float32, and slower.

    config.data.dataset = "cifar10"
    config.data.train_split = "train"
    config.data.eval_split = "test"
    config.data.threads = 2

    config.optim.name = "adamw"
    config.optim.lr = 2e-3
    config.optim.warmup_lr = 1e-6
    config.optim.final_lr = 1e-5
    config.optim.warmup_epochs = 0.1
    config.optim.weight_decay = 0.05
    config.optim.b1 = 0.9
    config.optim.b2 = 0.95
    config.optim.clip_norm = 1.0

    config.log_every = 50
    config.eval_every = 300
    config.eval_batch_size = 100
    config.checkpoint_every = 300
    return config
