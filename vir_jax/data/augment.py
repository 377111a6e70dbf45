"""Training augmentation of one image, on the host in uint8.

The order is timm's: crop and resize, flip, then RandAugment or colour jitter, then random erasing. Mixup,
cutmix, label smoothing and normalisation happen on the device, inside the step (timm with its prefetching
loader mixes ahead of erasing; here a mixed image can show the erased parts of both).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import cv2
import numpy as np
from jaxtyping import UInt8

from vir_jax.data import randaugment as ra
from vir_jax.data.decode import decode_image, jpeg_size
from vir_jax.data.masks import Mask, check_same_size, eval_mask, is_mask, resize_mask
from vir_jax.data.resize import eval_transform, resize, size_pair
from vir_jax.data.source import Example
from vir_jax.imports import load_object
from vir_jax.label_maps import IGNORED, check_masks_follow

_INTERPOLATIONS = {
    "bilinear": (cv2.INTER_LINEAR,),
    "bicubic": (cv2.INTER_CUBIC,),
    "random": (cv2.INTER_LINEAR, cv2.INTER_CUBIC),
}
_CROP_ATTEMPTS = 10
_ERASE_ATTEMPTS = 10
_ERASE_AREA = (0.02, 1 / 3)
_ERASE_LOG_RATIO = (math.log(0.3), math.log(1 / 0.3))


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """What happens to a training image; by default nothing but the central crop of evaluation."""

    # "resized": a random box, resized. "pad": the whole image with a border, a random window of it (for
    # small images). "none": the central crop of evaluation, with fraction 1.
    crop: Literal["resized", "pad", "none"] = "none"
    # Area of the random box, as a fraction of the image's. Only for crop "resized".
    crop_scale: tuple[float, float] = (0.08, 1.0)
    # Width over height of the random box, drawn on a logarithmic scale. Only for crop "resized".
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    # Width in pixels of the black border. Only for crop "pad".
    crop_padding: int = 4
    # How pixels are interpolated, in enlarging and in RandAugment's geometry; "random" chooses each time.
    interpolation: Literal["bilinear", "bicubic", "random"] = "random"
    # Probability of a horizontal flip; 0 switches it off.
    hflip: float = 0.0
    # RandAugment: operations per image; 0 switches it off.
    randaugment_ops: int = 0
    # RandAugment: mean strength of an operation, 0 to 10.
    randaugment_magnitude: float = 9.0
    # RandAugment: standard deviation of the strength.
    randaugment_std: float = 0.5
    # Colour jitter: brightness, contrast and saturation each change by a factor in 1 -+ this; 0 switches it
    # off. It acts only where RandAugment is off: timm's loader drops colour jitter as soon as RandAugment is
    # set, and a run's config may not name both.
    color_jitter: float = 0.0
    # Probability that a rectangle is replaced by noise, each pixel drawn on its own; 0 switches it off.
    erase: float = 0.0
    # What is done last, in code of one's own: a function of a view (uint8 [y x 3], not to be written to) and a
    # `numpy.random.Generator`, which gives another view of the same shape; or its name, "package.module:function".
    # "": nothing.
    transform: Callable[..., UInt8[np.ndarray, "y x 3"]] | str = ""
    # Mean and standard deviation per channel, on a scale of 0 to 1, that the model's input is normalised
    # with. The mean fills what geometric operations leave empty; erased pixels are drawn from both.
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.transform:
            function: Any = self.transform
            if isinstance(function, str):
                function = load_object(function, "augment.transform")
            if not callable(function):
                raise ValueError(f"augment.transform is {function!r}: expected a function of (image, rng)")
            object.__setattr__(self, "transform", function)
        for field, known in (("crop", ("resized", "pad", "none")), ("interpolation", tuple(_INTERPOLATIONS))):
            if getattr(self, field) not in known:
                raise ValueError(f"{field} is {getattr(self, field)!r}: expected one of {', '.join(known)}")
        for field in ("hflip", "erase"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} is {getattr(self, field)}: expected a probability, 0 to 1")
        for field in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, field)
            if not 0 < low <= high:
                raise ValueError(f"{field} is {(low, high)}: expected 0 < low <= high")
        if not self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale is {self.crop_scale}: a crop cannot be larger than the image")
        if not 0 <= self.randaugment_magnitude <= 10:
            raise ValueError(f"randaugment_magnitude is {self.randaugment_magnitude}: expected 0 to 10")
        for field in ("crop_padding", "randaugment_ops", "randaugment_std", "color_jitter"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} is {getattr(self, field)}: expected 0 (off) or more")


def augment_example(
    example: Example,
    image_size: tuple[int, int],
    config: AugmentConfig,
    rng: np.random.Generator,
    *,
    decode: Callable[..., UInt8[np.ndarray, "y x 3"]],
) -> tuple[UInt8[np.ndarray, "_y _x 3"], np.int32 | UInt8[np.ndarray, "_y _x"]]:
    """Return one random view of an example, and its label, or those of its pixels; see the next two functions."""
    image, label = example["image"], example["label"]
    if is_mask(label):
        return augment_with_mask(image, label, image_size, config, rng, decode=decode)
    return augment_image(image, image_size, config, rng, decode=decode), np.int32(label)


def augment_image(
    image: bytes | UInt8[np.ndarray, "y x 3"],
    image_size: int | tuple[int, int],
    config: AugmentConfig,
    rng: np.random.Generator,
    *,
    decode: Callable[..., UInt8[np.ndarray, "y x 3"]] = decode_image,
) -> UInt8[np.ndarray, "_y _x 3"]:
    """Return one random view of an image.

    Args:
      image: an encoded file or RGB pixels; pixels are not written to.
      image_size: side, or (height, width), of the result.
      config: what is done.
      rng: source of all randomness.
      decode: `decode_image`, with or without arguments of its own.

    Raises:
      CorruptImageError: `image` cannot be decoded.
    """
    size = size_pair(image_size)
    if config.crop == "resized":
        view = random_resized_crop(image, size, config, rng, decode=decode)
    else:
        pixels = decode(image) if isinstance(image, bytes) else image
        view = eval_transform(pixels, size, crop_fraction=1.0)
        if config.crop == "pad":
            view = random_pad_crop(view, config.crop_padding, rng)
    if rng.random() < config.hflip:
        view = cv2.flip(view, 1)
    if config.randaugment_ops:
        view = ra.randaugment(
            view,
            rng,
            num_ops=config.randaugment_ops,
            magnitude=config.randaugment_magnitude,
            magnitude_std=config.randaugment_std,
            interpolations=_INTERPOLATIONS[config.interpolation],
            fill=tuple(round(255 * m) for m in np.broadcast_to(config.mean, 3).tolist()),
        )
    elif config.color_jitter:
        view = color_jitter(view, config.color_jitter, rng)
    if rng.random() < config.erase:
        view = random_erase(view, config.mean, config.std, rng)
    if config.transform:
        view = _transformed(view, config.transform, rng)
    return view


def augment_with_mask(
    image: bytes | UInt8[np.ndarray, "y x 3"],
    mask: Mask,
    image_size: int | tuple[int, int],
    config: AugmentConfig,
    rng: np.random.Generator,
    *,
    decode: Callable[..., UInt8[np.ndarray, "y x 3"]] = decode_image,
) -> tuple[UInt8[np.ndarray, "_y _x 3"], UInt8[np.ndarray, "_y _x"]]:
    """Return one random view of an image, and its mask in the same geometry: `IGNORED` where there is no image.

    The image is decoded at its full size, so that mask and image are cut alike. Arguments are those of
    `augment_image`. RandAugment, erasing and `transform` know nothing of masks.

    Raises:
      CorruptExampleError: `image` cannot be decoded, or the mask has another size.
      ValueError: a config that does what masks cannot follow.
    """
    check_masks_follow(config)
    size = size_pair(image_size)
    pixels = decode(image) if isinstance(image, bytes) else image
    check_same_size(pixels, mask)
    if config.crop == "resized":
        (top, left, h, w), interpolation = _draw_crop(mask.shape[0], mask.shape[1], config, rng)
        view = resize(pixels[top : top + h, left : left + w], size, interpolation)
        mask = resize_mask(mask, size, (left, top, left + w, top + h))
    else:
        view, mask = eval_transform(pixels, size, crop_fraction=1.0), eval_mask(mask, size, 1.0)
        if config.crop == "pad":
            corner = _draw_corner(config.crop_padding, rng)
            view = _shifted(view, config.crop_padding, corner, 0)
            mask = _shifted(mask, config.crop_padding, corner, IGNORED)
    if rng.random() < config.hflip:
        view, mask = cv2.flip(view, 1), cv2.flip(mask, 1)
    if config.color_jitter:
        view = color_jitter(view, config.color_jitter, rng)
    return view, mask


def _transformed(
    view: UInt8[np.ndarray, "y x 3"], transform: Callable[..., Any] | str, rng: np.random.Generator
) -> UInt8[np.ndarray, "y x 3"]:
    assert callable(transform)
    found = transform(view, rng)
    if not isinstance(found, np.ndarray) or (found.shape, found.dtype) != (view.shape, view.dtype):
        what = f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else type(found).__name__
        raise ValueError(f"augment.transform gave {what}: expected uint8 {view.shape}, as it was given")
    return found


def random_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of a random box in an image of `height` x `width` pixels.

    Area and aspect ratio are drawn until the box fits, ten times at most; then the largest central box of an
    allowed ratio is taken.
    """
    areas = height * width * rng.uniform(*scale, size=_CROP_ATTEMPTS)
    ratios = np.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1]), size=_CROP_ATTEMPTS))
    for area, aspect in zip(areas.tolist(), ratios.tolist(), strict=True):
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def random_resized_crop(
    image: bytes | UInt8[np.ndarray, "y x 3"],
    size: tuple[int, int],
    config: AugmentConfig,
    rng: np.random.Generator,
    *,
    decode: Callable[..., UInt8[np.ndarray, "y x 3"]] = decode_image,
) -> UInt8[np.ndarray, "_y _x 3"]:
    """Return a random box of the image, resized to `size`.

    The box is drawn before a JPEG is decoded: where it is at least twice the size that is wanted, the image
    is decoded at a half, quarter or eighth (see `decode_image`).
    """
    if isinstance(image, bytes):
        height, width = jpeg_size(image) or (image := decode(image)).shape[:2]
    else:
        height, width = image.shape[:2]
    (top, left, h, w), interpolation = _draw_crop(height, width, config, rng)
    if isinstance(image, bytes):
        enough = math.ceil(height * size[0] / h), math.ceil(width * size[1] / w)
        image = decode(image, min_size=enough)
        shrunk = round(height / image.shape[0])  # by 1, 2, 4 or 8 exactly; the last row may stand for fewer
        top, left, h, w = top // shrunk, left // shrunk, max(1, h // shrunk), max(1, w // shrunk)
    return resize(image[top : top + h, left : left + w], size, interpolation)


def _draw_crop(
    height: int, width: int, config: AugmentConfig, rng: np.random.Generator
) -> tuple[tuple[int, int, int, int], int]:
    """Return a random box, (top, left, height, width), and how OpenCV is to interpolate in it."""
    box = random_box(height, width, config.crop_scale, config.crop_ratio, rng)
    interpolations = _INTERPOLATIONS[config.interpolation]
    return box, interpolations[rng.integers(len(interpolations))]


def random_pad_crop(
    image: UInt8[np.ndarray, "y x 3"], padding: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "y x 3"]:
    """Shift by up to `padding` pixels in each direction; what comes in is black."""
    return _shifted(image, padding, _draw_corner(padding, rng), 0)


def _draw_corner(padding: int, rng: np.random.Generator) -> tuple[int, int]:
    """Return (top, left) of a random window in an image with a border of `padding` pixels."""
    top, left = rng.integers(2 * padding + 1, size=2).tolist()
    return top, left


def _shifted(
    image: UInt8[np.ndarray, "y x *c"], padding: int, corner: tuple[int, int], fill: int
) -> UInt8[np.ndarray, "y x *c"]:
    """Return the window of an image's size at `corner` of it and its border."""
    (height, width), (top, left) = image.shape[:2], corner
    padded = cv2.copyMakeBorder(
        image, padding, padding, padding, padding, cv2.BORDER_CONSTANT, value=(fill,) * 3
    )
    return np.ascontiguousarray(padded[top : top + height, left : left + width])


def color_jitter(
    image: UInt8[np.ndarray, "y x 3"], strength: float, rng: np.random.Generator
) -> UInt8[np.ndarray, "y x 3"]:
    """Change brightness, contrast and saturation by factors uniform in 1 -+ strength, in random order."""
    operations = (ra.brightness, ra.contrast, ra.color)
    for index in rng.permutation(len(operations)):
        image = operations[index](image, rng.uniform(max(0, 1 - strength), 1 + strength))
    return image


def random_erase(
    image: UInt8[np.ndarray, "y x 3"],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    rng: np.random.Generator,
) -> UInt8[np.ndarray, "y x 3"]:
    """Replace a random rectangle of 2 to 33 % of the area by noise with the data's mean and deviation.

    After normalisation the noise is standard normal (timm's "pixel" mode), but for the clipping to 0..255,
    about two standard deviations from the mean.
    """
    height, width = image.shape[:2]
    for _ in range(_ERASE_ATTEMPTS):
        area = height * width * rng.uniform(*_ERASE_AREA)
        aspect = math.exp(rng.uniform(*_ERASE_LOG_RATIO))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            noise = rng.standard_normal((h, w, len(mean)), np.float32)  # Of one mean: grey.
            pixels = 255 * (np.array(mean, np.float32) + np.array(std, np.float32) * noise)
            image = image.copy()
            image[top : top + h, left : left + w] = np.clip(np.rint(pixels), 0, 255)
            return image
    return image
