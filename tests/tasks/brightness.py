"""A task in one file: how bright an image is on average. Its figure is an error, so the lowest is the best."""

import jax.numpy as jnp
import numpy as np

from vir_jax.tasks import Task


class Brightness(Task):
    best = "error"
    higher_is_better = False
    num_outputs = 1

    def training_inputs(self, batch, key):
        return self.inputs(batch), self.brightness(batch)

    def loss(self, outputs, targets):
        return jnp.mean(jnp.square(outputs[:, 0] - targets)), {}

    def evaluate(self, outputs, batch):
        return {"squared": jnp.square(outputs[:, 0] - self.brightness(batch))}

    def metrics(self, means):
        return {"error": float(np.sqrt(means["squared"]))}

    @staticmethod
    def brightness(batch):
        return jnp.mean(batch["image"] / 255.0, axis=(1, 2, 3))
