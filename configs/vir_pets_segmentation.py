"""ViR-S/16 on the Oxford-IIIT pets (TFDS): pet, background and border, a class for each pixel.

    python -m vir_jax.data.prepare --dataset=oxford_iiit_pet
    python train.py --config=configs/vir_pets_segmentation.py --workdir=runs/pets --config.init_from=runs/vir_s

starts from the backbone of a classifier of ImageNet that was trained by configs/vir_s.py; without init_from it starts
from nothing, for which 3,680 images are few. Both passes of a bidirectional model give what the first alone cannot:
--config.model.bidirectional=True takes the weights of a bidirectional classifier.

Cost: 21,993,216 parameters, 6.2 G multiply-adds per image, 40 epochs. Result: not run.
"""

import ml_collections

from vir_jax.runs.config import default_config, parse_arguments


def get_config(argument: str | None = None) -> ml_collections.ConfigDict:
    parse_arguments(argument)  # None are known.
    config = default_config()
    config.task = "segmentation"
    config.epochs = 40.0  # 115 steps each.
    config.batch_size = 32
    config.ema_decay = 0.999

    config.model.name = "vir_s16"
    config.model.image_size = 256
    config.model.readout = "dense_patch"
    config.model.layer_scale = 1e-5
    config.model.drop_path_rate = 0.1
    config.model.dtype = "bfloat16"

    config.data.dataset = "oxford_iiit_pet"
    config.data.train_split = "train"
    config.data.eval_split = "test"
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)

    config.augment.crop = "resized"
    config.augment.crop_scale = (0.3, 1.0)
    config.augment.hflip = 0.5
    config.augment.color_jitter = 0.4

    config.optim.name = "adamw"
    config.optim.lr = 3e-4
    config.optim.warmup_lr = 1e-6
    config.optim.final_lr = 1e-6
    config.optim.warmup_epochs = 2.0
    config.optim.weight_decay = 0.05
    config.optim.layer_decay = 0.75
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.clip_norm = 5.0

    config.log_every = 50
    config.eval_every = 460  # Four epochs.
    config.eval_batch_size = 64
    config.checkpoint_every = 460
    return config
