import os

import numpy as np
import pytest
import torch
from PIL import Image, features

from scanlib.data import PhotoFolder, RandomParts, photos, read_image


def save_image(path, size=(40, 30), colour=(200, 100, 50), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)


def test_class_folders_are_numbered_in_order(tmp_path):
    save_image(tmp_path / "cat" / "1.jpg")
    save_image(tmp_path / "dog" / "deep" / "2.png")
    folder = PhotoFolder(tmp_path, 16)
    assert folder.classes == ["cat", "dog"] and folder.labels == [0, 1] and len(folder) == 2
    image, label = folder[1]
    assert image.shape == (3, 16, 16) and image.dtype == torch.float32 and label == 1
    torch.testing.assert_close(image.mean((1, 2)), torch.tensor([200.0, 100, 50]), rtol=0, atol=1)


def test_labels_are_indices_into_the_given_classes(tmp_path):
    for name in ("Tabby", "tench", "nobody"):
        save_image(tmp_path / name / "1.jpg")
    with pytest.warns(UserWarning, match=r"1 folders .* not in classes, so their labels are unknown \(-1\): \['nobody'\]"):
        folder = PhotoFolder(tmp_path, 16, classes=["tench", "goldfish", "tabby"])
    assert {path.parent.name: label for path, label in zip(folder.files, folder.labels, strict=True)} == {
        "Tabby": 2,
        "tench": 0,
        "nobody": -1,
    }


def test_images_without_class_folders_have_unknown_labels(tmp_path):
    save_image(tmp_path / "a.jpg")
    save_image(tmp_path / ".hidden.jpg")
    save_image(tmp_path / ".thumbs" / "b.jpg")
    assert [PhotoFolder(tmp_path, 8)[0][1]] == [-1] and len(PhotoFolder(tmp_path, 8)) == 1


def test_unreadable_files_are_named_and_skipped(tmp_path):
    save_image(tmp_path / "good.jpg", (300, 200))
    whole = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    (tmp_path / "notes.txt").write_text("not an image, and not named as one")
    with pytest.warns(
        UserWarning,
        match=r"3 of 4 images .* are skipped: cut.jpg \(image file is truncated.*\), empty.png \(.*\), text.png \(.*\)",
    ):
        folder = PhotoFolder(tmp_path, 8)
    assert len(folder) == 1 and [path.name for path in folder.skipped] == ["cut.jpg", "empty.png", "text.png"]


def test_errors_are_one_line_that_names_the_file(tmp_path, monkeypatch):
    Image.new("RGB", (60, 60)).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "damaged.png").write_bytes(content[:40] + bytes(8) + content[48:])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses twice as many before it gives the size
    with pytest.raises(OSError, match=r"whole.png has more than 64 million pixels \(Image size .*\); make it smaller first"):
        read_image(tmp_path / "whole.png")
    monkeypatch.undo()
    for name in ("cut.png", "damaged.png"):
        with pytest.raises(OSError, match=rf"{name} cannot be read as an image \(.+\)") as raised:
            read_image(tmp_path / name)
        assert "\n" not in str(raised.value)
    with open(tmp_path / "cut.png", "rb") as file, pytest.raises(OSError, match=r"cut.png cannot be read as an image"):
        read_image(file)
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "none.png")


def test_without_check_no_file_is_read(tmp_path, monkeypatch):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    monkeypatch.setattr(photos, "_find_fault", lambda path: pytest.fail("read"))
    folder = PhotoFolder(tmp_path, 8, check=False)
    assert len(folder) == 2 and folder.skipped == [] and folder[0][0].shape == (3, 8, 8)
    with pytest.raises(OSError, match=r"b.png"):
        folder[1]


def test_read_image_converts_every_colour_mode_and_orientation(tmp_path):
    for mode in ("L", "P", "RGBA", "CMYK", "1", "I;16"):
        name = tmp_path / f"{mode.replace(';', '')}.tif"
        Image.new("I;16", (9, 7)).save(name) if mode == "I;16" else save_image(name, mode=mode)
        assert read_image(name, 8).shape == (3, 8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotated by 90 degrees
    save_image(tmp_path / "rotated.jpg", (40, 20), exif=exif)
    assert read_image(tmp_path / "rotated.jpg").shape == (3, 40, 20)


def test_photo_folder_raises_for_a_missing_or_empty_folder(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="root must be a folder of images, or of one folder of images per class, got .*missing"
    ):
        PhotoFolder(tmp_path / "missing")
    with pytest.raises(ValueError, match="root must have a readable image"):
        PhotoFolder(tmp_path)


def test_empty_folders_are_not_classes_and_links_are_followed(tmp_path):
    root = tmp_path / "root"
    save_image(root / "cat" / "1.JPG")
    (root / "aa_empty").mkdir()
    save_image(tmp_path / "elsewhere" / "2.png")
    (root / "dog").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "cat" / "loop").symlink_to(root, target_is_directory=True)
    (root / "cat" / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.warns(UserWarning, match="1 of 3 images .* dangling.jpg"):
        folder = PhotoFolder(root, 8)
    assert folder.classes == ["cat", "dog"] and folder.labels == [0, 1]
    save_image(tmp_path / "named" / "Great_White_Shark" / "1.png")
    assert PhotoFolder(tmp_path / "named", 8, classes=["tench", "great white shark"]).labels == [1]


def test_read_image_scales_16_bit_images_and_crops_the_centre(tmp_path):
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "sixteen.png")
    torch.testing.assert_close(read_image(tmp_path / "sixteen.png")[0], torch.tensor(ramp / 257).float(), rtol=0, atol=1)
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255  # the middle third, a square
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert read_image(tmp_path / "wide.png", 10).mean() > 240


RAMP = np.tile(np.linspace(0, 1, 64), (8, 1))


@pytest.mark.parametrize(
    ("array", "top"),
    [
        (RAMP.astype(np.float32), 255),
        ((RAMP * 255).astype(np.float32), 255),
        ((RAMP * 65535).astype(np.float32), 255),
        ((RAMP * 1e7).astype(np.float32), 255),
        ((RAMP * 2000 - 1000).astype(np.float32), 255),
        ((RAMP * 1023).astype(np.uint16), 255),
        ((RAMP * 4095).astype(np.uint16), 255),
        ((RAMP * 65535).astype(np.uint16), 255),
        ((RAMP * 3000).astype(np.uint16), 187),  # 12 bits that are not used to the full
        ((RAMP * 4095).astype(np.int32), 255),
        ((RAMP * 2000 - 1000).astype(np.int32), 255),
    ],
)
def test_deep_greyscale_keeps_its_contrast(array, top, tmp_path):
    Image.fromarray(array).save(tmp_path / "deep.tif")
    image = read_image(tmp_path / "deep.tif")
    torch.testing.assert_close(image[0], torch.tensor(RAMP * top).float(), rtol=0, atol=1)
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])


def test_infinite_values_raise(tmp_path):
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(OSError, match="NaN or infinite"):
        read_image(tmp_path / "nan.tif")


def test_other_endings_are_images_too(tmp_path):
    for name in ("a.jfif", "b.jpe", "c.JPEG"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name, "jpeg")
    if features.check("avif"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / "x.avif")
    (tmp_path / "x.heic").write_bytes(b"not readable here")
    with pytest.warns(UserWarning, match=r"x.heic \(install pillow-heif"):
        folder = PhotoFolder(tmp_path, 8)
    assert len(folder) == 3 + bool(features.check("avif"))


def test_files_of_many_pixels_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(photos, "MAX_PIXELS", 10_000)
    Image.new("L", (200, 100)).save(tmp_path / "bomb.png")
    with pytest.raises(OSError, match=r"bomb.png has more than 0 million pixels \(200 x 100 pixels\); make it smaller first"):
        read_image(tmp_path / "bomb.png")
    save_image(tmp_path / "small.png")
    with pytest.warns(UserWarning, match=r"1 of 2 images .* bomb.png \(.*200 x 100 pixels"):
        assert len(PhotoFolder(tmp_path, 8)) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    save_image(tmp_path / "real.png")
    with pytest.warns(UserWarning, match=r"pipe.png \(.* is not a file"):
        assert len(PhotoFolder(tmp_path, 8)) == 1
    with pytest.raises(OSError, match="is not a file"):
        read_image(tmp_path / "pipe.png")


def test_labels_do_not_shift_behind_a_class_that_cannot_be_read(tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        save_image(tmp_path / name / "1.png")
    (tmp_path / "b" / "1.png").write_text("no image")
    with pytest.warns(UserWarning) as warned:
        folder = PhotoFolder(tmp_path, 8)
    assert folder.classes == ["a", "b", "c"] and folder.labels == [0, 2]
    assert any("1 folders" in str(w.message) and "have no readable image: b" in str(w.message) for w in warned)
    real = os.walk

    def walk(root, onerror, followlinks):
        onerror(PermissionError(13, "Permission denied", str(tmp_path / "b")))
        return real(root, onerror=onerror, followlinks=followlinks)

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(OSError, match=r"the folder .*b cannot be read \(Permission denied\)"):
        PhotoFolder(tmp_path, 8)


def test_random_parts_follow_the_images_themselves():
    ramp = torch.arange(40.0)[None, None].expand(3, 30, 40)
    parts = RandomParts([(ramp, 1), (ramp.flip(2), 2)], 30)
    assert len(parts) == 30 and torch.equal(parts[0][0], ramp) and torch.equal(parts[1][0], ramp.flip(2))
    spans = []
    for index in range(2, 30):
        image, label = parts[index]
        assert image.shape == (3, 30, 40) and label == 1 + index % 2 and torch.equal(image, parts[index][0])
        steps = image[0, 0].diff()
        assert (steps > 0).all() or (steps < 0).all()  # a part of the ramp, mirrored or not
        spans.append(float(image.max() - image.min() + 1) / 40)
    assert min(spans) >= 0.55 and max(spans) <= 1 and torch.tensor(spans).std() > 0.05
    with pytest.raises(IndexError, match=r"index must be in \[-30, 30\), got 30"):
        parts[30]
    with pytest.raises(ValueError, match="data must have at least one image, got none"):
        RandomParts([], 3)
