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
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin
from torch.utils.data import Subset
from tqdm.auto import tqdm

from goat_kernels.command_errors import CommandError, one_line
from goat_kernels.finetuning.data import Examples, is_hidden, local_path, looks_like_path, read_hub, visible_files
from goat_kernels.finetuning.texts import as_labels

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

    def decoded(kind: str) -> bool:
        """Pillow has its pixels: of some formats it knows only the beginning, to tell what they are."""
        opener = Image.OPEN[kind][0]
        return kind != "MPEG" and not (isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile))

    registered = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in registered.items() if kind in Image.OPEN and decoded(kind))


def read_images(argument: str, source: str, image_column: str, label_column: str) -> Examples:
    """Images from a folder with one subfolder per class, or from the hub; none is opened."""
    if not looks_like_path(source):
        wanted = [("--image-column", image_column), ("--label-column", label_column)]
        images, labels = read_hub(argument, source, wanted)
        return Examples(images, as_labels(f"{argument} {source!r}", label_column, labels))
    path = _folder(argument, source)
    items, labels, others = [], [], Counter()
    for folder in _subfolders(path):
        files = visible_files(folder)
        images = [file for file in files if _is_image(file)]
        others.update(file.suffix.lower() or "no suffix" for file in files if not _is_image(file))
        items += images
        labels += [folder.name] * len(images)
    if not items:
        raise CommandError(f"{argument} {source!r} holds no class subfolders with images; it needs {_NEEDS}")
    strays = sum(_is_image(child) for child in path.iterdir() if child.is_file())
    if strays:
        print(f"{argument} {source!r}: left out {strays} images outside of the class subfolders")
    if others:
        kinds = ", ".join(f"{suffix} ({count})" for suffix, count in others.most_common(5))
        print(f"{argument} {source!r}: left out {others.total()} files that are no images by their names: {kinds}")
    return Examples(items, labels)


def split_folders(data: str, eval_data: str | None) -> tuple[str, str | None]:
    """``--data`` and ``--eval-data`` as they are, or the split folders inside ``--data`` in their place.

    The subfolders of ``data`` are splits where all of them that hold images have such names and hold class subfolders;
    classes of such names, with images directly in them, stay classes.
    """
    if not looks_like_path(data):
        return data, eval_data
    folders = {folder.name.lower(): folder for folder in _subfolders(_folder("--data", data)) if _has_images(folder)}
    classes = {name: _classes(folder) for name, folder in folders.items()}
    splits = [name for name in folders if name in (*_TRAINING, *_HELD_OUT)]
    flat = [folders[name].name for name in splits if not classes[name]]
    found = f"--data {data!r} has the folders {', '.join(f'{folder.name}/' for folder in folders.values())}"
    if len(splits) < len(folders) or len(flat) == len(folders):
        alike = [folder.name for name, folder in folders.items() if _LIKE_A_SPLIT.fullmatch(name) and classes[name]]
        hint = alike and (
            f", though {alike[0]}/ has subfolders of images itself; splits need the names train/ and test/ or the "
            "like, and nothing beside them, or --data and --eval-data"
        )
        if len(splits) > 1 or alike:
            print(f"warning: {found}: they are taken for classes, not for splits{hint or ''}")
        return data, eval_data
    training = next((name for name in _TRAINING if name in folders), None)
    if flat or training is None:
        lacks = f"{flat[0]}/ has no class subfolders with images" if flat else "none of them is train/"
        raise CommandError(f"{found}, which look like splits, but {lacks}; --data and --eval-data each need {_NEEDS}")
    held_out = [name for name in _HELD_OUT if name in folders]
    if eval_data is not None or not held_out:
        print(f"{found}: {folders[training].name}/ is --data")
        return str(folders[training]), eval_data
    chosen = held_out[0]
    for one, other in ((training, chosen), (chosen, training)):
        extra = sorted(classes[one] - classes[other])
        if extra:
            raise CommandError(
                f"--data {data!r}: {folders[one].name}/ has the classes {extra[:5]}, and {folders[other].name}/ lacks "
                "them; splits need the same classes (or name them apart, as --data and --eval-data)"
            )
    unused = "".join(f"; {folders[name].name}/ is not used" for name in held_out[1:])
    print(f"{found}: {folders[training].name}/ is --data, {folders[chosen].name}/ is --eval-data{unused}")
    return str(folders[training]), str(folders[chosen])


def _folder(argument: str, source: str) -> Path:
    path = local_path(argument, source, _NEEDS)
    if not path.is_dir():
        raise CommandError(f"{argument} {source!r} is a file; it needs {_NEEDS}")
    return path


def _subfolders(folder: Path) -> Sequence[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not is_hidden(child.name))


def _classes(folder: Path) -> set[str]:
    return {below.name for below in _subfolders(folder) if _has_images(below)}


def _has_images(folder: Path) -> bool:
    return any(map(_is_image, visible_files(folder)))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in image_suffixes() and not is_hidden(file.name)


# --- pixels -------------------------------------------------------------------------------------------------------

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
    if isinstance(item, Image.Image):
        _check_sign(item)
        return ImageOps.exif_transpose(item)
    if not isinstance(item, str | Path | bytes):
        raise ValueError(f"a {type(item).__name__} is no image")
    with Image.open(io.BytesIO(item) if isinstance(item, bytes) else item) as file:
        file.load()
        _check_sign(file)
        return ImageOps.exif_transpose(file)


def _check_sign(image: Image.Image) -> None:
    """Raise ValueError for a TIFF of unsigned 32-bit integers of which Pillow makes negative ones."""
    if image.mode != "I" or image.format != "TIFF" or image.getextrema()[0] >= 0:
        return
    if image.tag_v2.get(TiffImagePlugin.SAMPLEFORMAT, 1) in (1, (1,)):  # unsigned, also where the file says nothing
        raise ValueError("it has unsigned 32-bit pixels above 2,147,483,647, which Pillow reads as negative")


def to_rgb(image: Image.Image, extremes: Extremes) -> Image.Image:
    """``image`` in mode RGB, on white where it is transparent.

    16-bit pixels are divided by 65535. 32-bit integers and floats have no range of their own: the data set has, one for
    all its images, so that one stays brighter than another (:func:`pixel_range`).

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
    """What becomes black and what becomes white, in images of a mode without a range.

    That is 0 to 255 or 65535 (floats: 0 to 1 or 255) if all pixels of the data set are in there, otherwise 0, or its
    lowest pixel if that is negative, to its highest.
    """
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
    items, good, bad = examples.items, [], []
    extremes: Extremes = {}
    for i in tqdm(range(len(items)), desc=f"checking {argument}", unit="image", leave=False):
        try:
            image = open_image(items[i])
            if image.mode in _UNBOUNDED:
                extremes = merged(extremes, {image.mode: _extremes(image)})
            else:
                to_rgb(image, extremes)
        except Exception as error:  # see open_image
            local = isinstance(items, list) and isinstance(items[i], Path)
            name = str(items[i].relative_to(Path(source).expanduser())) if local else f"row {i + 1}"
            bad.append(f"{name} ({_reason(error)})")
        else:
            good.append(i)
    if bad:
        named = "; ".join(bad[:_NAMED]) + (f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else "")
        count = f"{argument} {source!r}: {len(bad)} of {len(items)} images"
        if not skip:
            raise CommandError(
                f"{count} cannot be read: {named}. They need to be replaced or removed, or --skip-bad-files to go on "
                "without"
            )
        if not good:
            raise CommandError(f"{count} cannot be read: {named}. There is no other")
        print(f"{count} are left out: {named}")
    return Examples(Subset(items, good), [examples.labels[i] for i in good]), extremes


def merged(one: Extremes, other: Extremes) -> Extremes:
    """The extremes of two sets of images together."""
    both = dict(one)
    for mode, (low, high) in other.items():
        both[mode] = (min(low, both[mode][0]), max(high, both[mode][1])) if mode in both else (low, high)
    return both


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
    return one_line(error, 100) or type(error).__name__
