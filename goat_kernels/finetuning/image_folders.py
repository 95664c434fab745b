"""Folders of images: one subfolder per class, or train/, test/ and the like with such subfolders in each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageFile

from goat_kernels.command_errors import CommandError
from goat_kernels.finetuning.data import Examples, is_hidden, local_path, looks_like_path, read_hub, visible_files

#: Names of split folders, in upper or lower case. Of several that are held out the first is measured on.
_TRAINING = ("train", "training")
_HELD_OUT = ("val", "valid", "validation", "eval", "evaluation", "dev", "test", "testing")

#: Names that a split folder may have but that are not taken for one: train_set, my-test, Train 2.
_LIKE_A_SPLIT = re.compile(rf"(.*[^a-z])?({'|'.join((*_TRAINING, *_HELD_OUT))})(sets?|data|split)?([^a-z].*)?")

_NEEDS = "a folder with one subfolder of images per class"


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of all formats that Pillow decodes, in lower case."""
    registered = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in registered.items() if kind in Image.OPEN and _is_decoded(kind))


def _is_decoded(kind: str) -> bool:
    """Whether Pillow has the pixels of that format; of some it knows the beginning alone, to tell what they are."""
    opener = Image.OPEN[kind][0]
    return kind != "MPEG" and not (isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile))


def read_images(argument: str, source: str, image_column: str, label_column: str) -> Examples:
    """Images from a folder with one subfolder per class, or from the hub; none is opened."""
    if not looks_like_path(source):
        images, labels = read_hub(
            argument, source, [("--image-column", image_column), ("--label-column", label_column)]
        )
        return Examples(images.values, labels.labels())
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

    Raises:
        CommandError: splits without one for training, with different classes, or only some with class subfolders.
    """
    if not looks_like_path(data):
        return data, eval_data
    root = _folder("--data", data)
    folders = {folder.name.lower(): folder for folder in _subfolders(root) if _has_images(folder)}
    splits = {name: _classes(folder) for name, folder in folders.items() if name in (*_TRAINING, *_HELD_OUT)}
    names = ", ".join(f"{folder.name}/" for folder in folders.values())
    flat = [folders[name].name for name, classes in splits.items() if not classes]
    if len(splits) < len(folders) or len(flat) == len(folders):
        alike = [folder for name, folder in folders.items() if _LIKE_A_SPLIT.fullmatch(name)]
        nested = next((folder.name for folder in alike if _classes(folder)), None)
        if len(splits) > 1 or nested:
            hint = (
                f", though {nested}/ has subfolders of images itself; splits need the names train/ and test/ or the "
                "like, and nothing beside them, or --data and --eval-data"
            )
            print(
                f"warning: --data {data!r} has the folders {names}: they are taken for classes, not for splits"
                f"{hint if nested else ''}"
            )
        return data, eval_data
    training = next((name for name in _TRAINING if name in folders), None)
    if flat or training is None:
        lacks = f"{flat[0]}/ has no class subfolders with images" if flat else "none of them is train/"
        raise CommandError(
            f"--data {data!r} has the folders {names}, which look like splits, but {lacks}; --data and --eval-data "
            f"each need {_NEEDS}"
        )
    held_out = [name for name in _HELD_OUT if name in folders]
    if eval_data is not None or not held_out:
        print(f"--data {data!r} has the folders {names}: {folders[training].name}/ is --data")
        return str(folders[training]), eval_data
    chosen = held_out[0]
    for one, other in ((training, chosen), (chosen, training)):
        extra = sorted(splits[one] - splits[other])
        if extra:
            raise CommandError(
                f"--data {data!r}: {folders[one].name}/ has the classes {extra[:5]}, and {folders[other].name}/ lacks "
                "them; splits need the same classes (or name them apart, as --data and --eval-data)"
            )
    unused = "".join(f"; {folders[name].name}/ is not used" for name in held_out[1:])
    print(
        f"--data {data!r} has the folders {names}: {folders[training].name}/ is --data, {folders[chosen].name}/ is "
        f"--eval-data{unused}"
    )
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
