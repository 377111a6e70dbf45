"""What a token mixer is to everything else, and the registry of those there are."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from vir_jax.models.layout import Layout
from vir_jax.models.rope import Rope

State = Float32[Array, "b ..."] | tuple[Float32[Array, "b ..."], ...]
"""What a causal mixer has read so far: an array, or several."""

_MIXERS: dict[str, type["Mixer"]] = {}
_COMMON = ("self", "dim", "heads", "layout", "dtype", "rngs")


class Mixer(nnx.Module):
    """Mixes tokens. Training, evaluation, streams, sharding, cost and inspection know it by what stands here.

    A mixer is made by `mixer(dim, heads, layout, dtype=..., rngs=..., **options)`, where `layout` is that of the image
    size that the model is made for, and `options` are keyword arguments of its own, each with a default; `create_model`
    and recipes pass them by name. A large parameter says by its metadata `axes` how it may be split
    (`vir_jax.models.sharding`).

    Attributes:
        causal: whether no token sees a later one, so that a state can stand for all earlier ones. The class token
            comes last then, else first.
        modes: its forms, equal in result; "auto" is one more name, for the form that suits the length.
        takes_class_token: whether a class token may stand among the patches; else the head reads their average.
        reads_any_length: whether a model reads images of other sizes than it was made for.
        reads_rows: how many rows of patches the pieces of a stream best have, where they must be whole rows; else 0.
        intermediate_names: what it returns by name.
        retention: which decays weigh its tokens, "1d" (along the sequence) or "2d" (rows and columns), where its output
            is a sum over tokens so weighted, with the log decays of its heads in `log_decay [h]` (and each token's sum
            multiplied by its intermediate "gain", if it has one); else None.
    """

    causal: bool = False
    modes: tuple[str, ...] = ("parallel",)
    takes_class_token: ClassVar[bool] = True
    reads_any_length: ClassVar[bool] = True
    reads_rows: int = 0
    intermediate_names: tuple[str, ...] = ()
    retention: Literal["1d", "2d"] | None = None

    @property
    def log_decay(self) -> Float32[Array, " h"]:
        """log(gamma) of each head.

        Raises:
            ValueError: the mixer is no retention, or its heads have no decays of their own.
        """
        raise ValueError(f"{self._name} has no decays")

    def __init__(self, dim: int, heads: int, layout: Layout, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        raise TypeError(f"{type(self).__name__} does not say how it is made")

    def __call__(
        self,
        x: Float[Array, "b n c"],
        layout: Layout,
        *,
        mode: str = "auto",
        state: State | None = None,
        return_state: bool = False,
    ) -> tuple[Float[Array, "b n c"], State | None, dict[str, Array]]:
        """Mix tokens.

        Args:
            x: tokens.
            layout: where they stand.
            mode: "auto", or one of `modes`.
            state: what the tokens before these left; None: there were none.
            return_state: whether to return the state after these tokens.

        Returns:
            The mixed tokens, the state (None unless asked for), and the intermediates by name.

        Raises:
            ValueError: a mode that it does not have; a state, where it is not causal.
        """
        raise NotImplementedError

    def use_rope(self, rope: Rope) -> None:
        """Turn queries and keys by their positions from now on (`vir_jax.models.rope`).

        Raises:
            ValueError: there are none, or heads of this width cannot be turned.
        """
        able = ", ".join(name for name in mixer_names() if mixer_type(name).use_rope is not Mixer.use_rope)
        raise ValueError(
            f"the mixer {self._name!r} has no queries and keys that rotary positions could turn; expected another "
            f"position than 'rope' and 'rope_2d', or one of the mixers {able}"
        )

    def initial_state(self, batch: int, layout: Layout) -> State:
        """Return the state before the first token of images that are as wide as the layout's.

        Raises:
            ValueError: the mixer is not causal.
        """
        raise ValueError(f"{self._name} has no state that summarises earlier tokens; give it the whole image")

    def multiply_adds(self, layout: Layout, mode: str) -> int:
        """Count the multiply-adds of one image, projections included.

        Raises:
            ValueError: it is not counted in this mode.
        """
        raise ValueError(f"{self._name} is not counted in mode {mode!r}")

    def check_call(self, mode: str, state: State | None, return_state: bool) -> None:
        """Check what `__call__` was asked for.

        Raises:
            ValueError: a mode that the mixer does not have; a state, where it is not causal.
        """
        if mode not in ("auto", *self.modes):
            known = ", ".join(map(repr, ("auto", *self.modes)))
            raise ValueError(f"{self._name} has no {mode!r} mode; expected one of {known}")
        if not self.causal and (state is not None or return_state):
            self.initial_state(1, Layout(cols=1, patches=0, class_token=None))

    @property
    def described(self) -> str:
        """What it is, for messages."""
        return type(self).__name__

    @property
    def _name(self) -> str:
        return next((name for name, kind in _MIXERS.items() if kind is type(self)), type(self).__name__)


def register(name: str) -> Callable[[type[Mixer]], type[Mixer]]:
    """Decorate a mixer's class: `create_model(..., mixer=name)` finds it.

    Raises:
        ValueError: another class has the name.
    """

    def add(kind: type[Mixer]) -> type[Mixer]:
        known = _MIXERS.setdefault(name, kind)
        if (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
            raise ValueError(f"there are two mixers called {name!r}: {known} and {kind}")
        _MIXERS[name] = kind
        return kind

    return add


def mixer_names() -> tuple[str, ...]:
    """Return the names of all mixers."""
    return tuple(sorted(_MIXERS))


def mixer_type(name: str) -> type[Mixer]:
    """Return the mixer of that name.

    Raises:
        ValueError: there is none; the nearest is named.
    """
    if name not in _MIXERS:
        near = difflib.get_close_matches(str(name), _MIXERS, n=1, cutoff=0.0)
        raise ValueError(f"mixer={name!r}; expected one of {', '.join(mixer_names())}, such as {near[0]!r}")
    return _MIXERS[name]


def mixer_options(name: str) -> dict[str, Any]:
    """Return the options that a mixer has of its own, with their defaults."""
    parameters = inspect.signature(mixer_type(name).__init__).parameters
    return {option: p.default for option, p in parameters.items() if option not in _COMMON}
