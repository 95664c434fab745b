"""Pictures as files have them -> 8-bit RGB, as models take them; and the check that all of them can be read.

Two things would be lost in Pillow's own ``convert("RGB")``: it clips what has more than 8 bits, and it drops the
transparency, under which most files are black.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin
from tqdm.auto import tqdm

from goat_kernels.command_errors import CommandError
from goat_kernels.finetuning.data import Examples
from goat_kernels.finetuning.examples import Selection

#: Mode of pixels without a declared range -> (lowest, highest) pixel of the images looked at.
Extremes = dict[str, tuple[float, float]]

#: Those modes in words, and the ranges that are tried before the data's own.
_UNBOUNDED = {"I": ("32-bit integer", (255, 65535)), "F": ("float", (1, 255))}

#: Bad files that a message names.
_NAMED = 5


def open_image(item: object) -> Image.Image:
    """Decode one image whole, its first frame if there are several, turned as its EXIF orientation says.

    Args:
        item: a file; an image or a record with ``bytes`` or ``path``, as data sets on the hub have them.

    Raises:
        Exception: whatever the decoder of the format raises, which is of a dozen types.
    """
    if isinstance(item, dict):
        item = item.get("bytes") or item.get("path")
    if isinstance(item, bytes):
        item = io.BytesIO(item)
    if not isinstance(item, Image.Image):
        if not isinstance(item, str | Path | io.BytesIO):
            raise ValueError(f"a {type(item).__name__} is no image")
        with Image.open(item) as file:
            file.load()
            _check_sign(file)
            return ImageOps.exif_transpose(file)
    _check_sign(item)
    return ImageOps.exif_transpose(item)


def _check_sign(image: Image.Image) -> None:
    """Raise ValueError for a TIFF of unsigned 32-bit integers of which Pillow makes negative ones."""
    if image.mode != "I" or image.format != "TIFF" or image.getextrema()[0] >= 0:
        return
    formats = image.tag_v2.get(TiffImagePlugin.SAMPLEFORMAT, 1)  # 1: unsigned, which is meant where nothing is told
    if formats in (1, (1,)):
        raise ValueError("it has unsigned 32-bit pixels above 2,147,483,647, which Pillow reads as negative")


def to_rgb(image: Image.Image, extremes: Extremes) -> Image.Image:
    """``image`` in mode RGB, on white where it is transparent.

    16-bit pixels are divided by 65535. 32-bit integers and floats have no range of their own: the data set has, one for
    all its images, so that one stays brighter than another: 0 to 255 or 65535 (floats: 0 to 1 or 255) if all of its
    pixels are in there, otherwise from 0, or its lowest pixel if that is negative, to its highest.

    Args:
        image: of any mode.
        extremes: over the whole data set, from :func:`check_images`.
    """
    if image.mode.startswith("I;16"):
        return _scaled(image, 0, 65535)
    if image.mode in _UNBOUNDED:
        return _scaled(image, *pixel_range(image.mode, extremes))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def pixel_range(mode: str, extremes: Extremes) -> tuple[float, float]:
    """What becomes black and what becomes white, in images of a mode without a range."""
    low, high = extremes[mode]
    if low >= 0:
        return 0, next((limit for limit in _UNBOUNDED[mode][1] if high <= limit), high)
    return low, high


def _scaled(image: Image.Image, low: float, high: float) -> Image.Image:
    pixels = np.asarray(image).astype(np.float64)
    grey = ((pixels - low) / ((high - low) or 1) * 255).clip(0, 255).round().astype(np.uint8)
    if isinstance(image.info.get("transparency"), int):  # one grey value that stands for it
        grey[pixels == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")


def check_images(argument: str, source: str, examples: Examples, skip: bool) -> tuple[Examples, Extremes]:
    """Decode all images, with a progress bar, so that none ends the training.

    Args:
        argument: the option that named the source, for messages.
        source: folder or id.
        examples: the images with their classes.
        skip: whether to leave out what cannot be read.

    Returns:
        the examples that can be read, and the extremes of their pixels.

    Raises:
        CommandError: some cannot be read and ``skip`` is false, or none can.
    """
    good, bad = [], []
    extremes: Extremes = {}
    for i in tqdm(range(len(examples.items)), desc=f"checking {argument}", unit="image", leave=False):
        try:
            image = open_image(examples.items[i])
            if image.mode in _UNBOUNDED:
                extremes = merged(extremes, {image.mode: _extremes(image)})
            else:
                to_rgb(image, extremes)
        except Exception as error:  # see open_image
            bad.append((i, _reason(error)))
        else:
            good.append(i)
    if bad:
        named = "; ".join(f"{_name(source, examples.items, i)} ({reason})" for i, reason in bad[:_NAMED])
        more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        count = f"{argument} {source!r}: {len(bad)} of {len(examples.items)} images"
        message = f"{count} cannot be read: {named}{more}"
        if not skip:
            raise CommandError(f"{message}. They need to be replaced or removed, or --skip-bad-files to go on without")
        if not good:
            raise CommandError(f"{message}. There is no other")
        print(f"{count} are left out: {named}{more}")
    return Examples(Selection(examples.items, good), [examples.labels[i] for i in good]), extremes


def merged(one: Extremes, other: Extremes) -> Extremes:
    """The extremes of two sets of images together."""
    both = {mode: [extremes[mode] for extremes in (one, other) if mode in extremes] for mode in _UNBOUNDED}
    return {
        mode: (min(low for low, _ in found), max(high for _, high in found)) for mode, found in both.items() if found
    }


def describe_ranges(extremes: Extremes) -> list[str]:
    """A line for each mode of pixels without a range: which one they are scaled by."""
    ranges = {mode: pixel_range(mode, extremes) for mode in extremes}
    return [
        f"{_UNBOUNDED[mode][0]} pixels are scaled: {low:g} is black, {high:g} is white"
        for mode, (low, high) in ranges.items()
    ]


def _extremes(image: Image.Image) -> tuple[float, float]:
    pixels = np.asarray(image)
    low, high = float(pixels.min()), float(pixels.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("it has pixels that are NaN or infinite")
    return low, high


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        pixels = re.search(r"\d+", str(error))
        return (
            f"it has {int(pixels[0]):,} pixels; Pillow opens at most {2 * Image.MAX_IMAGE_PIXELS:,}, against files "
            "that are made to fill the memory"
        )
    if isinstance(error, Image.UnidentifiedImageError):
        return "no format of an image, or damaged at its beginning"
    return " ".join(f"{error}".split())[:100] or type(error).__name__


def _name(source: str, items: Sequence, i: int) -> str:
    if isinstance(items, list) and isinstance(items[i], Path):
        return str(items[i].relative_to(Path(source).expanduser()))
    return f"row {i + 1}"


def reader(extremes: Extremes) -> Callable[[object], Image.Image]:
    """From an item to its image in RGB."""
    return lambda item: to_rgb(open_image(item), extremes)
