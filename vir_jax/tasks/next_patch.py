"""Next patch: each patch of an image predicted from those before it, as pretraining without labels."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float, Key

from vir_jax.models.mixers import mixer_type
from vir_jax.models.pixels import cut_patches
from vir_jax.models.variants import FAMILIES, parse_name
from vir_jax.tasks.task import Batch, Task

# Added to the variance of a patch, so that an even one is all zero.
EPSILON = 1e-6


class NextPatch(Task):
    """The squared error of the next patch's pixels, each patch brought to mean 0 and variance 1.

    After AIM (arXiv 2401.08541), without its prefix of patches that see each other, which no recurrent form has. The
    model is one of patches whose head reads every token (`readout="every_token"`). Its stem and blocks are those of a
    classifier, which may start from them by `config.init_from`. The first patch is not predicted.
    """

    best = "squared_error"
    higher_is_better = False

    def __init__(self, config: ml_collections.ConfigDict, class_names: Sequence[str]) -> None:
        super().__init__(config, class_names)
        model = config.model
        self._channels = model.channels or 3
        name, _, self._patch = parse_name(model.name)
        family = FAMILIES[name]
        stem, mixer = model.stem or family.stem, model.mixer or family.mixer
        causal = mixer_type(mixer).causal
        for field, value, valid, expected in (
            ("stem", stem, stem == "linear", "'linear': convolutions see the next patch"),
            ("readout", model.readout, model.readout == "every_token", "'every_token'"),
            ("mixer", mixer, causal, "a causal one, such as 'retention': others see the next patch"),
            ("bidirectional", True, not model.bidirectional, "False: the second pass sees the next patch"),
            ("flips", True, not model.flips, "False: what reads backwards sees the next patch"),
            (
                "directions",
                model.directions,
                model.directions in (None, 1),
                "1: what reads backwards sees the next patch",
            ),
        ):
            if not valid:
                raise ValueError(
                    f"config.model.{field} is {value!r}; expected {expected}, for the task 'next_patch'"
                )

    @property
    def num_outputs(self) -> int:
        """The numbers of a patch."""
        return self._channels * self._patch**2

    def training_inputs(
        self, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, "b y x channels"], Float[Array, "b n pixels"]]:
        """Return the images, and their patches."""
        images = self.inputs(batch)
        return images, normalized_patches(images, self._patch)

    def loss(
        self, outputs: Float[Array, "b n pixels"], targets: Float[Array, "b n pixels"]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Return the squared error, a mean over the numbers of all patches but the first."""
        error = jnp.mean(squared_error(outputs, targets))
        return error, {self.best: error}

    def evaluate(self, outputs: Float[Array, "b n pixels"], batch: Batch) -> dict[str, Array]:
        """Return the squared error of each image."""
        return {self.best: squared_error(outputs, normalized_patches(self.inputs(batch), self._patch))}

    def columns(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Return the metrics as text."""
        return {"squared error": f"{metrics[self.best]:.4f}"}


def normalized_patches(images: Float[Array, "b y x channels"], patch: int) -> Float[Array, "b n pixels"]:
    """Return the pixels of each patch in raster order, less their mean and over their standard deviation."""
    cut = cut_patches(images, patch)
    patches = cut.reshape(cut.shape[0], -1, cut.shape[-1])
    centred = patches - jnp.mean(patches, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + EPSILON)


def squared_error(
    outputs: Float[Array, "b n pixels"], targets: Float[Array, "b n pixels"]
) -> Float[Array, " b"]:
    """Return the mean square of what each token's output lacks of the next patch."""
    return jnp.mean(jnp.square(outputs[:, :-1] - targets[:, 1:]), axis=(1, 2))
