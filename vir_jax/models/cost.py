"""What a forward pass costs, counted from the shapes."""

from flax import nnx

from vir_jax.models.backbone import VisionBackbone, patch_grid
from vir_jax.models.mixers import Retention
from vir_jax.models.variants import create_model
from vir_jax.ops.sequence import CHUNK_SIZE


def flops(
    model: VisionBackbone | str, image_size: int | tuple[int, int] = 224, *, mode: str = "parallel"
) -> int:
    """Multiply-adds of a forward pass on one image, counted as the field's tables count "FLOPs".

    Counted are the matrix products, a multiplication and its addition as one: patch embedding, projections,
    MLPs, head, and the mixer over all n tokens. Norms, GELU, masks and biases are not. In the parallel form
    the n x n scores are counted whole, although half are masked: that gives the table of PAPER.md section 3.
    The other forms are counted as in its section 6, two operations to a multiply-add.

    Args:
        model: a model, abstract (`nnx.eval_shape`) or not, or a name: default options, 1000 classes.
        image_size: pixels, a square's side or (height, width), divisible by the patch.
        mode: form of the mixer: "parallel", "recurrent" or "chunkwise", the last two for 1-D retention alone.

    Raises:
        ValueError: if the size does not divide into patches, or the mixer is not counted in this mode.
    """
    if isinstance(model, str):
        name = model
        model = nnx.eval_shape(lambda: create_model(name, num_classes=1000, rngs=nnx.Rngs(0)))
    c, depth, patch = model.dim, model.depth, model.patch
    rows, cols = patch_grid((image_size, image_size) if isinstance(image_size, int) else image_size, patch)
    n = rows * cols * (2 if model.bidirectional else 1) + 1

    mixer = model.blocks.mixer
    if mode == "parallel":
        mixing = 2 * n * n * c
    elif not isinstance(mixer, Retention):
        raise ValueError(f"{type(mixer).__name__} is counted in mode 'parallel' alone; got {mode!r}.")
    elif mode == "chunkwise":
        mixing = 2 * n * c * (min(mixer.chunk_size or CHUNK_SIZE, n) + mixer.head_dim)
    elif mode == "recurrent":
        mixing = 5 * n * c * mixer.head_dim // 2
    else:
        raise ValueError(
            f"mode is {mode!r}; expected 'parallel', 'recurrent' or 'chunkwise': the count differs."
        )
    projections_and_mlp = (4 + 8) * n * c * c
    patch_embedding = rows * cols * 3 * patch * patch * c
    return patch_embedding + depth * (projections_and_mlp + mixing) + c * model.num_classes
