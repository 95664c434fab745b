"""Images for ``goat-kernels finetune``: every mode in its own range, bad files before training, folders of splits."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from test_cli_tasks import finetune, results, vit

from goat_kernels.command_errors import CommandError
from goat_kernels.finetuning import run
from goat_kernels.finetuning.images import (
    check_images,
    image_suffixes,
    open_image,
    pixel_range,
    read_images,
    split_folders,
    to_rgb,
)
from goat_kernels.finetuning.tasks import load_task

__all__ = ["vit"]  # fixture


@pytest.fixture(autouse=True)
def _empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


#: Left half, right half: a fifth and four fifths of white.
DARK, BRIGHT = 51, 204


def halves(low, high, dtype) -> np.ndarray:
    pixels = np.full((6, 8), low, dtype)
    pixels[:, 4:] = high
    return pixels


def put(name: str, pixels: np.ndarray | None = None, **options) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(halves(DARK, BRIGHT, np.uint8) if pixels is None else pixels).save(path, **options)
    return path


def read(folder: str = "set", argument: str = "--data", skip: bool = False, extremes: dict | None = None):
    """The examples, and the extremes of their pixels (``extremes``, widened)."""
    extremes = {} if extremes is None else extremes
    return check_images(argument, folder, read_images(argument, folder, "image", "label"), skip, extremes), extremes


def greys(item, extremes) -> list[list[int]]:
    """The RGB values of a dark and of a bright pixel."""
    image = to_rgb(open_image(item), extremes)
    assert image.mode == "RGB" and image.size == (8, 6)
    return [list(image.getpixel((x, 3))) for x in (1, 6)]


EXPECTED = [[DARK] * 3, [BRIGHT] * 3]

#: The two halves as files that have them in other ranges.
MODES = {
    "8 bits": ("a.png", halves(DARK, BRIGHT, np.uint8)),
    "16 bits": ("a.png", halves(13107, 52428, np.uint16)),
    "16 bits in a TIFF": ("a.tif", halves(13107, 52428, np.uint16)),
    "big-endian 16 bits": ("a.pgm", halves(13107, 52428, np.uint16)),
    "integers of 16 bits": ("a.tiff", halves(13107, 52428, np.int32)),
    "integers of 8 bits": ("a.tiff", halves(DARK, BRIGHT, np.int32)),
    "floats to 1": ("a.tiff", halves(0.2, 0.8, np.float32)),
    "floats to 255": ("a.tiff", halves(DARK, BRIGHT, np.float32)),
}


@pytest.mark.parametrize(("name", "pixels"), MODES.values(), ids=MODES.keys())
def test_every_mode_is_scaled_by_its_range(name, pixels):
    file = put(f"set/a/{name}", pixels)
    put("set/b/b.png")
    assert greys(file, read()[1]) == EXPECTED


@pytest.mark.parametrize(("dtype", "top"), [(np.int32, 4_000_000), (np.float32, 1000.0)])
def test_a_data_set_beyond_the_usual_ranges_is_scaled_by_its_own_with_one_factor(dtype, top):
    bright, dark = put("set/a/1.tiff", halves(0, top, dtype)), put("set/a/2.tiff", halves(0, top / 4, dtype))
    put("set/b/b.png")
    extremes = read()[1]
    assert pixel_range(next(iter(extremes)), extremes) == (0, top)
    assert greys(bright, extremes)[1] == [255] * 3 and greys(dark, extremes)[1] == [64] * 3


def test_negative_pixels_are_black_at_the_lowest_of_the_data_set():
    """As in CT images; held-out images count too, so that both halves are scaled alike."""
    train, held_out = put("set/a/1.tiff", halves(-100, 300, np.int32)), put("new/a/1.tiff", halves(-200, 0, np.int32))
    extremes = read("new", "--eval-data", extremes=read()[1])[1]
    assert extremes == {"I": (-200.0, 300.0)}
    assert [greys(train, extremes)[i][0] for i in (0, 1)] == [51, 255]
    assert [greys(held_out, extremes)[i][0] for i in (0, 1)] == [0, 102]


def transparent(mode: str) -> Image.Image:
    """White paper, left half, and 60 % black, right half, all of it in black with transparency."""
    alpha = Image.fromarray(halves(0, 153, np.uint8))
    if mode == "P":
        image = Image.new("P", (8, 6), 0)
        image.putpalette([0, 0, 0, 0, 0, 0, 90, 90, 90])
        ImageDraw.Draw(image).rectangle((4, 0, 7, 5), fill=1)
        return image
    return Image.merge(mode, [Image.new("L", alpha.size, 0)] * (len(mode) - 1) + [alpha])


@pytest.mark.parametrize(("mode", "name"), [("LA", "a.png"), ("RGBA", "a.png"), ("RGBA", "a.webp"), ("P", "a.png")])
def test_transparent_images_lie_on_white(mode, name):
    options = {"transparency": bytes([0, 153])} if mode == "P" else {"lossless": True} if name == "a.webp" else {}
    Path("set/a").mkdir(parents=True)
    transparent(mode).save(f"set/a/{name}", **options)
    assert greys(Path(f"set/a/{name}"), {}) == [[255] * 3, [102] * 3]


def test_one_transparent_colour_lies_on_white_too():
    Path("set").mkdir()
    Image.fromarray(halves(7, BRIGHT, np.uint8)).save("set/grey.png", transparency=7)
    Image.fromarray(halves(7, 52428, np.uint16)).save("set/deep.png", transparency=7)
    for name in ("set/grey.png", "set/deep.png"):
        assert greys(Path(name), {}) == [[255] * 3, [BRIGHT] * 3], name


def test_other_modes_keep_what_they_show():
    image = Image.fromarray(halves(DARK, BRIGHT, np.uint8)).convert("RGB")
    for mode in ("CMYK", "YCbCr", "HSV"):
        found = to_rgb(image.convert(mode), {})
        assert np.abs(np.asarray(found).astype(int) - np.asarray(image)).max() <= 2, mode


def test_an_image_is_turned_as_its_camera_was():
    exif = Image.Exif()
    exif[0x0112] = 8  # the camera stood on its side
    upright = Image.fromarray(halves(DARK, BRIGHT, np.uint8))
    upright.rotate(-90, expand=True).save("a.png", exif=exif)
    assert greys(Path("a.png"), {}) == EXPECTED


def test_every_format_that_pillow_opens_is_an_image():
    assert {".jfif", ".jpe", ".jp2", ".tga", ".avif", ".ppm", ".webp"} <= image_suffixes()
    assert ".pdf" not in image_suffixes()  # it only writes those
    assert image_suffixes().isdisjoint(
        {".h5", ".hdf", ".grib", ".bufr", ".mpg", ".mpeg", ".wmf"}
    )  # it only knows those
    for name in ("set/a/1.JFIF", "set/b/1.ppm"):
        put(name, format="JPEG" if "JFIF" in name else "PPM")
    examples, _ = read()
    assert examples.labels == ["a", "b"]


def test_hidden_files_and_folders_are_no_data_and_others_are_named(capsys):
    put("set/a/1.png"), put("set/b/1.png"), put("set/.ipynb_checkpoints/1-checkpoint.png")
    put("set/a/.thumbnails/1.png"), put("set/__MACOSX/a/1.png")
    for name in ("set/a/._1.png", "set/.DS_Store", "set/a/.DS_Store", "set/b/Thumbs.db"):
        Path(name).write_bytes(b"\0\5\x16\7")
    Path("set/b/2.heic").touch(), Path("set/b/list").touch()
    put("set/lost.png")
    examples, _ = read()
    assert [str(item) for item in examples.items] == ["set/a/1.png", "set/b/1.png"] and examples.labels == ["a", "b"]
    printed = capsys.readouterr().out
    assert "left out 2 files" in printed and ".heic (1), no suffix (1)" in printed
    assert "left out 1 images outside of the class subfolders" in printed


def spoil(count: int = 1) -> None:
    """Two classes of ten, the first ``count`` of them damaged behind their headers."""
    rng = np.random.default_rng(1)
    for label in ("left", "right"):
        for i in range(10):
            put(f"set/{label}/{i}.png", rng.integers(0, 255, (40, 40), np.uint8))
    for file in sorted(Path("set/left").iterdir())[:count]:
        file.write_bytes(file.read_bytes()[:-300])


def test_bad_files_are_found_before_training_named_and_counted(vit, capsys):
    spoil(7)
    assert finetune("--task", "image-classification", "--model", vit, "--data", "set", "--max-steps", "1") == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "7 of 20 images cannot be read: left/0.png" in message and "and 2 more" in message
    assert "--skip-bad-files" in message and not Path("goat-output").exists()


def test_bad_files_are_skipped_where_that_is_asked_for(vit, capsys):
    spoil(2)
    arguments = ["--task", "image-classification", "--model", vit, "--data", "set", "--skip-bad-files"]
    assert finetune(*arguments, "--methods", "head", "--max-steps", "1") == 0
    printed = capsys.readouterr().out
    assert "2 of 20 images are left out: left/0.png" in printed
    assert "2 classes (training + held out): left: 6 + 2, right: 8 + 2" in printed
    assert results()["methods"][0]["held_out_examples"] == 4


def unsigned(path: Path) -> None:
    """Save as a TIFF of unsigned 32-bit integers, which Pillow itself does not write."""
    put(str(path), halves(5, 3_000_000_000, np.uint32).view(np.int32), format="TIFF")
    signed, told = (bytes([0x53, 1, 3, 0, 1, 0, 0, 0, kind, 0]) for kind in (2, 1))  # tag 339: one short
    assert path.read_bytes().count(signed) == 1
    path.write_bytes(path.read_bytes().replace(signed, told))


@pytest.mark.parametrize(
    ("spoilt", "reason"),
    [
        (lambda path: path.write_bytes(b""), "no format of an image"),
        (lambda path: path.write_text("<svg/>"), "no format of an image"),
        (lambda path: put(str(path), np.full((4, 4), np.nan, np.float32), format="TIFF"), "NaN or infinite"),
        (unsigned, "unsigned 32-bit pixels above 2,147,483,647"),
        (lambda path: (path.unlink(), path.symlink_to("nowhere.png")), "No such file"),
        (lambda path: Image.new("1", (30000, 6000)).save(path), "(180000000 pixels) exceeds limit of 178956970 pixels"),
    ],
    ids=["empty", "text", "nan", "unsigned", "a link to nothing", "too large"],
)
def test_the_reason_is_told(spoilt, reason):
    put("set/a/1.png"), put("set/b/1.png")
    spoilt(Path("set/a/1.png"))
    with pytest.raises(CommandError, match=r"1 of 2 images cannot be read: a/1\.png") as caught:
        read()
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    examples, _ = read(skip=True)
    assert examples.labels == ["b"]


def test_images_of_the_hub_are_checked_alike(monkeypatch, capsys):
    import datasets

    def encoded(pixels: np.ndarray, kind: str) -> dict:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format=kind)
        return {"bytes": buffer.getvalue(), "path": None}

    images = [encoded(halves(13107, 52428, np.uint16), "PNG"), encoded(halves(0.2, 0.8, np.float32), "TIFF")]
    images.append({"bytes": images[0]["bytes"][:45], "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    table = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 1]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: table)
    with pytest.raises(CommandError, match="1 of 3 images cannot be read: row 3"):
        read("someone/images")
    examples, extremes = read("someone/images", skip=True)
    assert examples.labels == ["no", "yes"]
    assert [greys(item, extremes) for item in examples.items] == [EXPECTED, EXPECTED]


@pytest.mark.parametrize("tops", [(1_000_000, 4_000_000), (4_000_000, 1_000_000)])
def test_data_and_eval_data_share_one_range_of_pixels(tops, vit, capsys, monkeypatch):
    for label in ("dim", "lit"):
        for i in range(4):
            put(f"train/{label}/{i}.tiff", halves(0, tops[0], np.int32))
            put(f"held/{label}/{i}.tiff", halves(0, tops[1], np.int32))
    tasks = []
    monkeypatch.setattr(run, "load_task", lambda options: tasks.append(load_task(options)) or tasks[0])
    arguments = ["--task", "image-classification", "--model", vit, "--data", "train", "--eval-data", "held"]
    assert finetune(*arguments, "--methods", "head", "--max-steps", "1") == 0
    assert "32-bit integer pixels are scaled: 0 is black, 4e+06 is white" in capsys.readouterr().out
    # The models get -1 for black and 1 for white: a quarter of the range is 64 of 255.
    brightest = [data[0]["pixel_values"].max().item() for data in (tasks[0].train, tasks[0].held_out)]
    assert brightest == pytest.approx([1 if top == max(tops) else 64 / 127.5 - 1 for top in tops])


def test_open_image_refuses_what_is_none():
    with pytest.raises(ValueError, match="list is no image"):
        open_image([[1, 2], [3, 4]])


def splits(*names: str, classes: tuple[str, ...] = ("oak", "elm"), count: int = 1) -> None:
    for name in names:
        for label in classes:
            for i in range(count):
                put(f"set/{name}/{label}/{i}.png")


@pytest.mark.parametrize(
    ("names", "train", "held_out", "unused"),
    [
        (("train", "test"), "train", "test", None),
        (("Train", "Valid"), "Train", "Valid", None),
        (("training", "testing"), "training", "testing", None),
        (("train", "validation", "test"), "train", "validation", "test"),
        (("train", "dev"), "train", "dev", None),
        (("training", "Eval"), "training", "Eval", None),
        (("train", "evaluation", "test"), "train", "evaluation", "test"),
    ],
)
def test_split_folders_are_no_classes(names, train, held_out, unused, capsys):
    splits(*names)
    Path("set/__MACOSX/train").mkdir(parents=True)
    assert split_folders("set", None) == (f"set/{train}", f"set/{held_out}")
    printed = capsys.readouterr().out
    assert f"{train}/ is --data, {held_out}/ is --eval-data" in printed
    assert (f"{unused}/ is not used" in printed) == (unused is not None)


def test_held_out_data_that_is_given_goes_before_a_split_folder():
    splits("train", "test")
    assert split_folders("set", "other") == ("set/train", "other")


def test_a_lone_folder_for_training_is_the_data():
    splits("train")
    assert split_folders("set", None) == ("set/train", None)


def test_classes_that_are_called_like_splits_stay_classes(capsys):
    put("set/train/1.png"), put("set/test/1.png")
    assert split_folders("set", None) == ("set", None)
    assert "warning: --data 'set' has the folders test/, train/: they are taken for classes" in capsys.readouterr().out
    put("set/bus/1.png"), put("set/tram/1.png")  # vehicles, among them trains
    assert split_folders("set", None) == ("set", None)


@pytest.mark.parametrize(
    ("names", "named"),
    [(("train_set", "test_set"), "test_set"), (("train", "extra"), "train"), (("My-Train", "valdata"), "My-Train")],
)
def test_folders_that_are_nearly_splits_are_classes_with_a_warning(names, named, capsys):
    splits(*names)
    assert split_folders("set", None) == ("set", None)
    printed = capsys.readouterr().out
    assert "they are taken for classes, not for splits" in printed
    assert f"though {named}/ has subfolders of images itself" in printed


def test_classes_with_subfolders_of_images_are_classes_without_a_warning(capsys):
    splits("constraint", "valley", "trainer")
    put("set/train/1.png")
    assert split_folders("set", None) == ("set", None)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: (splits("train"), put("set/test/1.png")), ["test/ has no class subfolders", "--eval-data"]),
        (lambda: splits("val", "test"), ["none of them is train/"]),
        (
            lambda: (splits("train"), splits("val", classes=("oak", "elm", "fir"))),
            ["val/ has the classes ['fir']", "train/ lacks"],
        ),
        (
            lambda: (splits("train"), splits("val", classes=("oak",))),
            ["train/ has the classes ['elm']", "val/ lacks"],
        ),
    ],
    ids=["flat test", "no training", "more classes", "fewer classes"],
)
def test_doubtful_splits_are_refused(make, parts):
    make()
    with pytest.raises(CommandError) as caught:
        split_folders("set", None)
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)


def test_split_folders_are_trained_and_measured_on(vit, capsys):
    splits("train", count=6)
    splits("val", count=2)
    arguments = ["--task", "image-classification", "--model", vit, "--data", "set", "--methods", "head"]
    assert finetune(*arguments, "--max-steps", "1") == 0
    assert "2 classes (training + held out): elm: 6 + 2, oak: 6 + 2" in capsys.readouterr().out
    assert results()["methods"][0]["held_out_examples"] == 4
