"""Whole-batch augmentation: torchvision's v2 transforms, but for a batch (B, C, H, W) with numbers of its own per row.

What draws (`random_crop(images, draw, ...)`) only draws, and calls what does (`crop(images, top, left, ...)`), which is
a pure function of one number a row. Names, parameters and distributions are those of torchvision.transforms.v2.
Pictures are uint8 in 0..255 or floating in 0..1, on any device; the input is never changed, unless `inplace` says so.
`augment.scenes` does the same for pictures of any sizes with boxes and masks. Bytes first, floats last, is fast:

    image = augment.random_crop(image, draw, 32, padding=4)
    image = augment.random_horizontal_flip(image, draw, inplace=True)
    image = augment.normalize(image, mean, std)
"""

from tasks.augment import scenes
from tasks.augment.color import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    color_jitter,
    distort,
    gaussian_blur,
    grayscale,
    jitter,
    normalize,
    photometric_distort,
    random_gaussian_blur,
    random_grayscale,
)
from tasks.augment.mixing import beta, cutmix, mix, mixup, paste_partner
from tasks.augment.warp import (
    affine,
    central_resized_crop,
    random_affine,
    random_resized_crop,
    random_rotation,
    resize,
    resized_crop,
    rotate,
)
from tasks.augment.windows import (
    center_crop,
    crop,
    cutout,
    erase,
    horizontal_flip,
    random_crop,
    random_erasing,
    random_horizontal_flip,
    random_vertical_flip,
    vertical_flip,
)

__all__ = [
    "adjust_brightness", "adjust_contrast", "adjust_hue", "adjust_saturation", "affine", "beta", "center_crop",
    "central_resized_crop",
    "color_jitter", "crop", "cutmix", "cutout", "distort", "erase", "gaussian_blur", "grayscale", "horizontal_flip",
    "jitter", "mix", "mixup", "normalize", "paste_partner", "photometric_distort", "random_affine", "random_crop",
    "random_erasing", "random_gaussian_blur", "random_grayscale", "random_horizontal_flip", "random_resized_crop",
    "random_rotation", "random_vertical_flip", "resize", "resized_crop", "rotate", "scenes", "vertical_flip",
]  # fmt: skip
