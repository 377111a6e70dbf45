"""A pyramid: convolutional stages at the resolution of the stem, then stages of token mixers at a lower one."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num, PRNGKeyArray, Shaped

from vir_jax.models.batch_norm import BatchNorm
from vir_jax.models.conv_stage import Conv, ConvBlock, ConvNorm, PyramidStem
from vir_jax.models.layout import Layout
from vir_jax.models.mixers import Mixer
from vir_jax.models.model import VisionModel
from vir_jax.models.pyramid_readout import PyramidReadout
from vir_jax.models.pyramid_stream import PyramidStream
from vir_jax.models.stage import Block, BlocksApart, Stage, StageBlock

M = TypeVar("M", bound=nnx.Module)
MakeBlock = Callable[[nnx.Rngs], StageBlock]


class PyramidStage(nnx.Module):
    """Blocks of one width and resolution, and the convolution that makes the next stage's of them.

    Parameters: `parts.i.blocks` (one part, or two where the last blocks mix otherwise than the first), and
    `downsample.kernel [3, 3, c, 2 c]`, unless the stage is the last: stride 2, no bias, no norm.

    Args:
        dim: channels c.
        parts: what makes a block, and of each of these blocks the drop path rate. The first is computed in the mode
            that is asked for, the others in their only one. Those without blocks are left out.
        flips: whether every second block of the first part reads the tokens backwards.
        last: whether no stage follows.
        remat: one of `vir_jax.models.stage.REMAT`.
        dtype: of the computation.
        rngs: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        parts: Sequence[tuple[MakeBlock, Sequence[float]]],
        *,
        flips: bool,
        last: bool,
        remat: str,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.dim = dim
        self.parts = nnx.List(
            Stage(make, drop_path_rates=rates, remat=remat, flips=flips and i == 0, rngs=rngs)
            for i, (make, rates) in enumerate(parts)
            if rates
        )
        self.downsample = nnx.data(
            None
            if last
            else Conv(dim, 2 * dim, stride=2, use_bias=False, axes=(None, "embed"), dtype=dtype, rngs=rngs)
        )

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return sum(part.depth for part in self.parts)

    def __call__(
        self,
        x: Float[Array, "b n c"],
        layout: Layout,
        *,
        mode: str,
        key: PRNGKeyArray | None,
        names: frozenset[str],
    ) -> tuple[Float[Array, "b n c"], list[dict[str, Shaped[Array, "l ..."]]]]:
        """Apply the blocks: their tokens, and of each part the intermediates of these names that it has."""
        kept = []
        for i, part in enumerate(self.parts):
            part_key = None if key is None else jax.random.fold_in(key, i)
            own = names & frozenset(part.blocks.intermediate_names)
            x, found = part(x, layout, mode=mode if i == 0 else "auto", key=part_key, names=own)
            kept.append(found)
        return x, kept

    def shrink(self, x: Float[Array, "b n c"], layout: Layout) -> tuple[Float[Array, "b m d"], Layout]:
        """Return the next stage's tokens, float32, and their layout."""
        assert self.downsample is not None
        maps = self.downsample(layout.patch_map(x)).astype(jnp.float32)
        b, rows, cols, d = maps.shape
        return maps.reshape(b, rows * cols, d), Layout(cols=cols, patches=rows * cols, class_token=None)

    def multiply_adds(self, layout: Layout, mode: str) -> int:
        """Count those of its blocks, of one image."""
        return sum(
            part.depth * part.blocks.multiply_adds(layout, mode if i == 0 else "auto")
            for i, part in enumerate(self.parts)
        )


class Pyramid(VisionModel):
    """Images -> stem -> stages, each at half the resolution and twice the width of the one before -> logits.

    It reads images of any size: a map has ceil(side / stride) rows and columns. There is no class token and no
    position: the convolutions know where the border is. `create_model` makes the named ones (docs/pyramids.md).

    Parameters and statistics, all float32, are those of `stem`, `stages` and `readout`.

    Args:
        options: name and options that `create_model` made it of, JSON data; what a saved state must agree with.
        stem: images to the first stage's tokens.
        stages: convolutional ones first, those with mixers last.
        readout: tokens to logits.
        mode: form of the mixer where a call names none.
    """

    stem: PyramidStem  # type: ignore[assignment] # All that reads patches of it is overridden.
    readout: PyramidReadout

    def __init__(
        self,
        *,
        options: Mapping[str, Any],
        stem: PyramidStem,
        stages: Sequence[PyramidStage],
        readout: PyramidReadout,
        mode: str,
    ) -> None:
        self._options, self.mode = tuple(options.items()), mode
        self.stem, self.stages, self.readout = stem, nnx.List(stages), readout

    def __call__(
        self, images: Num[Array, "b H W colours"], *, mode: str | None = None, key: PRNGKeyArray | None = None
    ) -> Float[Array, "b *n classes"]:
        """Classify images or each of their pixels; see `VisionModel`. Images are of any size."""
        outputs = self._stage_outputs(images, mode=mode, key=key)
        return self._logits(outputs, images.shape[1:3])

    def feature_maps(
        self,
        images: Num[Array, "b H W colours"],
        blocks: Sequence[int] | None = None,
        *,
        mode: str | None = None,
        norm: bool = True,
    ) -> tuple[Float[Array, "b _ _ _"], ...]:
        """Return what each stage gives, before the convolution that halves it: maps `[b, rows, cols, c]`, float32.

        Args:
            images: normalised pixels, of any size.
            blocks: None: of a pyramid the maps are those of its stages.
            mode: form of the mixer; None: the model's own.
            norm: whether the last map goes through the norm before the head. The others have no norm of their own.

        Raises:
            ValueError: blocks are given, or as `__call__` does.
        """
        if blocks is not None:
            raise ValueError(
                f"blocks={tuple(blocks)}: a pyramid has a map for each of its {len(self.stages)} stages, at strides "
                f"{self.feature_strides}; leave blocks out"
            )
        *maps, last = self._stage_outputs(images, mode=mode)
        x, layout, _ = last
        last = (self.readout.norm(x) if norm else x), layout, []
        return tuple(layout.patch_map(x) for x, layout, _ in (*maps, last))

    @property
    def feature_strides(self) -> tuple[int, ...]:
        """Pixels between two places of each of the `feature_maps`."""
        return tuple(self.stem.patch << i for i in range(len(self.stages)))

    @property
    def feature_dims(self) -> tuple[int, ...]:
        """Channels of each of the `feature_maps`."""
        return tuple(stage.dim for stage in self.stages)

    def intermediates(
        self, images: Num[Array, "b H W colours"], names: Collection[str], *, mode: str | None = None
    ) -> dict[str, Array]:
        """Compute named intermediates of the (deterministic) forward pass; `intermediate_names` lists them.

        Returns:
            By name, in the order asked for; rows and columns are those of the stage:
            "stem" `[b, rows, cols, c]`: what the first stage reads;
            "stages.i.blocks.j.mixer.NAME": what block j of stage i computes in its mixer, see `VisionModel`;
            "stages.i.blocks.j.map" `[b, rows, cols, c]`: the block's output;
            "features" `[b, n, c]`: the last block's tokens after the norm;
            "logits" `[b, classes]`.

        Raises:
            ValueError: on an unknown name, naming the nearest ones.
        """
        self._check_intermediates(names)
        # "stages.2.blocks.0.mixer.q" asks for "mixer.q" of block 0, "stages.2.blocks.0.map" for its tokens.
        asked = [name.split(".", 4) for name in names if name.startswith("stages.")]
        wanted = frozenset("tokens" if last == "map" else last for *_, last in asked)
        found: dict[str, Array] = {}
        outputs = self._stage_outputs(images, mode=mode, names=wanted, found=found)
        for i, (_, layout, kept) in enumerate(outputs):
            blocks = [
                {name: values[j] for name, values in part.items()}
                for part, stage in zip(kept, self.stages[i].parts, strict=True)
                for j in range(stage.depth)
            ]
            for j, values in enumerate(blocks):
                for name, value in values.items():
                    path, is_map = f"stages.{i}.blocks.{j}.", name == "tokens"
                    found[path + ("map" if is_map else name)] = layout.patch_map(value) if is_map else value
        if "features" in names:
            found["features"] = self.readout.norm(outputs[-1][0])
        if "logits" in names:
            found["logits"] = self._logits(outputs, images.shape[1:3])
        return {name: found[name] for name in names}

    @property
    def intermediate_names(self) -> tuple[str, ...]:
        """All that `intermediates` can be asked for, in the order of computation."""
        names = ["stem"]
        for i, stage in enumerate(self.stages):
            parts = [part for part in stage.parts for _ in range(part.depth)]
            for j, part in enumerate(parts):
                of_block = ("map" if name == "tokens" else name for name in part.blocks.intermediate_names)
                names += [f"stages.{i}.blocks.{j}.{name}" for name in of_block]
        return (*names, "features", "logits")

    @property
    def patch(self) -> int:
        """Pixels between two tokens of the last stage. Sides of images need not be multiples."""
        return self.feature_strides[-1]

    @property
    def dim(self) -> int:
        """Width of the last stage."""
        return self.stages[-1].dim

    @property
    def depth(self) -> int:
        """Number of blocks, of all stages."""
        return sum(stage.depth for stage in self.stages)

    @property
    def mixer(self) -> Mixer:
        """Raise: there is no mixer of all blocks.

        Raises:
            ValueError: always.
        """
        self._refuse()

    @property
    def modes(self) -> tuple[str, ...]:
        """The forms of the mixer, equal in result."""
        return self._last_blocks().mixer.modes

    @property
    def retention(self) -> str | None:
        """Which decays weigh the tokens of the stages with mixers, "1d" or "2d"; None: there is no retention."""
        return self._last_blocks().mixer.retention

    @property
    def has_layer_scale(self) -> bool:
        """Whether the blocks with mixers have LayerScale."""
        return self._last_blocks().layer_scale1 is not None

    def layout(self, image_size: Sequence[int]) -> Layout:
        """Return where the last stage's tokens of an image of (height, width) pixels stand."""
        return self._layouts(image_size)[-1]

    def multiply_adds(self, image_size: Sequence[int], mode: str) -> int:
        """Count the multiply-adds of one image of (height, width) pixels; see `vir_jax.models.cost`."""
        layouts = self._layouts(image_size)
        head = self.readout.multiply_adds_of_stages([layout.grid for layout in layouts])
        total = self.stem.multiply_adds(image_size) + head
        total += sum(
            stage.multiply_adds(layout, mode) for stage, layout in zip(self.stages, layouts, strict=True)
        )
        for stage, smaller in zip(self.stages, layouts[1:], strict=False):
            assert stage.downsample is not None
            total += stage.downsample.multiply_adds(smaller.patches)
        return total

    def block(self, index: int) -> Block:
        """Raise; see `mixer`."""
        self._refuse()

    @property
    def needs_height(self) -> bool:
        """Whether a stream must know the image's height: a pyramid need not."""
        return False

    def check_streamable(self) -> None:
        """Check that the pyramid can read an image in one pass, strip by strip.

        Raises:
            ValueError: it cannot, and why.
        """
        parts = [part for stage in self.stages for part in stage.parts]
        mixers = [part.blocks.mixer for part in parts if isinstance(part.blocks, Block)]
        if other := [mixer for mixer in mixers if not mixer.causal]:
            raise ValueError(
                f"{self.options['name']} with {other[0].described} among its mixers cannot be streamed: it has no "
                "state that summarises earlier tokens. Use one with causal mixers and without late_attention, or give "
                "this one the whole image."
            )
        if any(part.flips for part in parts):
            raise ValueError(
                "a pyramid made with flips=True cannot be streamed: every second block reads the tokens backwards from "
                "the last. Use one made without flips, or give this one the whole image."
            )
        self.readout.check_streamable()

    def apart(self) -> PyramidStream:
        """Return the same pyramid to read an image in strips, with every block's arrays of its own.

        Raises:
            ValueError: see `check_streamable`.
        """
        self.check_streamable()
        convolutions, mixers = [], []
        halving = [stage.downsample for stage in self.stages if stage.downsample is not None]
        for stage in self.stages:
            blocks = [part.block(i) for part in stage.parts for i in range(part.depth)]
            of_convolutions = [block for block in blocks if isinstance(block, ConvBlock)]
            if of_convolutions:
                convolutions.append(of_convolutions)
            else:
                mixers.append(BlocksApart([block for block in blocks if isinstance(block, Block)]))
        first = len(convolutions)
        return PyramidStream(
            stem=self.stem,
            convolutions=list(zip(convolutions, halving[:first], strict=True)),
            stages=mixers,
            between=halving[first:],
            readout=self.readout,
            patch=self.patch,
        )

    def _refuse(self) -> NoReturn:
        raise ValueError(
            f"{self.options['name']} is a pyramid: its stages differ in width and number of tokens, and no class token "
            "reads them all; expected an isotropic model, such as vir_s16"
        )

    def _last_blocks(self) -> Block:
        """Return the blocks of the last stage, those that retention mixes where there are others, too."""
        blocks = self.stages[-1].parts[0].blocks
        assert isinstance(blocks, Block)
        return blocks

    def _layouts(self, image_size: Sequence[int]) -> list[Layout]:
        """Return where the tokens of every stage stand."""
        layouts = [self.stem.layout(image_size)]
        for _ in self.stages[1:]:
            rows, cols = (-(-side // 2) for side in layouts[-1].grid)
            layouts.append(Layout(cols=cols, patches=rows * cols, class_token=None))
        return layouts

    def _stage_outputs(
        self,
        images: Num[Array, "b H W colours"],
        *,
        mode: str | None,
        key: PRNGKeyArray | None = None,
        names: frozenset[str] = frozenset(),
        found: dict[str, Array] | None = None,
    ) -> list[tuple[Float[Array, "b _ _"], Layout, list[dict[str, Shaped[Array, "l ..."]]]]]:
        """Return of each stage its tokens, their layout, and of each part the named intermediates of its blocks."""
        x, layout, _ = self.stem(images)
        if found is not None:
            found["stem"] = layout.patch_map(x)
        outputs = []
        for i, stage in enumerate(self.stages):
            if i:
                x, layout = self.stages[i - 1].shrink(x, layout)
            stage_key = None if key is None else jax.random.fold_in(key, i)
            x, kept = stage(x, layout, mode=self.mode if mode is None else mode, key=stage_key, names=names)
            outputs.append((x, layout, kept))
        return outputs

    def _logits(
        self, outputs: Sequence[tuple[Float[Array, "b _ _"], Layout, Any]], image_size: Sequence[int]
    ) -> Float[Array, "b *n classes"]:
        """Return the logits of what `_stage_outputs` gives."""
        return self.readout.of_stages([layout.patch_map(x) for x, layout, _ in outputs], image_size)

    def _encode(
        self,
        images: Num[Array, "b H W colours"],
        *,
        mode: str | None,
        key: PRNGKeyArray | None = None,
        names: frozenset[str] = frozenset(),
    ) -> tuple[Float[Array, "b n c"], Layout, dict[str, Array], dict[str, Shaped[Array, "l ..."]]]:
        """Return the last stage's tokens and their layout."""
        x, layout, _ = self._stage_outputs(images, mode=mode, key=key)[-1]
        return x, layout, {}, {}


def fold_batch_norm(model: M) -> M:
    """Return a model for inference: every batch norm is folded into the convolution before it.

    What follows no convolution, the norm before the head, becomes a factor and a summand for each channel. The copy
    holds parameters alone and computes, but for rounding, what `model` does in evaluation; they share no array.

    Raises:
        ValueError: there is no batch norm in it.
    """
    folded = nnx.clone(model)
    found = [part for _, part in nnx.iter_modules(folded)]
    if not any(isinstance(part, BatchNorm) for part in found):
        raise ValueError(
            "the model has no batch norm to fold; expected a pyramid that was not folded yet, or a model "
            "with readout='dense_upernet'"
        )
    for part in found:
        if isinstance(part, ConvNorm | PyramidReadout):
            part.fold()
    return folded
