"""Multiply-adds of a forward pass, counted from the layers' sizes (docs/method.md, sections 3, 5 and 6)."""

from flax import nnx

from vir_jax.models.model import VisionModel
from vir_jax.models.variants import create_model


def flops(
    model: VisionModel | str, image_size: int | tuple[int, int] = 224, *, mode: str = "parallel"
) -> int:
    """Return the multiply-adds of a forward pass on one image; biases, norms and activations are not counted.

    In parallel mode every score of the masked square is computed, and counted, as in docs/method.md, section 3. The
    other forms are counted as in its section 6, two operations to a multiply-add.

    Args:
        model: a model, abstract (`nnx.eval_shape`) or not, or a name: default options, 1000 classes.
        image_size: pixels, a square's side or (height, width), as the model reads them.
        mode: form of the mixer, or "auto".

    Raises:
        ValueError: if the size does not divide into patches, or the mixer is not counted in this mode.
    """
    if isinstance(model, str):
        name = model
        model = nnx.eval_shape(lambda: create_model(name, num_classes=1000, rngs=nnx.Rngs(0)))
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    return model.multiply_adds(size, mode)
