"""ViR on scikit-learn's handwritten digits (8 x 8 pixels, 16 patches): the whole pipeline on a laptop.

    python train.py --config=configs/vir_digits.py --workdir=runs/vir_digits

Cost: 203,146 parameters, 3.5 M multiply-adds per image, 45 epochs in 47 s on two CPU cores, from start to end. Result:
97.5 % top-1 (one run, seed 0). Both measured with an evaluation at the end alone.
"""

import ml_collections

from vir_jax.runs.config import default_config, parse_arguments


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
    parse_arguments(argument)  # None are known.
    config = default_config()
    config.epochs = 45.0  # 11.3 steps each.
    config.batch_size = 128
    config.label_smoothing = 0.1
    config.ema_decay = 0.99

    config.model.name = "vir_pico2"
    config.model.image_size = (8, 8)
    config.model.layer_scale = 1e-5
    config.model.dtype = "float32"  # Many CPUs compute bfloat16 in float32, and slower.

    config.data.dataset = "digits"
    config.data.train_split = "train"
    config.data.eval_split = "test"
    config.data.threads = 2
    config.data.mean = (0.5, 0.5, 0.5)
    config.data.std = (0.5, 0.5, 0.5)

    # No shifts or flips: on 8 x 8 pixels a shift by one is a large change, and digits are not symmetric.
    config.mixing.mixup_alpha = 0.4

    config.optim.name = "adamw"
    config.optim.lr = 3e-3
    config.optim.warmup_lr = 1e-6
    config.optim.final_lr = 5e-6
    config.optim.warmup_epochs = 5.0
    config.optim.weight_decay = 0.05
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.clip_norm = 5.0

    config.log_every = 50
    config.eval_every = 100  # Nine epochs.
    config.eval_batch_size = 512
    config.checkpoint_every = 200
    return config
