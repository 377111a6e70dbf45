"""A perceptron over the tokens instead of attention: MLP-Mixer (arXiv 2105.01601), as in Vision X-formers."""

import math

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vir_jax.models.layers import gelu, linear_init
from vir_jax.models.layout import Layout
from vir_jax.models.linear import Linear
from vir_jax.models.mixers.mixer import Mixer, State, register
from vir_jax.models.options import check_positive


@register("mlp_mixer")
class MLPMixer(Mixer):
    """U_2 gelu(U_1 X) along the tokens, the same for every channel: no heads, and no class token to read.

    Its weights belong to places in the image, so that it reads images of one size alone, and needs no positions.

    Args:
        dim: channels.
        heads: it has none.
        layout: of the image size that the model is made for, the only one that it reads.
        token_hidden: hidden units. None: as many as tokens, as in Vision X-formers.
        dtype: of the computation.
        rngs: of the parameters.
    """

    takes_class_token = False
    reads_any_length = False

    def __init__(
        self,
        dim: int,
        heads: int,
        layout: Layout,
        *,
        token_hidden: int | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        hidden = layout.length if token_hidden is None else token_hidden
        check_positive("token_hidden", hidden)
        self.dim, self.grid = dim, layout.grid
        self.up = Linear(
            layout.length,
            hidden,
            dtype=dtype,
            kernel_init=linear_init,
            kernel_metadata={"axes": ("embed", "hidden")},
            bias_metadata={"axes": ("hidden",)},
            rngs=rngs,
        )
        self.down = Linear(
            hidden,
            layout.length,
            dtype=dtype,
            kernel_init=linear_init,
            kernel_metadata={"axes": ("hidden", "embed")},
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, "b n c"],
        layout: Layout,
        *,
        mode: str = "auto",
        state: State | None = None,
        return_state: bool = False,
    ) -> tuple[Float[Array, "b n c"], None, dict[str, Array]]:
        """Mix the tokens of each channel; see `Mixer.__call__`.

        Raises:
            ValueError: an image of another size.
        """
        self.check_call(mode, state, return_state)
        if layout.grid != self.grid:
            raise ValueError(
                f"mlp_mixer was made for images of {self.grid} patches, got {layout.grid}: its weights belong to "
                "places in the image. Resize the images, or make the model for this image_size and train it anew."
            )
        hidden = checkpoint_name(self.up(jnp.swapaxes(x, 1, 2)), "hidden")
        mixed = checkpoint_name(self.down(gelu(hidden)), "mixed")
        return jnp.swapaxes(mixed, 1, 2), None, {}

    def multiply_adds(self, layout: Layout, mode: str) -> int:
        """Count the two layers."""
        self.check_call(mode, None, False)
        return 2 * layout.length * math.prod(self.up.out_features) * self.dim
