"""Images: folders of classes or splits, the check that every file can be read, pixels of any kind -> 8-bit RGB.

Pillow's own ``convert("RGB")`` clips what has more than 8 bits, and drops the transparency, under which most files are
black.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin
from torch.utils.data import Subset
from tqdm.auto import tqdm

from goat_kernels.command_errors import CommandError, one_line
from goat_kernels.finetuning.data import Examples, as_labels, files_in, hidden, local_path, looks_like_path, read_hub

# --- folders ------------------------------------------------------------------------------------------------------

#: Names of split folders, in upper or lower case. Of several that are held out the first is measured on.
_TRAINING = ("train", "training")
_HELD_OUT = ("val", "valid", "validation", "eval", "evaluation", "dev", "test", "testing")

#: Names that a split folder may have but that are not taken for one: train_set, my-test, Train 2.
_LIKE_A_SPLIT = re.compile(rf"(.*[^a-z])?({'|'.join((*_TRAINING, *_HELD_OUT))})(sets?|data|split)?([^a-z].*)?")

_NEEDS = "a folder with one subfolder of images per class"


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of all formats that Pillow decodes, in lower case."""
    registered = Image.registered_extensions()  # also fills Image.OPEN
    # Of these formats Pillow knows only the beginning, to tell what they are.
    decoded = Image.OPEN.keys() - {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
    return frozenset(suffix for suffix, kind in registered.items() if kind in decoded)


def read_images(argument: str, source: str, image_column: str, label_column: str) -> Examples:
    """Images from a folder with one subfolder per class, or from the hub; none is opened."""
    named = f"{argument} {source!r}"
    if not looks_like_path(source):
        wanted = [("--image-column", image_column), ("--label-column", label_column)]
        images, labels = read_hub(argument, source, wanted)
        return Examples(images, as_labels(named, label_column, labels))
    path = _folder(argument, source)
    items, labels, others = [], [], Counter()
    for folder in _subfolders(path):
        for file in files_in(folder):
            if _is_image(file):
                items.append(file)
                labels.append(folder.name)
            else:
                others[file.suffix.lower() or "no suffix"] += 1
    if not items:
        raise CommandError(f"{named} holds no class subfolders with images; it needs {_NEEDS}")
    strays = sum(_is_image(child) and not hidden(child.name) for child in path.iterdir() if child.is_file())
    if strays:
        print(f"{named}: left out {strays} images outside of the class subfolders")
    if others:
        kinds = ", ".join(f"{suffix} ({count})" for suffix, count in others.most_common(5))
        print(f"{named}: left out {others.total()} files that are no images by their names: {kinds}")
    return Examples(items, labels)


def split_folders(data: str, eval_data: str | None) -> tuple[str, str | None]:
    """``--data`` and ``--eval-data`` as they are, or the split folders inside ``--data`` in their place.

    The subfolders of ``data`` are splits where all of them that hold images have such names and hold class subfolders.
    """
    if not looks_like_path(data):
        return data, eval_data
    # Subfolder that holds images -> the names of its own subfolders that do.
    classes = {
        folder: {below.name for below in _subfolders(folder) if any(map(_is_image, files_in(below)))}
        for folder in _subfolders(_folder("--data", data))
        if any(map(_is_image, files_in(folder)))
    }
    training = [folder for name in _TRAINING for folder in classes if folder.name.lower() == name]
    held_out = [folder for name in _HELD_OUT for folder in classes if folder.name.lower() == name]
    splits = [*training, *held_out]
    flat = [folder for folder in splits if not classes[folder]]
    found = f"--data {data!r} has the folders {', '.join(f'{folder.name}/' for folder in classes)}"
    if len(splits) < len(classes) or len(flat) == len(classes):
        alike = [folder for folder in classes if _LIKE_A_SPLIT.fullmatch(folder.name.lower()) and classes[folder]]
        hint = alike and (
            f", though {alike[0].name}/ has subfolders of images itself; splits need the names train/ and test/ or the "
            "like, and nothing beside them, or --data and --eval-data"
        )
        if len(splits) > 1 or alike:
            print(f"warning: {found}: they are taken for classes, not for splits{hint or ''}")
        return data, eval_data
    if flat or not training:
        lacks = f"{flat[0].name}/ has no class subfolders with images" if flat else "none of them is train/"
        raise CommandError(f"{found}, which look like splits, but {lacks}; --data and --eval-data each need {_NEEDS}")
    if eval_data is not None or not held_out:
        print(f"{found}: {training[0].name}/ is --data")
        return str(training[0]), eval_data
    for one, other in ((training[0], held_out[0]), (held_out[0], training[0])):
        if extra := sorted(classes[one] - classes[other]):
            raise CommandError(
                f"--data {data!r}: {one.name}/ has the classes {extra[:5]}, and {other.name}/ lacks them; splits need "
                "the same classes (or name them apart, as --data and --eval-data)"
            )
    unused = "".join(f"; {folder.name}/ is not used" for folder in held_out[1:])
    print(f"{found}: {training[0].name}/ is --data, {held_out[0].name}/ is --eval-data{unused}")
    return str(training[0]), str(held_out[0])


def _folder(argument: str, source: str) -> Path:
    path = local_path(argument, source, _NEEDS)
    if not path.is_dir():
        raise CommandError(f"{argument} {source!r} is a file; it needs {_NEEDS}")
    return path


def _subfolders(folder: Path) -> Sequence[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not hidden(child.name))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in image_suffixes()


# --- pixels -------------------------------------------------------------------------------------------------------

#: Mode of pixels without a declared range -> (lowest, highest) pixel of the images looked at.
Extremes = dict[str, tuple[float, float]]

#: Those modes in words, and the ranges that are tried before the data's own.
UNBOUNDED = {"I": ("32-bit integer", (255, 65535)), "F": ("float", (1, 255))}


def open_image(item: object) -> Image.Image:
    """Decode one image whole, its first frame if there are several, turned as its EXIF orientation says.

    ``item`` is a file; an image or a record with ``bytes`` or ``path``, as data sets on the hub have them. Raises
    whatever the decoder of the format raises, which is of a dozen types.
    """
    if isinstance(item, dict):
        item = item.get("bytes") or item.get("path")
    if not isinstance(item, Image.Image | str | Path | bytes):
        raise ValueError(f"a {type(item).__name__} is no image")
    if not isinstance(item, Image.Image):
        item = Image.open(io.BytesIO(item) if isinstance(item, bytes) else item)
    with item as image:
        image.load()
        negative = image.mode == "I" and image.format == "TIFF" and image.getextrema()[0] < 0
        # Unsigned, also where the file says nothing: Pillow reads the upper half of those integers as negative ones.
        if negative and image.tag_v2.get(TiffImagePlugin.SAMPLEFORMAT, 1) in (1, (1,)):
            raise ValueError("it has unsigned 32-bit pixels above 2,147,483,647, which Pillow reads as negative")
        return ImageOps.exif_transpose(image)


def to_rgb(image: Image.Image, extremes: Extremes) -> Image.Image:
    """``image`` in mode RGB, on white where it is transparent.

    16-bit pixels are divided by 65535. 32-bit integers and floats have no range of their own: the data set has, one for
    all its images (:func:`pixel_range`), so that one stays brighter than another.
    """
    if image.mode.startswith("I;16"):
        return _scaled(image, 0, 65535)
    if image.mode in UNBOUNDED:
        return _scaled(image, *pixel_range(image.mode, extremes))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def pixel_range(mode: str, extremes: Extremes) -> tuple[float, float]:
    """What becomes black and what becomes white, in images of a mode without a range: the first of ``UNBOUNDED`` that
    holds all pixels of the data set; otherwise from 0, or the lowest pixel where that is negative, to the highest."""
    low, high = extremes[mode]
    if low >= 0:
        return 0, next((limit for limit in UNBOUNDED[mode][1] if high <= limit), high)
    return low, high


def _scaled(image: Image.Image, low: float, high: float) -> Image.Image:
    pixels = np.asarray(image).astype(np.float64)
    grey = ((pixels - low) / ((high - low) or 1) * 255).clip(0, 255).round().astype(np.uint8)
    if isinstance(image.info.get("transparency"), int):  # one grey value that stands for it
        grey[pixels == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")


def check_images(argument: str, source: str, examples: Examples, skip: bool, extremes: Extremes) -> Examples:
    """Decode all images of ``source``, so that none ends the training; returns those that can be read.

    Updates ``extremes`` with their pixels.

    Raises:
        CommandError: some cannot be read and ``skip`` is false, or none can.
    """
    items, good, bad = examples.items, [], []
    for i in tqdm(range(len(items)), desc=f"checking {argument}", unit="image", leave=False):
        try:
            image = open_image(items[i])
            if image.mode in UNBOUNDED:
                pixels = np.asarray(image)
                low, high = float(pixels.min()), float(pixels.max())
                if not (math.isfinite(low) and math.isfinite(high)):
                    raise ValueError("it has pixels that are NaN or infinite")
                lowest, highest = extremes.get(image.mode, (low, high))
                extremes[image.mode] = (min(low, lowest), max(high, highest))
            else:
                to_rgb(image, extremes)
            good.append(i)
        except Exception as error:  # see open_image
            local = isinstance(items, list) and isinstance(items[i], Path)  # the hub's may raise once more
            name = str(items[i].relative_to(Path(source).expanduser())) if local else f"row {i + 1}"
            unknown = isinstance(error, Image.UnidentifiedImageError)
            reason = "no format of an image, or damaged at its beginning" if unknown else one_line(error, 100)
            bad.append(f"{name} ({reason or type(error).__name__})")
    if bad:
        named = "; ".join(bad[:5]) + (f"; and {len(bad) - 5} more" if len(bad) > 5 else "")
        count = f"{argument} {source!r}: {len(bad)} of {len(items)} images"
        if not (skip and good):
            needs = "They need to be replaced or removed, or --skip-bad-files to go on without"
            raise CommandError(f"{count} cannot be read: {named}. {'There is no other' if skip else needs}")
        print(f"{count} are left out: {named}")
    return Examples(Subset(items, good), [examples.labels[i] for i in good])
