"""Every test sees eight simulated CPU devices, so that sharded code is tested as it runs on a pod."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
