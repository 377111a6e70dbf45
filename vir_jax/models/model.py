"""A vision model: stem, stage of blocks, readout."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Num, PRNGKeyArray, Shaped

from vir_jax.models.layout import Layout
from vir_jax.models.mixers import Mixer
from vir_jax.models.pixel_stem import PixelStem
from vir_jax.models.readout import DENSE, Readout
from vir_jax.models.stage import Block, BlocksApart, Stage
from vir_jax.models.stem import Stem


class VisionModel(nnx.Module):
    """Images -> tokens -> blocks -> logits. `create_model` makes the named ones.

    Parameters, all float32, are those of `stem`, `stage` and `readout`. Besides parameters a model may hold statistics
    (of batch normalisation), which a call updates where `model.train()` was said; `create_model` gives one that was
    told `model.eval()`. The forward pass is a pure function of variables, images and key: `nnx.split`, `nnx.merge`.

    Args:
        options: name and options that `create_model` made it of, JSON data; what a saved state must agree with.
        stem: images to tokens.
        stage: the blocks.
        readout: tokens to logits.
        mode: form of the mixer where a call names none.
    """

    def __init__(
        self,
        *,
        options: Mapping[str, Any],
        stem: Stem | PixelStem,
        stage: Stage[Block],
        readout: Readout,
        mode: str,
    ) -> None:
        self._options, self.mode = tuple(options.items()), mode
        self.stem, self.stage, self.readout = stem, stage, readout

    def __call__(
        self, images: Num[Array, "b H W colours"], *, mode: str | None = None, key: PRNGKeyArray | None = None
    ) -> Float[Array, "b *n classes"]:
        """Classify images or each of their pixels, or predict each pixel from those before.

        Args:
            images: normalised pixels; height and width divisible by the patch, of any size, square or not. Of a model
                of pixels their levels, integers.
            mode: form of the token mixer: "auto", or one of `modes`, which are equal in result. None: the model's own.
            key: random key for stochastic depth (training); None: deterministic.

        Returns:
            Logits, float32: of each image; with a dense readout of each of its pixels, [b, H, W, classes]; of a model
            of pixels what its `stem.likelihood` makes a distribution of, for each.

        Raises:
            ValueError: on images of another shape or dtype, or a mode that the mixer does not have.
        """
        tokens, layout, *_ = self._encode(images, mode=mode, key=key)
        return self.readout(tokens, layout)

    def features(
        self, images: Num[Array, "b H W colours"], *, mode: str | None = None, key: PRNGKeyArray | None = None
    ) -> Float[Array, "b n c"]:
        """Return tokens after the final norm, float32, in sequence order: the class token first (ViT) or last (ViR).

        Arguments and errors are those of `__call__`.
        """
        tokens, *_ = self._encode(images, mode=mode, key=key)
        return self.readout.norm(tokens)

    def feature_maps(
        self,
        images: Num[Array, "b H W colours"],
        blocks: Sequence[int] | None = None,
        *,
        mode: str | None = None,
        norm: bool = True,
    ) -> tuple[Float[Array, "b rows cols c"], ...]:
        """Compute maps of features, for what is predicted of every place; deterministic.

        A token stands where its patch does; the class token is left out. Of a bidirectional model the maps are the
        second pass's, whose tokens have seen the whole image. With flips, too, they come in image order.

        Args:
            images: as for `__call__`, of any size that the patch divides, square or not.
            blocks: whose outputs, 0 to depth - 1, in any order; None: the last block's.
            mode: as for `__call__`.
            norm: whether the model's final layer norm is applied to each map.

        Returns:
            For each block a map, float32: pixels a place `feature_strides`, channels `feature_dims`.

        Raises:
            ValueError: no such block, none, or a model of pixels, which has no patches; and as for `__call__`.
        """
        if isinstance(self.stem, PixelStem):
            raise ValueError(
                "a model with stem='pixels' has no feature maps: its tokens stand for pixels not yet seen. Use one of "
                "patches."
            )
        wanted = (self.depth - 1,) if blocks is None else tuple(blocks)
        if not wanted or not all(0 <= block < self.depth for block in wanted):
            raise ValueError(
                f"blocks={blocks!r}; expected some of 0 to {self.depth - 1}, or None for the last."
            )
        # The last block's output is there without keeping those of all.
        names = frozenset[str]() if set(wanted) == {self.depth - 1} else frozenset({"tokens"})
        last, layout, _, kept = self._encode(images, mode=mode, names=names)
        tokens = (kept["tokens"][block] if names else last for block in wanted)
        return tuple(layout.patch_map(self.readout.norm(x) if norm else x) for x in tokens)

    @property
    def feature_strides(self) -> tuple[int, ...]:
        """Pixels from one place to the next in each map that `feature_maps` gives by default."""
        return (self.patch,)

    @property
    def feature_dims(self) -> tuple[int, ...]:
        """Channels of each map that `feature_maps` gives by default."""
        return (self.dim,)

    def intermediates(
        self, images: Num[Array, "b H W colours"], names: Collection[str], *, mode: str | None = None
    ) -> dict[str, Array]:
        """Compute named intermediates of the (deterministic) forward pass; `intermediate_names` lists them.

        Arguments are those of `__call__`, and the names wanted. What is asked of one block is kept of every block,
        until the wanted ones are picked; nothing else is.

        Returns:
            By name, in the order asked for:
            "patch_tokens" `[b, rows * cols, c]`: the patches' embeddings, without position;
            "tokens" `[b, n, c]`: what the first block reads;
            "blocks.i.mixer.NAME": what block i = 0, 1, ... computes in its mixer: of one with heads "q", "k", "v"
            `[b, n, h, d]`, q not yet scaled, and "head_outputs" `[b, n, h, d]`, before their projection;
            where heads are normalised or gated "gain" `[b, n, h, d]`, what their sums over tokens were multiplied by;
            "blocks.i.tokens" `[b, n, c]`: the block's output;
            "features" `[b, n, c]`: the last block's tokens after the final norm;
            "logits" `[b, classes]`.

        Raises:
            ValueError: on an unknown name, naming the nearest ones.
        """
        self._check_intermediates(names)
        # "blocks.3.mixer.q" asks for "mixer.q" of block 3.
        asked = {name: name.split(".", 2)[1:] for name in sorted(names) if name.startswith("blocks.")}
        wanted = frozenset(name for _, name in asked.values())
        tokens, layout, found, kept = self._encode(images, mode=mode, names=wanted)
        found |= {full_name: kept[name][int(index)] for full_name, (index, name) in asked.items()}
        if "features" in names:
            found["features"] = self.readout.norm(tokens)
        if "logits" in names:
            found["logits"] = self.readout(tokens, layout)
        return {name: found[name] for name in names}

    @property
    def intermediate_names(self) -> tuple[str, ...]:
        """All that `intermediates` can be asked for, in the order of computation."""
        per_block = self.stage.blocks.intermediate_names
        blocks = (f"blocks.{index}.{name}" for index in range(self.depth) for name in per_block)
        return ("patch_tokens", "tokens", *blocks, "features", "logits")

    def _check_intermediates(self, names: Collection[str]) -> None:
        """Check that there are intermediates of these names.

        Raises:
            ValueError: on an unknown one, naming the nearest.
        """
        known = self.intermediate_names
        for name in names:
            if name not in known:
                near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.0))
                raise ValueError(f"no intermediate is called {name!r}; the nearest are {near}.")

    @property
    def options(self) -> dict[str, Any]:
        """Name and options that `create_model` made the model of."""
        return dict(self._options)

    @property
    def patch(self) -> int:
        """Pixels along a side of a patch, which divides the sides of an image."""
        return self.stem.patch

    @property
    def channels(self) -> int:
        """Of the images."""
        return self.stem.channels

    @property
    def dim(self) -> int:
        """Width of the residual stream."""
        return self.stem.dim

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.stage.depth

    @property
    def num_classes(self) -> int:
        """Width of the head."""
        return self.readout.num_classes

    @property
    def dense(self) -> bool:
        """Whether it gives logits to each pixel, in place of each image."""
        return self.readout.reads in DENSE

    @property
    def bidirectional(self) -> bool:
        """Whether the patches are read twice, forwards and then backwards."""
        return self.stem.passes == 2

    @property
    def modes(self) -> tuple[str, ...]:
        """The forms of the mixer, equal in result."""
        return self.mixer.modes

    @property
    def mixer(self) -> Mixer:
        """The mixer of all blocks, their parameters stacked.

        Raises:
            ValueError: blocks differ in their mixers.
        """
        return self.stage.blocks.mixer

    @property
    def retention(self) -> str | None:
        """Which decays weigh the tokens, "1d" or "2d"; None: the mixer is no retention."""
        return self.mixer.retention

    @property
    def has_layer_scale(self) -> bool:
        """Whether the blocks have LayerScale."""
        return self.stage.blocks.layer_scale1 is not None

    def layout(self, image_size: Sequence[int]) -> Layout:
        """Return where the tokens of an image of (height, width) pixels stand."""
        return self.stem.layout(image_size)

    def multiply_adds(self, image_size: Sequence[int], mode: str) -> int:
        """Count the multiply-adds of one image of (height, width) pixels; see `vir_jax.models.cost`.

        Raises:
            ValueError: the size does not divide into patches, or the mixer is not counted in this mode.
        """
        layout = self.layout(image_size)
        blocks = self.depth * self.stage.blocks.multiply_adds(layout, mode)
        return self.stem.multiply_adds(layout) + blocks + self.readout.multiply_adds(layout)

    def block(self, index: int) -> Block:
        """Return one layer by itself, with a copy of its parameters.

        Raises:
            IndexError: there is no such layer.
        """
        return self.stage.block(index)

    @property
    def needs_height(self) -> bool:
        """Whether a stream must know the image's height, to which positions are resampled."""
        return self.stem.position.needs_height

    def check_streamable(self) -> None:
        """Check that the model can read an image in one pass, piece by piece.

        Raises:
            ValueError: it cannot, and why.
        """
        mixer = self.mixer
        if not mixer.causal:
            raise ValueError(
                f"a model whose mixer is {mixer.described} cannot be streamed: it has no state that summarises "
                "earlier patches. Use a causal mixer, as vir_* models have, or give this one the whole image."
            )
        if not self.stem.streams:
            raise ValueError(
                f"a model with stem={self.options['stem']!r} cannot be streamed: its convolutions reach into the rows "
                "below a row of patches. Use one made with stem='linear' or 'conv', or give this one the whole image."
            )
        if self.stage.flips:
            raise ValueError(
                "a model made with flips=True cannot be streamed: every second block reads the patches backwards from "
                "the last. Use one made without flips, or give this one the whole image with mode='chunkwise'."
            )
        if self.bidirectional:
            raise ValueError(
                "a bidirectional model cannot be streamed: it reads the patches a second time, backwards from the "
                "last. Use one made with bidirectional=False, or give this one the whole image with mode='chunkwise'."
            )
        self.readout.check_streamable()

    def apart(self) -> "StreamModel":
        """Return the same model with every block's arrays of its own, to read an image in pieces.

        Raises:
            ValueError: see `check_streamable`.
        """
        self.check_streamable()
        return StreamModel(stem=self.stem, blocks=self.stage.apart(), readout=self.readout)

    def _encode(
        self,
        images: Num[Array, "b H W colours"],
        *,
        mode: str | None,
        key: PRNGKeyArray | None = None,
        names: frozenset[str] = frozenset(),
    ) -> tuple[Float[Array, "b n c"], Layout, dict[str, Array], dict[str, Shaped[Array, "l ..."]]]:
        """Return the last block's tokens, their layout, the stem's intermediates, and those named of all blocks."""
        x, layout, embedded = self.stem(images)
        x, kept = self.stage(x, layout, mode=self.mode if mode is None else mode, key=key, names=names)
        return x, layout, embedded, kept


class StreamModel(nnx.Module):
    """A model that reads an image in pieces: `VisionModel.apart` makes it."""

    def __init__(self, *, stem: Stem | PixelStem, blocks: BlocksApart, readout: Readout) -> None:
        self.stem, self.blocks, self.readout = stem, blocks, readout
