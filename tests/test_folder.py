"""Image files against Pillow's crops and against resizing by its definition; folders that are not as they should be."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from image_files import CLASSES, SIZES, pixels, write_folder, write_jpeg
from PIL import Image

from trtkern.data import folder
from trtkern.data.augment import ResizedCrop

SIZE = 28
CROP = ResizedCrop(SIZE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images"))


def one(path, size=SIZE):
    return folder.ImageFiles(path.parent, [path.name], size)


def opened(path):
    """[3, H, W] int16 as Pillow decodes it."""
    return np.asarray(Image.open(path).convert("RGB")).astype(np.int16).transpose(2, 0, 1)


def shrunk(image, height, width):
    """[3, h, w] of [3, H, W] in float64: a linear kernel as wide as the scale, which is bilinear with antialiasing."""

    def kernel(old, new):
        scale = old / new
        centre = (np.arange(new) + 0.5) * scale
        weight = np.maximum(0, 1 - np.abs(np.arange(old) + 0.5 - centre[:, None]) / max(scale, 1))
        return weight / weight.sum(1, keepdims=True)

    return kernel(image.shape[1], height) @ image @ kernel(image.shape[2], width).T


def near(got, want):
    """Pillow rounds to bytes between the two axes and computes with 8-bit weights: no value is off by more than 1.5."""
    return got.shape == want.shape and np.abs(got.numpy().astype(float) - want).max() <= 1.5


def test_load(tiny):
    train, labels, test, test_labels, classes = folder.load(tiny, None, SIZE)
    assert train.shape == (9, 3, SIZE, SIZE) and test.shape == (3, 3, SIZE, SIZE) and len(train) == 9
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and test_labels.tolist() == [0, 1, 2]
    assert labels.dtype == torch.int64 and classes == CLASSES
    assert train.path(4) == f"{tiny}/train/{CLASSES[1]}/{CLASSES[1]}_1.JPEG"
    assert test.path(2) == f"{tiny}/val/{CLASSES[2]}/ILSVRC2012_val_00000002.JPEG"


def test_it_stands_where_a_tensor_does(tiny):
    train = folder.load(tiny, None, SIZE).train
    like = torch.empty(9, 3, SIZE, SIZE, dtype=torch.uint8)
    assert (train.dim(), train.numel(), train.dtype, train.device) == (4, like.numel(), like.dtype, like.device)
    assert train.to(torch.device("meta")) is train
    paths = [train.path(index) for index in range(9)]
    mask = torch.arange(9) % 2 == 0
    for index in (slice(2, 5), slice(None, 1), torch.tensor([7, 0, 7]), mask):
        part = train[index]
        assert part.shape == like[index].shape
        assert [part.path(i) for i in range(len(part))] == list(np.array(paths)[index])
    for index in (3, torch.tensor(3), torch.zeros(2, 2, dtype=torch.int64)):
        with pytest.raises(TypeError, match="expected a slice or a 1-d tensor"):
            train[index]


def test_digests(tiny, tmp_path):
    test = folder.load(tiny, None, SIZE).test
    want = [hashlib.sha256(Path(test.path(index)).read_bytes()).digest() for index in range(3)]
    assert test.digests() == want
    with pytest.raises(OSError, match=r"gone\.JPEG"):
        folder.ImageFiles(tmp_path, ["gone.JPEG"]).digests()


@pytest.mark.parametrize("width, height", [*SIZES, (32, 32), (29, 200), (20, 17)])
@pytest.mark.parametrize("size", [SIZE, 21])
def test_evaluation(tmp_path, width, height, size):
    """The shorter side to size * 256 / 224, the other to floor(side * long / short), then the middle."""
    path = write_jpeg(tmp_path / "a.JPEG", width, height, 1)
    got, side = one(path, size).read(0), round(size * 256 / 224)
    wide, high = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    image = Image.open(path).resize((wide, high), Image.Resampling.BILINEAR)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    assert torch.equal(got, torch.from_numpy(np.array(image)[top : top + size, left : left + size]).permute(2, 0, 1))
    assert near(got, shrunk(opened(path), high, wide)[:, top : top + size, left : left + size])


def test_evaluation_of_imagenet_size(tmp_path):
    """500 x 375 becomes 341 x 256, of which rows 16.. and columns 58.. (58.5 rounded to even) are the middle."""
    path = write_jpeg(tmp_path / "a.JPEG", 500, 375, 1)
    image = np.array(Image.open(path).resize((341, 256), Image.Resampling.BILINEAR))
    assert np.array_equal(one(path, 224).read(0).permute(1, 2, 0), image[16:240, 58:282])


@pytest.mark.parametrize("seed", range(6))
def test_random_window(tmp_path, seed):
    path = tmp_path / "a.png"
    noise = np.random.default_rng(seed).integers(0, 256, (45, 61, 3))
    Image.fromarray(noise.astype(np.uint8)).save(path)
    got = one(path).read(0, CROP, seed)
    assert got.dtype == torch.uint8 and got.shape == (3, SIZE, SIZE) and got.is_contiguous()
    drawn = CROP.draw(1, 45, 61, torch.Generator().manual_seed(seed))
    top, left, height, width = drawn[:, 0].tolist()
    window = opened(path)[:, top : top + height, left : left + width]
    assert near(got, shrunk(window, SIZE, SIZE))  # nothing from beyond the window
    image = torch.from_numpy(opened(path)).to(torch.uint8)[None]
    assert near(got, CROP.apply(image, drawn)[0].numpy())  # as a batch in memory is changed
    assert torch.equal(got, one(path).read(0, CROP, seed))


def test_windows_differ_by_seed_and_need_one(tmp_path):
    images = one(write_jpeg(tmp_path / "a.JPEG", 61, 45, 1))
    assert not torch.equal(images.read(0, CROP, 1), images.read(0, CROP, 2))
    with pytest.raises(ValueError, match="expected a seed"):
        images.read(0, CROP)


@pytest.mark.parametrize("kind", ["L", "CMYK", "PNG", "P", "RGBA"])
def test_odd_files_become_rgb(tmp_path, kind):
    """ImageNet has grey JPEGs, CMYK JPEGs and a PNG that is called .JPEG."""
    path, size = tmp_path / "a.JPEG", 28
    image = Image.fromarray(pixels(32, 32, 1))
    if kind in ("L", "CMYK"):
        write_jpeg(path, 32, 32, 1, kind)
    else:
        image.convert("RGB" if kind == "PNG" else kind).save(path, "PNG")
    got = one(path, size).read(0)
    assert got.shape == (3, size, size)
    want = pixels(32, 32, 1).transpose(2, 0, 1)[:, 2:30, 2:30].astype(float)
    if kind == "L":
        assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])
        want = np.broadcast_to(0.299 * want[0] + 0.587 * want[1] + 0.114 * want[2], want.shape)
    if kind in ("PNG", "RGBA"):
        assert np.array_equal(got, want)
    elif kind != "P":  # a palette has 216 colours
        assert np.abs(got.numpy() - want).mean() < 8


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bits_are_scaled(tmp_path, order, form):
    """k of 0..65535 becomes k / 257, rounded: as dark or bright as it was."""
    values = np.linspace(0, 65535, 32 * 32).round().reshape(32, 32)
    Image.fromarray(values.astype(order)).save(tmp_path / "a.png", form)
    got = one(tmp_path / "a.png", 28).read(0)
    want = np.rint(values / 257)[2:30, 2:30]
    assert (got.numpy() == want).all() and want.min() == 16 and want.max() == 239


def test_16_bits_of_pillow_as_it_was(tmp_path, monkeypatch):
    """Older versions give a PNG of 16 bits as 32-bit integers."""
    Image.fromarray(np.full((32, 32), 257 * 77, np.uint16)).save(tmp_path / "a.png")
    opened = Image.open(tmp_path / "a.png")
    wide = Image.fromarray(np.asarray(opened).astype(np.int32))
    wide.format = "PNG"
    monkeypatch.setattr(Image, "open", lambda file: wide)
    assert (one(tmp_path / "a.png", 28).read(0) == 77).all()


@pytest.mark.parametrize(("dtype", "mode"), [(np.float32, "F"), (np.int32, "I")])
def test_values_of_an_unknown_range_are_refused(tmp_path, dtype, mode):
    path = tmp_path / "a.png"
    Image.fromarray(np.full((32, 32), 1, dtype)).save(path, "TIFF")
    with pytest.raises(folder.DataError, match=rf"8 or 16 bits a channel, got mode {mode} \(.* in .*a\.png; convert"):
        one(path).read(0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA"])
def test_other_modes_keep_their_colours(tmp_path, mode):
    """Also where they are transparent; 255 stays 255."""
    colour = (255, 255, 255) if mode == "1" else (200,) * 3 if mode[0] == "L" else (200, 100, 50)
    image = Image.new("RGB", (32, 32), colour).convert("RGBA" if mode == "PA" else mode)
    if "A" in mode:
        image.putalpha(0)
    if mode == "PA":
        image = image.convert("RGB").quantize(4)
    more = {"transparency": 0} if mode in ("P", "PA") else {}
    image.save(tmp_path / "a.png", "PNG", **more)
    got = one(tmp_path / "a.png", 28).read(0)
    near = 51 if mode == "P" else 0  # the colours of the standard palette are that far apart
    assert all((got[c].int() - colour[c]).abs().max() <= near for c in range(3))


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, form):
    frames = [Image.new("RGB", (32, 32), (level,) * 3) for level in (10, 200)]
    frames[0].save(tmp_path / "a.png", form, save_all=True, append_images=frames[1:])
    assert (one(tmp_path / "a.png", 28).read(0) == 10).all()


def test_orientation_is_not_looked_at(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    for name, extra in (("plain", {}), ("turned", {"exif": exif})):
        Image.fromarray(pixels(40, 30, 1)).save(tmp_path / name, "JPEG", **extra)
    assert torch.equal(one(tmp_path / "plain").read(0), one(tmp_path / "turned").read(0))


@pytest.mark.parametrize("damage, kind, said", [
    (lambda raw: raw[: len(raw) // 2], ValueError, "expected a whole image"),
    (lambda raw: b"", ValueError, "another kind"),
    (lambda raw: b"<html>not found</html>", ValueError, "another kind"),
    (lambda raw: raw[:100], ValueError, "expected"),
])  # fmt: skip
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_damaged_files_are_named(tmp_path, damage, kind, said, form):
    path = tmp_path / "broken.JPEG"
    Image.fromarray(pixels(40, 30, 1)).save(path, form)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(kind, match=f"{said}.*broken.JPEG"):
        one(path).read(0)


def test_bytes_of_a_png_that_changed(tmp_path):
    path = tmp_path / "broken.JPEG"
    Image.fromarray(pixels(40, 30, 1)).save(path, "PNG")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 255
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"expected a whole image, got .*broken\.JPEG"):
        one(path).read(0)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected an image that can be read, got .*gone\.JPEG"):
        folder.ImageFiles(tmp_path, ["gone.JPEG"]).read(0)
    with pytest.raises(IsADirectoryError, match="expected an image that can be read"):
        folder.ImageFiles(tmp_path.parent, [tmp_path.name]).read(0)


def test_a_class_list_chooses_and_sorts(tiny, tmp_path):
    chosen = tmp_path / folder.CLASS_LIST
    chosen.write_text(f"# two of them\n\n{CLASSES[2]} English  springer # a dog\n  {CLASSES[0]}\n")
    made = folder.load(tiny, chosen, SIZE)
    assert made.classes == (CLASSES[0], f"{CLASSES[2]} English springer")
    assert made.train_labels.tolist() == [0, 0, 0, 1, 1, 1] and made.test_labels.tolist() == [0, 1]
    assert made.train.path(3) == f"{tiny}/train/{CLASSES[2]}/{CLASSES[2]}_0.JPEG"


@pytest.mark.parametrize("content, said", [
    (b"n01 a\nn02\n\nn01 b\n", "n01 in lines 1 and 4 of"),
    (b"# n01\n\n", "a class on each line, got none"),
    (b"n01\xff\n", "text file in UTF-8"),
    (b"n01440764\nn09999999\n", "folder of each of the 2 classes in .*train, got none of n09999999;"),
])  # fmt: skip
def test_bad_class_lists(tiny, tmp_path, content, said):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        folder.load(tiny, path, SIZE)


def test_a_missing_class_list(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a class list, got no file .*classes\.txt"):
        folder.load(tiny, tmp_path / "classes.txt", SIZE)
    with pytest.raises(OSError, match="expected a class list that can be read"):
        folder.load(tiny, tmp_path, SIZE)


def test_missing_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected .*train with a folder"):
        folder.load(tmp_path, None)
    write_folder(tmp_path)
    (tmp_path / "val" / CLASSES[1]).rename(tmp_path / CLASSES[1])
    with pytest.raises(FileNotFoundError, match=rf"3 classes in .*val, got none of {CLASSES[1]};"):
        folder.load(tmp_path, None)
    (tmp_path / CLASSES[1]).rename(tmp_path / "val" / CLASSES[1])
    (tmp_path / "val" / "n09").mkdir()
    with pytest.raises(ValueError, match=r"only classes that train has, got n09; "):
        folder.load(tmp_path, None)


def test_an_empty_class_and_other_files(tmp_path):
    write_folder(tmp_path)
    where = tmp_path / "train" / CLASSES[0]
    (where / "notes.txt").write_text("hello")
    (where / "._hidden.JPEG").write_bytes(b"")
    (where / "a.jpeg").mkdir()
    (tmp_path / "train" / ".cache").mkdir()
    assert len(folder.load(tmp_path, None).train) == 9
    for path in where.glob("n*.JPEG"):
        path.unlink()
    with pytest.raises(ValueError, match=rf"of class {CLASSES[0]}, got none in .*train/{CLASSES[0]}"):
        folder.load(tmp_path, None)


@pytest.mark.parametrize(
    ("first", "copy"),
    [
        ("train/{0}/{0}_0.JPEG", "train/{0}/{0}_0 (1).JPEG"),
        ("train/{0}/{0}_0.JPEG", "val/{0}/{0}_0(2).JPEG"),
        ("val/{0}/ILSVRC2012_val_00000001.JPEG", "train/{0}/ILSVRC2012_val_00000001 (1).JPEG"),
        ("train/{0}/{0}_0.JPEG", "val/{0}/{0}_0.JPEG"),
    ],
)
def test_copies_of_images_are_refused(tmp_path, first, copy):
    """A second unpacking would train on images twice, or on those of the test."""
    write_folder(tmp_path)
    one, other = (tmp_path / path.format(CLASSES[1]) for path in (first, copy))
    shutil.copy(one, other)
    with pytest.raises(ValueError, match="expected different images, got the same content in") as caught:
        folder.load(tmp_path, None)
    assert str(one) in str(caught.value) and str(other) in str(caught.value)
    write_jpeg(other, 48, 40, 77)  # another image, which may be called so
    assert sum(map(len, folder.load(tmp_path, None)[::2][:2])) == 13


def test_links_to_nothing_are_no_smaller_set(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / CLASSES[1] / "moved.JPEG").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=rf"in .*train/{CLASSES[1]}, got links to nothing: moved\.JPEG; mend"):
        folder.load(tmp_path, None)


def test_flat_validation_images(tmp_path):
    write_folder(tmp_path)
    for path in (tmp_path / "val").glob("*/*"):
        path.rename(tmp_path / "val" / path.name)
    for path in (tmp_path / "val").glob("n*"):
        path.rmdir()
    with pytest.raises(ValueError, match=r"3 images and no folder; .*move each .*LOC_val_solution\.csv"):
        folder.load(tmp_path, None)


def test_a_split_that_is_a_file(tmp_path):
    (tmp_path / "train").write_text("")
    with pytest.raises(NotADirectoryError, match=r"expected a folder that can be read, got .*train"):
        folder.load(tmp_path, None)


def test_names_outside_ascii(tmp_path):
    write_folder(tmp_path, ("größe", "b"))
    (tmp_path / "train" / "b" / "b_0.JPEG").rename(tmp_path / "train" / "b" / "ümlaut.JPEG")
    train = folder.load(tmp_path, None, SIZE).train
    assert all(train.read(index).shape == (3, SIZE, SIZE) for index in range(len(train)))


def test_size_is_checked(tmp_path):
    with pytest.raises(ValueError, match="size of at least 1, got 0"):
        folder.ImageFiles(tmp_path, [], 0)


def test_pillow_is_asked_for(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'trtkern[data]'")):
        folder.load(tiny, None)
