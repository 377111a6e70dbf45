"""What the device does to a batch before the model sees it: mixup, cutmix, soft targets.

Mixup: Zhang et al. 2018, arXiv 1710.09412. Cutmix: Yun et al. 2019, arXiv 1905.04899. Each example is mixed
with its neighbour in the batch, both ways, with one weight a pair. Examples come in random order, so a
neighbour is a random partner, and one that lives on the same device: mixing moves no data between devices.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


def smooth_labels(labels: Int[Array, " b"], num_classes: int, smoothing: float) -> Float[Array, "b classes"]:
    """Return one-hot targets with `smoothing` of the mass spread evenly over all classes."""
    return jax.nn.one_hot(labels, num_classes, dtype=jnp.float32) * (1 - smoothing) + smoothing / num_classes


def swap_neighbours(x: Array) -> Array:
    """Return examples 1, 0, 3, 2, ...: each one's partner."""
    return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)


def mixup(
    images: Float[Array, "b y x c"], targets: Float[Array, "b classes"], weight: Float[Array, " b"]
) -> tuple[Float[Array, "b y x c"], Float[Array, "b classes"]]:
    """Return weight * (image, target) + (1 - weight) * the partner's; partners share one weight."""
    w = weight[:, None, None, None]
    images = w * images + (1 - w) * swap_neighbours(images)
    return images, _mix_targets(targets, weight)


def cutmix(
    images: Float[Array, "b y x c"], targets: Float[Array, "b classes"], box: Bool[Array, "b y x"]
) -> tuple[Float[Array, "b y x c"], Float[Array, "b classes"]]:
    """Return the partner's pixels inside the box; targets weighted by the area that each image keeps."""
    images = jnp.where(box[..., None], swap_neighbours(images), images)
    return images, _mix_targets(targets, 1 - jnp.mean(box, axis=(1, 2), dtype=jnp.float32))


def _mix_targets(targets: Float[Array, "b classes"], weight: Float[Array, " b"]) -> Float[Array, "b classes"]:
    return weight[:, None] * targets + (1 - weight[:, None]) * swap_neighbours(targets)


def random_boxes(
    key: Key[Array, ""], area: Float[Array, " b"], height: int, width: int
) -> Bool[Array, "b y x"]:
    """Return one box an image, of the given share of its area before clipping at the border, in a random place.

    The box has the image's aspect ratio and its centre is uniform over the image (Yun et al., section 3.2).
    """
    side = jnp.sqrt(area)[:, None]
    centre_y, centre_x = jax.random.uniform(key, (2, area.shape[0], 1), jnp.float32)

    def covered(centre: Array, size: int) -> Array:
        start = jnp.clip(jnp.floor((centre - side / 2) * size + 0.5), 0, size)
        stop = jnp.clip(jnp.floor((centre + side / 2) * size + 0.5), 0, size)
        pixel = jnp.arange(size, dtype=jnp.int32)
        return (pixel >= start) & (pixel < stop)

    return covered(centre_y, height)[:, :, None] & covered(centre_x, width)[:, None, :]


def mix(
    key: Key[Array, ""],
    images: Float[Array, "b y x c"],
    targets: Float[Array, "b classes"],
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
    switch_probability: float,
) -> tuple[Float[Array, "b y x c"], Float[Array, "b classes"]]:
    """Apply mixup or cutmix, drawn for each pair, with weights from Beta(alpha, alpha).

    Args:
      key: of this step.
      images: any real-valued image, b even.
      targets: distributions over the classes.
      mixup_alpha: 0 turns mixup off.
      cutmix_alpha: 0 turns cutmix off.
      switch_probability: of cutmix where both are on.
    """
    if mixup_alpha == 0 and cutmix_alpha == 0:
        return images, targets
    b, height, width, _ = images.shape
    choice_key, mixup_key, cutmix_key, box_key = jax.random.split(key, 4)
    cutmix_probability = switch_probability if mixup_alpha > 0 else 1.0
    pairs = (b // 2,)
    probability = jnp.float32(cutmix_probability if cutmix_alpha > 0 else 0.0)
    use_cutmix = jnp.repeat(jax.random.bernoulli(choice_key, probability, pairs), 2)

    weight = jnp.ones(b, jnp.float32)
    if mixup_alpha > 0:
        drawn = jnp.repeat(jax.random.beta(mixup_key, mixup_alpha, mixup_alpha, pairs, jnp.float32), 2)
        weight = jnp.where(use_cutmix, 1.0, drawn)
    area = jnp.zeros(pairs, jnp.float32)
    if cutmix_alpha > 0:
        area = 1 - jax.random.beta(cutmix_key, cutmix_alpha, cutmix_alpha, pairs, jnp.float32)
    # One box a pair: what one image gives is what it gets.
    box = jnp.repeat(random_boxes(box_key, area, height, width), 2, axis=0) & use_cutmix[:, None, None]

    images, targets = mixup(images, targets, weight)
    return cutmix(images, targets, box)
