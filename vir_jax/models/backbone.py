"""The isotropic skeleton shared by ViR and ViT (PAPER.md section 3)."""

import difflib
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num, PRNGKeyArray, Shaped

from vir_jax.models.layers import LAYER_NORM_EPSILON, MLP, LayerScale, conv_init, drop_path, linear_init
from vir_jax.models.mixers import Mixer, State
from vir_jax.models.position import resample_position_embedding, sincos_position_embedding
from vir_jax.models.sharding import constrain

# What is kept of a block for the backward pass: the outputs of linear layers and of the mixing itself. Norms, GELU,
# scores and sums are computed anew: a third of the memory, and on CPUs less time than writing and reading them takes.
KEPT = ("qkv", "heads", "mixed", "hidden", "mlp")
# What `remat` names: nothing, what costs little, or all of a block computed anew.
POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "elementwise": jax.checkpoint_policies.save_only_these_names(*KEPT),
    "full": None,
}
Readout = Literal["last", "average", "first"]
Place = Literal["first", "last"]
Position = Literal["learned", "sincos"]


class Block(nnx.Module):
    """A pre-norm block: x += LS(DropPath(mixer(LN(x)))), then x += LS(DropPath(MLP(LN(x)))).

    The residual stream is float32 whatever the compute dtype: LayerScale starts at 1e-5, and a bfloat16 sum
    (8 bits) would round all that a block adds away.
    """

    def __init__(
        self,
        mixer: Mixer,
        *,
        layer_scale: float | None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        dim = mixer.dim
        self.norm1 = nnx.LayerNorm(dim, epsilon=LAYER_NORM_EPSILON, dtype=dtype, rngs=rngs)
        self.mixer = mixer
        self.layer_scale1 = None if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nnx.LayerNorm(dim, epsilon=LAYER_NORM_EPSILON, dtype=dtype, rngs=rngs)
        self.mlp = MLP(dim, dtype=dtype, rngs=rngs)
        self.layer_scale2 = None if layer_scale is None else LayerScale(dim, layer_scale)

    def __call__(
        self,
        x: Float[Array, "b n c"],
        *,
        mode: str,
        grid: tuple[int, int],
        drop_path_rate: float | Float[Array, ""] = 0.0,
        key: PRNGKeyArray | None = None,
        initial_state: State | None = None,
        return_state: bool = False,
    ) -> tuple[Float[Array, "b n c"], State | None, dict[str, Array]]:
        """Apply the block; `Mixer.__call__` explains the arguments and the state, `drop_path` rate and key.

        Returns:
            The tokens, the mixer's state (`None` unless asked for), and the block's intermediates by name:
            "mixer.q" and so on, the mixer's, and "tokens", the block's output.
        """
        key1, key2 = (None, None) if key is None else jax.random.split(key)
        mixed, state, intermediates = self.mixer(
            self.norm1(x), mode=mode, grid=grid, initial_state=initial_state, return_state=return_state
        )
        x += drop_path(_scaled(mixed, self.layer_scale1), drop_path_rate, key1)
        x += drop_path(_scaled(self.mlp(self.norm2(x)), self.layer_scale2), drop_path_rate, key2)
        return x, state, {f"mixer.{name}": value for name, value in intermediates.items()} | {"tokens": x}


def _scaled(update: Float[Array, "b n c"], layer_scale: LayerScale | None) -> Float[Array, "b n c"]:
    return update if layer_scale is None else layer_scale(update)


class VisionBackbone(nnx.Module):
    """Patches -> tokens -> blocks -> logits. `create_model` makes the named variants.

    Parameters, all float32: `patch_embedding`, `position_embedding [1, rows, cols, c]` (only where learned),
    `class_token [1, 1, c]`, `class_position_embedding [1, 1, c]` (only where the class token comes first),
    `blocks`, `final_norm`, `head`. There is no other variable: `nnx.split(model)` gives a static graph and the
    parameters, and the forward pass is a pure function of parameters, images and key.

    `blocks` is one `Block` whose parameters hold all layers, along a first axis of size `depth`, and run as one loop:
    a block is compiled once, however deep the model is, and the optimiser sees a dozen arrays instead of hundreds.
    `block(index)` is a layer by itself.
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        patch: int,
        dim: int,
        depth: int,
        num_classes: int,
        make_mixer: Callable[[nnx.Rngs], Mixer],
        class_token: Place,
        readout: Readout,
        position: Position,
        bidirectional: bool,
        layer_scale: float | None,
        drop_path_rate: float,
        remat: str,
        dtype: DTypeLike,
        mode: str,
        rngs: nnx.Rngs,
    ) -> None:
        rows, cols = patch_grid(image_size, patch)
        self.patch, self.dim, self.num_classes = patch, dim, num_classes
        self.class_token_place, self.readout, self.bidirectional = class_token, readout, bidirectional
        self.position, self.remat, self.mode = position, remat, mode
        self.depth, self.drop_path_rate = depth, drop_path_rate

        normal = nnx.initializers.normal
        window = (patch, patch)
        self.patch_embedding = nnx.Conv(
            3, dim, window, window, padding="VALID", dtype=dtype, kernel_init=conv_init, rngs=rngs
        )
        if position == "learned":
            shape = (1, rows, cols, dim)
            self.position_embedding = nnx.Param(normal(0.02)(rngs.params(), shape, jnp.float32))
        self.class_token = nnx.Param(normal(1e-6)(rngs.params(), (1, 1, dim), jnp.float32))
        if class_token == "first":
            self.class_position_embedding = nnx.Param(normal(0.02)(rngs.params(), (1, 1, dim), jnp.float32))

        @nnx.vmap
        def blocks(key: PRNGKeyArray) -> Block:
            rngs = nnx.Rngs(key)
            return Block(make_mixer(rngs), layer_scale=layer_scale, dtype=dtype, rngs=rngs)

        self.blocks = blocks(jax.random.split(rngs.params(), depth))
        self.final_norm = nnx.LayerNorm(dim, epsilon=LAYER_NORM_EPSILON, dtype=jnp.float32, rngs=rngs)
        self.head = nnx.Linear(dim, num_classes, dtype=jnp.float32, kernel_init=linear_init, rngs=rngs)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches that the learned position embeddings were made for."""
        _, rows, cols, _ = self.position_embedding.shape
        return rows, cols

    @property
    def drop_path_rates(self) -> Float[Array, " l"]:
        """Of stochastic depth, by block: from 0 rising linearly."""
        return jnp.linspace(0.0, self.drop_path_rate, self.depth)

    def block(self, index: int) -> Block:
        """One layer by itself, with a copy of its parameters.

        Raises:
            IndexError: there is no such layer.
        """
        if not 0 <= index < self.depth:
            raise IndexError(f"layer {index}: the model has layers 0 to {self.depth - 1}.")
        graph, params = nnx.split(self.blocks)
        return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[index], params))

    def __call__(
        self, images: Float[Array, "b H W 3"], *, mode: str | None = None, key: PRNGKeyArray | None = None
    ) -> Float[Array, "b classes"]:
        """Classify images.

        Args:
            images: normalised pixels; height and width divisible by the patch, of any size, square or not.
            mode: form of the token mixer: "auto", "parallel", "recurrent" or "chunkwise". Retention gives the
                same logits in each; softmax attention has the first two alone, a kernel the first and the last.
                `None`: the model's own.
            key: random key for stochastic depth (training); `None`: deterministic.

        Returns:
            Logits, float32.

        Raises:
            ValueError: on images of another shape or dtype, or a mode that the mixer does not have.
        """
        tokens, _ = self._encode(images, mode=mode, key=key)
        return self.classify(tokens)

    def features(
        self, images: Float[Array, "b H W 3"], *, mode: str | None = None, key: PRNGKeyArray | None = None
    ) -> Float[Array, "b n c"]:
        """Tokens after the final norm, float32, in sequence order: the class token first (ViT) or last (ViR).

        Arguments and errors are those of `__call__`.
        """
        tokens, _ = self._encode(images, mode=mode, key=key)
        return self.final_norm(tokens)

    def intermediates(
        self, images: Float[Array, "b H W 3"], names: Collection[str], *, mode: str | None = None
    ) -> dict[str, Array]:
        """Compute named intermediates of the (deterministic) forward pass; `intermediate_names` lists them.

        Arguments are those of `__call__`, and the names wanted. What is asked of one block is kept of every block,
        until the wanted ones are picked; nothing else is.

        Returns:
            By name, in the order asked for:
            "patch_tokens" `[b, rows * cols, c]`: the patches' embeddings, without position;
            "tokens" `[b, n, c]`: what the first block reads;
            "blocks.i.mixer.q", ".k", ".v" `[b, n, h, d]`: of block i = 0, 1, ..., q not yet scaled;
            "blocks.i.mixer.heads" `[b, n, h, d]`: each head's output before the output projection;
            "blocks.i.tokens" `[b, n, c]`: the block's output;
            "features" `[b, n, c]`: the last block's tokens after the final norm;
            "logits" `[b, classes]`.

        Raises:
            ValueError: on an unknown name, naming the nearest ones.
        """
        known = self.intermediate_names
        for name in names:
            if name not in known:
                near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.0))
                raise ValueError(f"no intermediate is called {name!r}; the nearest are {near}.")
        tokens, found = self._encode(images, mode=mode, wanted=frozenset(names))
        if "features" in names:
            found["features"] = self.final_norm(tokens)
        if "logits" in names:
            found["logits"] = self.classify(tokens)
        return {name: found[name] for name in names}

    @property
    def intermediate_names(self) -> tuple[str, ...]:
        """All that `intermediates` can be asked for, in the order of computation."""
        per_block = ("mixer.q", "mixer.k", "mixer.v", "mixer.heads", "tokens")
        blocks = (f"blocks.{index}.{name}" for index in range(self.depth) for name in per_block)
        return ("patch_tokens", "tokens", *blocks, "features", "logits")

    def classify(self, tokens: Float[Array, "b n c"]) -> Float[Array, "b classes"]:
        """Read the last block's tokens out, normalise, and apply the head.

        The norm follows the readout: to one token it is the same as normalising all, and the average of the
        patch tokens has a norm of its own (PAPER.md section 3), with no more parameters than the others.
        """
        match self.readout:
            case "last":
                token = tokens[:, -1]
            case "first":
                token = tokens[:, 0]
            case "average":
                patches = tokens[:, :-1] if self.class_token_place == "last" else tokens[:, 1:]
                token = jnp.mean(patches, axis=1)
        return self.head(self.final_norm(token))

    def _encode(
        self,
        images: Num[Array, "b H W channels"],
        *,
        mode: str | None,
        key: PRNGKeyArray | None = None,
        wanted: frozenset[str] = frozenset(),
    ) -> tuple[Float[Array, "b n c"], dict[str, Array]]:
        """The last block's tokens, and those intermediates among `wanted` that were met on the way."""
        _check_images(images.shape, images.dtype)
        grid = patch_grid(images.shape[1:3], self.patch)
        patches = self.patch_embedding(images).astype(jnp.float32)
        x = self._sequence(patches)
        found = {"patch_tokens": patches.reshape(x.shape[0], -1, self.dim), "tokens": x}
        found = {name: value for name, value in found.items() if name in wanted}
        x, kept = self._apply_blocks(x, mode=mode or self.mode, grid=grid, key=key, wanted=wanted)
        return x, found | kept

    def _sequence(self, patches: Float[Array, "b rows cols c"]) -> Float[Array, "b n c"]:
        """Add position embeddings, order the patches (both ways if bidirectional), add the class token."""
        b, rows, cols, c = patches.shape
        if self.position == "learned":
            position_embedding = resample_position_embedding(self.position_embedding[...], (rows, cols))
        else:
            y, x = jnp.divmod(jnp.arange(rows * cols), cols)
            position_embedding = sincos_position_embedding(y, x, c).reshape(1, rows, cols, c)
        x = (patches + position_embedding).reshape(b, rows * cols, c)
        if self.bidirectional:
            x = jnp.concatenate([x, jnp.flip(x, axis=1)], axis=1)
        class_token = self.class_token[...]
        if self.class_token_place == "first":
            class_token += self.class_position_embedding[...]
        class_token = jnp.broadcast_to(class_token, (b, 1, c))
        sequence = [class_token, x] if self.class_token_place == "first" else [x, class_token]
        return jnp.concatenate(sequence, axis=1)

    def _apply_blocks(
        self,
        x: Float[Array, "b n c"],
        *,
        mode: str,
        grid: tuple[int, int],
        key: PRNGKeyArray | None,
        wanted: frozenset[str],
    ) -> tuple[Float[Array, "b n c"], dict[str, Array]]:
        """The tokens after all blocks, and those of the blocks' intermediates that are wanted."""
        graph, params = nnx.split(self.blocks)
        drop_path = None
        if key is not None and self.drop_path_rate > 0:
            drop_path = (
                self.drop_path_rates,
                jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(self.depth)),
            )
        # "blocks.3.mixer.q" asks for "mixer.q" of block 3.
        asked = {name: name.split(".", 2)[1:] for name in sorted(wanted) if name.startswith("blocks.")}
        names = frozenset(name for _, name in asked.values())
        x, kept = _scan_blocks(graph, params, x, drop_path, mode, grid, names, self.remat)
        return x, {full_name: kept[name][int(index)] for full_name, (index, name) in asked.items()}


@partial(jax.jit, static_argnums=(0, 4, 5, 6, 7))
def _scan_blocks(
    graph: nnx.GraphDef[Block],
    params: Any,
    x: Float[Array, "b n c"],
    drop_path: tuple[Float[Array, " l"], Shaped[Array, "l ..."]] | None,
    mode: str,
    grid: tuple[int, int],
    names: frozenset[str],
    remat: str,
) -> tuple[Float[Array, "b n c"], dict[str, Array]]:
    """One block after the other; `params` and `drop_path`, rates and keys, have an axis l of blocks.

    Returns:
        The tokens, and by name the intermediates of all blocks, `[l, ...]`. Under jit, so that a model called
        outside of it is compiled once, too.
    """

    def apply(x: Array, layer: tuple[Any, tuple[Array, Array] | None]) -> tuple[Array, dict[str, Array]]:
        params, drop_path = layer
        block = nnx.merge(graph, params)
        rate, key = (0.0, None) if drop_path is None else drop_path
        x, _, intermediates = block(
            constrain(x, "batch", None, None), mode=mode, grid=grid, drop_path_rate=rate, key=key
        )
        return x, {name: intermediates[name] for name in names}

    # A loop keeps recomputation apart from the forward pass by itself; no barrier against CSE is needed.
    apply = jax.checkpoint(apply, policy=POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(apply, x, (params, drop_path))


def patch_grid(image_size: tuple[int, ...], patch: int) -> tuple[int, int]:
    """(rows, columns) of patches in an image of (height, width) pixels.

    Raises:
        ValueError: if a side is not a positive multiple of the patch.
    """
    height, width = image_size
    if min(height, width) < patch or height % patch or width % patch:
        near = tuple(max(round(side / patch), 1) * patch for side in (height, width))
        raise ValueError(
            f"an image of {height} x {width} pixels does not divide into patches of {patch} x {patch}; "
            f"resize or crop it to multiples of {patch}, e.g. {near[0]} x {near[1]}."
        )
    return height // patch, width // patch


def _check_images(shape: tuple[int, ...], dtype: jnp.dtype) -> None:
    if len(shape) != 4 or shape[0] < 1 or shape[-1] != 3:
        raise ValueError(
            f"images have shape {shape}; expected [b, H, W, 3], a batch of at least one RGB image."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"images are {dtype}; expected floating point, normalised as in training.")
