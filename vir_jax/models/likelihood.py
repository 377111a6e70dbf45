"""From a model's outputs to the probability of a pixel, exactly, and to a sample of the same distribution.

A pixel is a tuple of symbols, one for each channel, each of 0 .. levels - 1. Every probability that `log_probability`
gives sums to one over all of them, and `sample` draws from these.
"""

import dataclasses
import math
from typing import Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@runtime_checkable
class Draws(Protocol):
    """What a pixel is drawn by: noise of its own for each of its draws, which are numbered."""

    @property
    def restricted(self) -> bool:
        """Whether some levels may not be drawn, or probabilities are other than the model's."""

    def symbol(self, log_masses: Float[Array, "*n levels"], number: int) -> Int[Array, "*n"]:
        """Return a symbol, given the logarithms of the probabilities of all."""

    def logistic(self, number: int) -> Float[Array, "*n"]:
        """Return numbers of the standard logistic distribution."""


@dataclasses.dataclass(frozen=True)
class Categorical:
    """A probability for each level of a grey pixel, by a softmax: what suits few levels, or some far more frequent."""

    levels: int
    channels: int = dataclasses.field(default=1, init=False)

    @property
    def num_outputs(self) -> int:
        """How many numbers describe the distribution of a pixel."""
        return self.levels

    def log_probability(
        self, outputs: Float[Array, "*#n outputs"], symbols: Int[Array, "*#n 1"]
    ) -> Float[Array, "*_"]:
        """Return the logarithm of a pixel's probability, in nats."""
        log_masses = jax.nn.log_softmax(outputs)
        # Not a gather: XLA cannot split one over an axis of the mesh within a `shard_map` over another.
        chosen = jnp.arange(self.levels, dtype=jnp.int32) == symbols
        return jnp.sum(log_masses, axis=-1, where=chosen)

    def sample(self, outputs: Float[Array, "*n outputs"], draws: Draws) -> Int[Array, "*n 1"]:
        """Draw a pixel."""
        return draws.symbol(jax.nn.log_softmax(outputs), 0)[..., None]


@dataclasses.dataclass(frozen=True)
class Logistics:
    """A mixture of logistic distributions, integrated over bins: what suits levels that are numbers, as of photographs.

    After PixelCNN++ (arXiv 1701.05517): one component is chosen for all channels of a pixel, and within it the mean of
    a channel is shifted by multiples of the channels before, c_GR R, c_BR R + c_BG G. Symbols stand for the values
    -1 .. 1, and the bins of the first and last one are open. Ours: bins have their exact mass, without a clamp or a
    branch, so that probabilities sum to one; outputs of zero stand for components that are evenly spread, since equal
    ones would stay equal.

    Args:
        levels: of each channel.
        channels: 1 (grey) or 3 (RGB).
        mixtures: components.
    """

    levels: int
    channels: int
    mixtures: int

    @property
    def num_outputs(self) -> int:
        """How many numbers describe the distribution of a pixel."""
        return self.mixtures * (1 + 2 * self.channels + self._coefficients)

    @property
    def _coefficients(self) -> int:
        """Pairs of channels."""
        return self.channels * (self.channels - 1) // 2

    def log_probability(
        self, outputs: Float[Array, "*#n outputs"], symbols: Int[Array, "*#n channels"]
    ) -> Float[Array, "*_"]:
        """Return the logarithm of a pixel's probability, in nats."""
        components = self._components(outputs)
        log_joint = components.log_weights
        for channel in range(self.channels):
            mean, log_scale = self._of_channel(components, symbols, channel)
            log_joint += log_bin_mass(symbols[..., channel], mean, log_scale, self.levels)
        return jax.nn.logsumexp(log_joint, axis=-1)

    def sample(self, outputs: Float[Array, "*n outputs"], draws: Draws) -> Int[Array, "*n channels"]:
        """Draw a pixel: a component, then a number of each channel's logistic, which falls into a bin.

        Where levels are restricted the masses of all of them are needed, which takes longer than all else.
        """
        if draws.restricted:
            return self._sample_levels(outputs, draws)
        components = self._components(outputs)
        chosen = jax.nn.one_hot(
            draws.symbol(components.log_weights, self.channels), self.mixtures, dtype=outputs.dtype
        )
        symbols = jnp.zeros((*outputs.shape[:-1], 0), jnp.int32)
        for channel in range(self.channels):
            mean, log_scale = (
                jnp.sum(x * chosen, axis=-1) for x in self._of_channel(components, symbols, channel)
            )
            value = mean + jnp.exp(log_scale) * draws.logistic(channel).astype(mean.dtype)
            bins = jnp.clip(jnp.round((value + 1) * ((self.levels - 1) / 2)), 0, self.levels - 1)
            symbols = jnp.concatenate([symbols, bins.astype(jnp.int32)[..., None]], axis=-1)
        return symbols

    def _sample_levels(self, outputs: Float[Array, "*n outputs"], draws: Draws) -> Int[Array, "*n channels"]:
        """Draw each channel's level, given those before, from the masses of all."""
        components = self._components(outputs)
        # Of the components, given the channels that are drawn.
        log_weights = components.log_weights
        symbols = jnp.zeros((*outputs.shape[:-1], 0), jnp.int32)
        for channel in range(self.channels):
            mean, log_scale = self._of_channel(components, symbols, channel)
            bins = jnp.arange(self.levels, dtype=jnp.int32)
            masses = log_bin_mass(bins, mean[..., None, :], log_scale[..., None, :], self.levels)
            drawn = draws.symbol(jax.nn.logsumexp(log_weights[..., None, :] + masses, axis=-1), channel)
            symbols = jnp.concatenate([symbols, drawn[..., None]], axis=-1)
            log_weights = jax.nn.log_softmax(log_weights + log_bin_mass(drawn, mean, log_scale, self.levels))
        return symbols

    def _components(self, outputs: Float[Array, "*n outputs"]) -> "_Components":
        m, c = self.mixtures, self.channels
        weights, means, log_scales, coefficients = jnp.split(
            outputs.reshape(*outputs.shape[:-1], -1, m), np.cumsum([1, c, c]).tolist(), axis=-2
        )
        spread = jnp.asarray((2 * np.arange(m) + 1) / m - 1, outputs.dtype)
        return _Components(
            jax.nn.log_softmax(weights[..., 0, :]), means + spread, log_scales - math.log(m), coefficients
        )

    def _of_channel(
        self, components: "_Components", symbols: Int[Array, "*#n _"], channel: int
    ) -> tuple[Float[Array, "*_ m"], Float[Array, "*_ m"]]:
        """Return means and log-scales of a channel's components, given the channels before."""
        mean, first = components.means[..., channel, :], channel * (channel - 1) // 2
        for other in range(channel):
            value = 2 * symbols[..., other, None].astype(mean.dtype) / (self.levels - 1) - 1
            mean += components.coefficients[..., first + other, :] * value
        return mean, components.log_scales[..., channel, :]


@dataclasses.dataclass(frozen=True)
class _Components:
    """Of a mixture: weights as logarithms, and of each channel what the components are."""

    log_weights: Float[Array, "*n m"]
    means: Float[Array, "*n c m"]
    log_scales: Float[Array, "*n c m"]
    coefficients: Float[Array, "*n pairs m"]


Likelihood: TypeAlias = Categorical | Logistics


def log_bin_mass(
    symbol: Int[Array, "*#n"], mean: Float[Array, "*#n m"], log_scale: Float[Array, "*#n m"], levels: int
) -> Float[Array, "*_ m"]:
    """Return the logarithm of a logistic distribution's mass in the bin of a symbol.

    With a and b the bin's upper and lower edge, less the mean and divided by the scale, s the logistic function,

        log(s(a) - s(b)) = log s(a) + log s(-b) + log(1 - exp(b - a)),

    where a - b, the bin's width, does not depend on the symbol: nothing cancels, whatever the scale. In the first bin b
    is minus infinity, in the last one a is infinity.
    """
    symbol = symbol[..., None]
    dtype, width = mean.dtype, 2 / (levels - 1)
    # Neighbours share an edge to the last bit: it is one integer in both.
    upper, lower = (
        ((2 * symbol + side).astype(dtype) / (levels - 1) - 1 - mean) * jnp.exp(-log_scale)
        for side in (1, -1)
    )
    is_first, is_last = symbol == 0, symbol == levels - 1
    below_upper = jnp.where(is_last, 0, jax.nn.log_sigmoid(upper))
    above_lower = jnp.where(is_first, 0, jax.nn.log_sigmoid(-lower))
    both = jnp.log(-jnp.expm1(-width * jnp.exp(-log_scale)))
    return below_upper + above_lower + jnp.where(is_first | is_last, 0, both)


def make_likelihood(levels: int | None, channels: int, mixtures: int | None) -> Likelihood:
    """Return the distribution of a pixel: without `mixtures` categorical, which is for grey ones.

    Raises:
        ValueError: numbers that make none.
    """
    for name, value, valid, expected in (
        ("levels", levels, _is_count(levels, 2, 256), "an integer from 2 to 256"),
        ("channels", channels, channels in (1, 3), "1 (grey) or 3 (RGB)"),
        (
            "mixtures",
            mixtures,
            mixtures is None or _is_count(mixtures, 1),
            "1 or more, or None",
        ),
    ):
        if not valid:
            raise ValueError(f"{name}={value!r}; expected {expected}")
    assert levels is not None
    if mixtures is not None:
        return Logistics(levels, channels, mixtures)
    if channels != 1:
        raise ValueError(
            f"channels={channels} needs a mixture of logistics: a categorical distribution of {levels}^{channels} "
            "colours is too large. Say how many, such as mixtures=10"
        )
    return Categorical(levels)


def check_symbols(symbols: Int[Array, "..."] | Int[np.ndarray, "..."], levels: int, what: str) -> None:
    """Check that symbols are of the alphabet.

    Raises:
        ValueError: one of them is not; the range is told.
    """
    if symbols.size and not (symbols.min() >= 0 and symbols.max() < levels):
        raise ValueError(
            f"{what} has levels {int(symbols.min())} to {int(symbols.max())}; expected 0 to {levels - 1}, as the model "
            f"knows {levels}"
        )


def _is_count(value: object, low: int, high: int | float = math.inf) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and low <= int(value) <= high
