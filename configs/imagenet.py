"""What the ImageNet recipes share: schedule and augmentation of the paper's reviewer release. Not a recipe by itself.

Ours are the optimiser, LAMB at a total batch of 4096: the release defaults to AdamW at 128 per device, but its learning
rate is what the same group uses with LAMB at 4096; which one the paper used is not known.
"""

import ml_collections

from vir_jax.runs.config import default_config


def imagenet_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.epochs = 310.0  # 312.8 steps each at this batch size.
    config.batch_size = 4096
    config.label_smoothing = 0.1
    config.ema_decay = 0.9998

    config.model.image_size = (224, 224)
    config.model.dtype = "bfloat16"

    config.data.dataset = "imagenet2012"
    config.data.train_split = "train"
    config.data.eval_split = "validation"
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.data.crop_fraction = 0.875

    # The release names a colour jitter of 0.4, too, which its loader drops as RandAugment is on.
    config.augment.crop = "resized"
    config.augment.crop_scale = (0.08, 1.0)
    config.augment.crop_ratio = (3 / 4, 4 / 3)
    config.augment.interpolation = "random"
    config.augment.hflip = 0.5
    config.augment.randaugment_ops = 2
    config.augment.randaugment_magnitude = 9.0
    config.augment.randaugment_std = 0.5
    config.augment.erase = 0.25
    config.mixing.mixup_alpha = 0.8
    config.mixing.cutmix_alpha = 1.0
    config.mixing.switch_probability = 0.5

    config.optim.name = "lamb"
    config.optim.lr = 5e-3
    config.optim.warmup_lr = 1e-6
    config.optim.final_lr = 5e-6
    config.optim.warmup_epochs = 20.0
    config.optim.cooldown_epochs = 10.0
    config.optim.weight_decay = 0.05
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    config.optim.clip_norm = 5.0

    config.log_every = 100
    config.eval_every = 1500  # Five epochs, all but; an evaluation takes 1 % of an epoch.
    config.eval_batch_size = 1024
    config.checkpoint_every = 1000
    return config
