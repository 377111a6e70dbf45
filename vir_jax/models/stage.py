"""Equal blocks as one loop, read whole; or one after the other, in pieces with a state."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from vir_jax.models.layers import LAYER_NORM_EPSILON, MLP, LayerScale, drop_path
from vir_jax.models.layout import Layout
from vir_jax.models.mixers import Mixer, State
from vir_jax.models.sharding import constrain
from vir_jax.models.variables import batch_statistics, split_variables
from vir_jax.ops.platform import platform

# The outputs of linear layers and of the mixing itself; of some mixers, their gates.
PRODUCTS = ("qkv", "gate", "head_outputs", "mixed", "hidden", "mlp")

REMAT: dict[str, Callable[..., bool] | None] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "elementwise": jax.checkpoint_policies.save_only_these_names(*PRODUCTS),
    "full": None,
}
"""What of a block is computed anew in the backward pass: nothing; norms, GELU, scores and sums, while the outputs of
linear layers and mixers are kept (a third of the memory, and on CPUs less time than writing and reading the rest
takes); or everything, from the block's input."""


class StageBlock(nnx.Module):
    """What a stage runs one after the other: it changes tokens, and neither their number nor their width."""

    @property
    def intermediate_names(self) -> tuple[str, ...]:
        """What `__call__` returns by name, in the order of computation."""
        raise NotImplementedError

    def __call__(
        self,
        x: Float[Array, "b n c"],
        layout: Layout,
        *,
        mode: str = "auto",
        drop_path_rate: float | Float[Array, ""] = 0.0,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "b n c"], State | None, dict[str, Array]]:
        """Apply the block; see `Block.__call__`."""
        raise NotImplementedError

    def multiply_adds(self, layout: Layout, mode: str) -> int:
        """Count the multiply-adds of one image; of stacked blocks those of one.

        Raises:
            ValueError: they are not counted in this mode.
        """
        raise NotImplementedError


B = TypeVar("B", bound=StageBlock)


class Block(StageBlock):
    """A pre-norm block: x += LS(DropPath(mixer(LN(x)))), then x += LS(DropPath(MLP(LN(x)))).

    The residual stream is float32 whatever the compute dtype: LayerScale starts at 1e-5, and a bfloat16 sum
    (8 bits) would round all that a block adds away.
    """

    def __init__(
        self,
        dim: int,
        mixer: Mixer,
        *,
        mlp_dim: int,
        layer_scale: float | None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.norm1 = nnx.LayerNorm(dim, epsilon=LAYER_NORM_EPSILON, dtype=dtype, rngs=rngs)
        self.mixer = mixer
        self.layer_scale1 = None if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nnx.LayerNorm(dim, epsilon=LAYER_NORM_EPSILON, dtype=dtype, rngs=rngs)
        self.mlp = MLP(dim, mlp_dim, dtype=dtype, rngs=rngs)
        self.layer_scale2 = None if layer_scale is None else LayerScale(dim, layer_scale)

    def __call__(
        self,
        x: Float[Array, "b n c"],
        layout: Layout,
        *,
        mode: str = "auto",
        drop_path_rate: float | Float[Array, ""] = 0.0,
        key: PRNGKeyArray | None = None,
        state: State | None = None,
        return_state: bool = False,
    ) -> tuple[Float[Array, "b n c"], State | None, dict[str, Array]]:
        """Apply the block; `Mixer.__call__` explains the arguments and the state, `drop_path` rate and key.

        Returns:
            The tokens, the mixer's state (None unless asked for), and the block's intermediates by name: the mixer's,
            "mixer.q" and so on, and "tokens", the block's output.
        """
        key1, key2 = (None, None) if key is None else jax.random.split(key)
        mixed, state, intermediates = self.mixer(
            self.norm1(x), layout, mode=mode, state=state, return_state=return_state
        )
        x += drop_path(_scaled(mixed, self.layer_scale1), drop_path_rate, key1)
        x = self.add_mlp(x, drop_path_rate=drop_path_rate, key=key2)
        return x, state, {f"mixer.{name}": value for name, value in intermediates.items()} | {"tokens": x}

    def add_mixed(self, x: Float[Array, "b n c"], mixed: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """Add a mixer's output to the tokens, as the block does without drop path."""
        return x + _scaled(mixed, self.layer_scale1)

    def add_mlp(
        self,
        x: Float[Array, "b n c"],
        *,
        drop_path_rate: float | Float[Array, ""] = 0.0,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b n c"]:
        """Compute the second half of the block: x + LS(DropPath(MLP(LN(x))))."""
        return x + drop_path(_scaled(self.mlp(self.norm2(x)), self.layer_scale2), drop_path_rate, key)

    @property
    def intermediate_names(self) -> tuple[str, ...]:
        """What `__call__` returns by name, in the order of computation."""
        return (*(f"mixer.{name}" for name in self.mixer.intermediate_names), "tokens")

    def multiply_adds(self, layout: Layout, mode: str) -> int:
        """Count those of mixer and MLP."""
        mlp = 2 * layout.length * self.norm1.num_features * math.prod(self.mlp.up.out_features)
        return self.mixer.multiply_adds(layout, mode) + mlp


def _scaled(update: Float[Array, "b n c"], layer_scale: LayerScale | None) -> Float[Array, "b n c"]:
    return update if layer_scale is None else layer_scale(update)


class Stage(nnx.Module, Generic[B]):
    """Equal blocks, one after the other.

    `blocks` is one block whose variables hold all layers, along a first axis of size `depth`, and run as one loop:
    a block is compiled once, however deep the model is (but in training on a GPU), and the optimiser sees a dozen
    arrays instead of hundreds.

    Args:
        make_block: of the random keys of its parameters.
        drop_path_rates: of stochastic depth, one for each block.
        remat: one of `REMAT`.
        flips: whether every second block, the first not among them, reads the patches backwards.
        rngs: of the parameters.
    """

    def __init__(
        self,
        make_block: Callable[[nnx.Rngs], B],
        *,
        drop_path_rates: Sequence[float],
        remat: str,
        flips: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.depth, self.remat, self.drop_path_rates = len(drop_path_rates), remat, tuple(drop_path_rates)
        self.flips = flips

        @nnx.vmap
        def blocks(key: PRNGKeyArray) -> B:
            return make_block(nnx.Rngs(key))

        self.blocks = blocks(jax.random.split(rngs.params(), self.depth))

    def __call__(
        self,
        x: Float[Array, "b n c"],
        layout: Layout,
        *,
        mode: str = "auto",
        key: PRNGKeyArray | None = None,
        names: frozenset[str] = frozenset(),
    ) -> tuple[Float[Array, "b n c"], dict[str, Shaped[Array, "l ..."]]]:
        """Read all tokens of an image.

        Args:
            x: tokens.
            layout: where they stand.
            mode: form of the mixer.
            key: of stochastic depth, in training; None: deterministic.
            names: of the block's intermediates, those to return.

        Returns:
            The tokens after all blocks, and by name the intermediates of every block; all in the order of `x`.
        """
        graph, params, others = split_variables(self.blocks)
        drop = None
        if key is not None and any(self.drop_path_rates):
            keys = jax.vmap(functools.partial(jax.random.fold_in, key))(
                jnp.arange(self.depth, dtype=jnp.int32)
            )
            drop = jnp.asarray(self.drop_path_rates, jnp.float32), keys
        layers = params, others, drop
        # XLA for GPUs fills what a loop keeps for the backward pass with zeros, copies each block's share into it, and
        # runs a kernel twice whose output is kept: written out, which takes longer to compile, all that is gone.
        unrolled = key is not None and platform() == "gpu"
        x, intermediates, statistics = _scan(
            graph, layers, x, layout, mode, names, self.remat, self.flips, unrolled
        )
        nnx.update(self.blocks, statistics)
        if self.flips:
            x = layout.backwards(x) if self.depth % 2 else x
            forwards = jax.vmap(layout.backwards)
            intermediates = {
                name: value.at[1::2].set(forwards(value[1::2])) for name, value in intermediates.items()
            }
        return x, intermediates

    def reads_backwards(self, index: int) -> bool:
        """Whether this block reads the patches from the last to the first."""
        return self.flips and index % 2 == 1

    def block(self, index: int) -> B:
        """Return one layer by itself, with a copy of its parameters.

        Raises:
            IndexError: there is no such layer.
        """
        if not 0 <= index < self.depth:
            raise IndexError(f"layer {index}: the stage has layers 0 to {self.depth - 1}.")
        graph, params = nnx.split(self.blocks)
        return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[index], params))

    def apart(self: "Stage[Block]") -> "BlocksApart":
        """Return the blocks with arrays of their own, for a loop over pieces: within it, slices would be copies."""
        return BlocksApart([self.block(index) for index in range(self.depth)])


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6, 7, 8))
def _scan(
    graph: nnx.GraphDef[StageBlock],
    layers: Any,
    x: Float[Array, "b n c"],
    layout: Layout,
    mode: str,
    names: frozenset[str],
    remat: str,
    flips: bool,
    unrolled: bool,
) -> tuple[Float[Array, "b n c"], dict[str, Array], Any]:
    """Run one block after the other: tokens, intermediates, and the statistics of batches after them.

    `layers` are parameters, other variables, and rates and keys of drop path or None, with an axis l of blocks. Under
    jit, so that a model called outside of it is compiled once, too.
    """

    def apply(x: Array, layer: Any) -> tuple[Array, tuple[dict[str, Array], Any]]:
        params, others, drop = layer
        block = nnx.merge(graph, params, others)
        rate, key = (0.0, None) if drop is None else drop
        x, _, intermediates = block(
            constrain(x, "batch", None, None), layout, mode=mode, drop_path_rate=rate, key=key
        )
        # Each block reads the patches as the one before left them, so that turning them after every block alternates.
        x = layout.backwards(x) if flips else x
        return x, ({name: intermediates[name] for name in names}, batch_statistics(block))

    # A loop keeps recomputation apart from the forward pass by itself; no barrier against CSE is needed.
    apply = jax.checkpoint(apply, policy=REMAT[remat], prevent_cse=unrolled)
    x, (intermediates, statistics) = jax.lax.scan(apply, x, layers, unroll=unrolled)
    return x, intermediates, statistics


class BlocksApart(nnx.Module):
    """The blocks of a stage for reading an image in pieces, with a state of each."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = nnx.List(blocks)

    @property
    def reads_rows(self) -> int:
        """How many rows of patches pieces best have, where they must be whole rows; else 0."""
        return max(block.mixer.reads_rows for block in self.blocks)

    def initial_state(self, batch: int, layout: Layout) -> tuple[State, ...]:
        """Return the state of every block before the first token."""
        return tuple(block.mixer.initial_state(batch, layout) for block in self.blocks)

    def __call__(
        self, x: Float[Array, "b n c"], layout: Layout, states: Sequence[State]
    ) -> tuple[Float[Array, "b n c"], tuple[State, ...]]:
        """Read the next tokens: what becomes of them, and the states after them."""
        after = []
        for block, state in zip(self.blocks, states, strict=True):
            x, next_state, _ = block(x, layout, state=state, return_state=True)
            assert next_state is not None
            after.append(next_state)
        return x, tuple(after)
