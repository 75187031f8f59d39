"""Random changes of whole batches of pictures, as tensor operations.

Inside training a picture is 'ink': colour minus white, in [-1, 0], so that white is zero and every
padding, of a convolution as of a rotation, is paper.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# Preprocessing of both models: (colour - MEAN) / STD on the 0..1 scale.
MEAN = 1.0
STD = 0.4


@dataclass(frozen=True)
class Augmentation:
    """How far pictures are changed; scales are sides of the crop relative to the picture's."""

    smallest_side: float
    largest_side: float
    rotation: float  # largest angle, degrees
    flip: float  # probability
    colour: float  # strength of contrast, saturation, hue changes, 0 to 1
    grey: float  # probability of losing colour
    blank: float  # probability of a patch painted over


CLIP_AUGMENTATION = Augmentation(0.65, 1.15, 8, 0.25, 0.35, 0.05, 0.2)
CLIP_AUGMENTATION_LATER = Augmentation(0.6, 1.15, 12, 0.25, 0.45, 0.08, 0.3)
GLOBAL_CROP = Augmentation(0.5, 1.1, 10, 0.5, 0.4, 0.1, 0.0)
LOCAL_CROP = Augmentation(0.3, 0.6, 10, 0.5, 0.4, 0.1, 0.0)


def uniform(count: int, low: float, high: float) -> Tensor:
    return torch.empty(count).uniform_(low, high)


def random_crops(ink: Tensor, size: int, how: Augmentation) -> Tensor:
    """Crops, stretches, turns and flips: (n, 3, h, h) -> (n, 3, size, size)."""
    n = len(ink)
    side = uniform(n, how.smallest_side, how.largest_side)
    stretch = torch.exp(uniform(n, -0.25, 0.25))
    width, height = side * stretch, side / stretch
    flip = 1 - 2 * (torch.rand(n) < how.flip).float()
    angle = uniform(n, -how.rotation, how.rotation) * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    shift_x = uniform(n, -1, 1) * (1 - width).abs()
    shift_y = uniform(n, -1, 1) * (1 - height).abs()
    first = torch.stack([width * cos * flip, -height * sin, shift_x], dim=1)
    second = torch.stack([width * sin * flip, height * cos, shift_y], dim=1)
    grid = functional.affine_grid(torch.stack([first, second], dim=1), (n, 3, size, size), False)
    return functional.grid_sample(ink, grid, align_corners=False)


def random_colours(ink: Tensor, how: Augmentation) -> Tensor:
    """Changes contrast, channel balance and saturation; white paper mostly stays white."""
    n = len(ink)
    strength = how.colour
    gain = torch.exp(uniform(n * 4, -strength, strength) * 0.6).view(n, 4)
    ink = ink * (gain[:, :1] * gain[:, 1:] ** 0.7).view(n, 3, 1, 1)
    grey = ink.mean(dim=1, keepdim=True)
    keep = 1 - strength * torch.rand(n)
    keep[torch.rand(n) < how.grey] = 0
    return torch.lerp(grey.expand_as(ink), ink, keep.view(n, 1, 1, 1)).clamp_(-1, 0)


def random_blanks(ink: Tensor, how: Augmentation) -> Tensor:
    """Paints a square of paper over some pictures (cutout, arXiv:1708.04552)."""
    n, _, height, width = ink.shape
    side = uniform(n, 0.2, 0.45)
    side[torch.rand(n) >= how.blank] = 0
    rows = torch.arange(height) / height - (uniform(n, 0, 1) * (1 - side))[:, None]
    columns = torch.arange(width) / width - (uniform(n, 0, 1) * (1 - side))[:, None]
    in_rows = (rows >= 0) & (rows < side[:, None])
    in_columns = (columns >= 0) & (columns < side[:, None])
    return ink.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0)


def augment(pictures: Tensor, size: int, how: Augmentation) -> Tensor:
    """uint8 (n, 3, h, h) -> normalised float (n, 3, size, size), channels last."""
    ink = pictures.float().div_(255).sub_(1)
    ink = random_colours(random_crops(ink, size, how), how)
    if how.blank:
        ink = random_blanks(ink, how)
    return ink.div_(STD).contiguous(memory_format=torch.channels_last)


def normalise(pictures: Tensor) -> Tensor:
    """uint8 (n, 3, h, h) -> the same pictures as the models read them, unchanged otherwise."""
    ink = pictures.float().div_(255).sub_(MEAN).div_(STD)
    return ink.contiguous(memory_format=torch.channels_last)
