"""How a symbol is drawn from the logarithms of its probabilities: temperature, the most probable ones, random keys."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How each symbol is drawn; by default from the model's own distribution.

    Args:
        temperature: that log-probabilities are divided by; towards 0 the most probable symbol is always drawn.
        top_k: how many of the most probable symbols may be drawn, of equal ones the lower first; None: all.
        top_p: probability, of those that `top_k` leaves, that the fewest symbols which may be drawn have together at
            least; None: 1.
    """

    temperature: int | float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def check(self, levels: int) -> None:
        """Check that symbols of an alphabet of so many can be drawn so.

        Raises:
            ValueError: the option that is wrong.
        """
        for name, valid, expected in (
            (
                "temperature",
                0 < self.temperature < float("inf"),
                "a positive number (top_k=1 takes the most probable)",
            ),
            (
                "top_k",
                self.top_k is None or 1 <= self.top_k <= levels,
                f"1 to {levels}, the levels of the model",
            ),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "a probability in (0, 1]"),
        ):
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {expected}")

    def restrict(self, log_masses: Float[Array, "*n levels"]) -> Float[Array, "*n levels"]:
        """Return log-probabilities, not normalised, of what may be drawn; minus infinity for the rest."""
        logits = log_masses / self.temperature
        if self.top_k is None and self.top_p is None:
            return logits
        order = jnp.argsort(-logits, axis=-1, stable=True)
        ranked = jnp.take_along_axis(logits, order, axis=-1)
        keep = jnp.arange(logits.shape[-1], dtype=jnp.int32) < (self.top_k or logits.shape[-1])
        masses = jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf))
        if self.top_p is not None:
            keep &= jnp.cumsum(masses, axis=-1) - masses < self.top_p
        keep = jnp.broadcast_to(keep, logits.shape)
        rank = jnp.argsort(order, axis=-1, stable=True)
        return jnp.where(jnp.take_along_axis(keep, rank, axis=-1), logits, -jnp.inf)

    def draws(self, image_keys: Key[Array, " b"], number: Int[Array, ""]) -> "PixelDraws":
        """Return what pixel `number` of each image is drawn by.

        The noise depends on the image's key, the pixel and the draw alone: not on what else is drawn, nor when.
        """
        return PixelDraws(self, jax.vmap(lambda key: jax.random.fold_in(key, number))(image_keys))


@dataclasses.dataclass(frozen=True)
class PixelDraws:
    """The `vir_jax.models.likelihood.Draws` of one pixel of each image."""

    sampling: Sampling
    pixel_keys: Key[Array, " b"]

    @property
    def restricted(self) -> bool:
        """Whether it is drawn from another distribution than the model's own."""
        return self.sampling != Sampling()

    def symbol(self, log_masses: Float[Array, "b levels"], number: int) -> Int[Array, " b"]:
        """Return the symbol whose log-probability is the highest with Gumbel noise."""

        def noise(key: Key[Array, ""]) -> Float[Array, " levels"]:
            return jax.random.gumbel(jax.random.fold_in(key, number), log_masses.shape[-1:], jnp.float32)

        perturbed = self.sampling.restrict(log_masses) + jax.vmap(noise)(self.pixel_keys)
        return jax.lax.argmax(perturbed, axis=perturbed.ndim - 1, index_dtype=jnp.int32)

    def logistic(self, number: int) -> Float[Array, " b"]:
        """Return numbers of the standard logistic distribution."""
        keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(self.pixel_keys)
        return jax.vmap(lambda key: jax.random.logistic(key, (), jnp.float32))(keys)


def image_keys(key: Key[Array, ""], first: int | Int[Array, ""], batch: int) -> Key[Array, " b"]:
    """Return a key for each of the images `first`, `first` + 1, ..."""
    numbers = jnp.asarray(first, jnp.int32) + jnp.arange(batch, dtype=jnp.int32)
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)
