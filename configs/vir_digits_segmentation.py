"""A convolutional ViR on scenes of digits (32 x 32 pixels, 64 patches): a class for each pixel, on a laptop.

    python train.py --config=configs/vir_digits_segmentation.py --workdir=runs/scenes
    python eval.py --workdir=runs/scenes --mode=all
    python predict.py --workdir=runs/scenes --segment=masks image.png

Scenes are composed of scikit-learn's digits as they are asked for; nothing is downloaded. Retention over patches is
causal, so that a stream writes its mask row by row (docs/dense.md). model.directions, flips or bidirectional lets
patches see those below, too.

Cost: 240,880 parameters, 17.3 M multiply-adds per image, 6 epochs. Result: 60.4 +- 0.2 % mIoU,
95.3 % of the pixels right, most of which are background (three runs, the average's weights after the last step). Some
three minutes of one CPU core a run, at 350 images a second.
"""

import ml_collections

from vir_jax.runs.config import default_config, parse_arguments


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
    parse_arguments(argument)  # None are known.
    config = default_config()
    config.task = "segmentation"
    config.epochs = 6.0  # 625 steps each.
    config.batch_size = 16
    config.ema_decay = 0.98

    config.model.name = "cvir_pico4"  # Its stem sees across the borders of patches, half as large as a digit.
    config.model.image_size = (32, 32)
    config.model.readout = "dense_patch"
    config.model.layer_scale = 0.1
    config.model.dtype = "float32"  # Many CPUs compute bfloat16 in float32, and slower.

    config.data.dataset = "digits_scenes"
    config.data.train_split = "train"
    config.data.eval_split = "test"
    config.data.threads = 2
    config.data.mean = (0.5, 0.5, 0.5)
    config.data.std = (0.5, 0.5, 0.5)

    config.optim.name = "adamw"
    config.optim.lr = 2e-3
    config.optim.warmup_lr = 1e-6
    config.optim.final_lr = 5e-6
    config.optim.warmup_epochs = 0.3
    config.optim.weight_decay = 0.05
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.clip_norm = 5.0

    config.log_every = 100
    config.eval_every = 625
    config.eval_batch_size = 250
    config.checkpoint_every = 625
    return config
