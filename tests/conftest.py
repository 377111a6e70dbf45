"""Every test sees eight simulated CPU devices, so that sharded code is tested as it runs on a pod.

Most of a test's time is compilation, which this halves by leaving machine code unoptimised. The command-line
tests start processes without the flag: there the code runs as a user's does.
"""

import os

import jax
import pytest

from vir_jax.training.config import default_config

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def digits_config():
    """A run of 23 steps on digits with everything on that randomness or state can hide in."""
    config = default_config()
    config.epochs, config.optim.warmup_epochs, config.optim.cooldown_epochs = 0.9, 0.1, 0.1
    config.batch_size = config.eval_batch_size = 64
    config.accumulation_steps = 2
    config.ema_decay = 0.9
    config.model.name, config.model.image_size, config.model.dtype = "vir_mu4", (8, 8), "float32"
    config.model.drop_path = 0.2
    config.data.dataset, config.data.eval_split, config.data.threads = "digits", "test", 2
    config.data.crop_fraction = 1.0
    config.augment.crop, config.augment.crop_padding = "pad", 1
    config.optim.name, config.optim.lr = "adamw", 1e-3
    config.log_every, config.checkpoint_every = 4, 5
    return config
