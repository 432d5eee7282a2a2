import struct
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader

from scanlib.data.published import CUB200, MNIST, ConText, ImageNetSubset

DOWNLOADS = Path(__file__).parents[2] / "data" / "downloads"


def save_image(path, size=(16, 12), colour=(200, 100, 50), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, "JPEG")


def get_error_message(error, build):
    """Return the message of the error that ``build`` raises; it must be one line."""
    with pytest.raises(error) as raised:
        build()
    assert "\n" not in str(raised.value)
    return str(raised.value)


# --- MNIST ---


def write_digits(root, name, count):
    """Image i is black except for one pixel of value 10 i + 10 at row 3, column 20; its label is i % 10."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    images = torch.zeros(count, 28, 28, dtype=torch.uint8)
    images[:, 3, 20] = torch.arange(count) * 10 + 10
    (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + images.numpy().tobytes())
    (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + bytes(i % 10 for i in range(count)))


@pytest.fixture
def digits(tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise URLError("no network")

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", offline)
    write_digits(tmp_path, "train", 12)
    write_digits(tmp_path, "t10k", 6)
    return tmp_path


def test_mnist_items(digits):
    train, test = MNIST(digits, True, 28), MNIST(str(digits), False, 28, download=False)
    assert len(train) == 12 and len(test) == 6 and train.classes == list("0123456789")
    assert [label for _, label in train] == [*range(10), 0, 1]
    image, label = train[4]
    assert image.shape == (3, 28, 28) and image.dtype == torch.float32 and type(label) is int and label == 4
    assert image[:, 3, 20].tolist() == [50, 50, 50] and image.sum() == 150
    images, labels = next(iter(DataLoader(train, 12)))
    assert images.shape == (12, 3, 28, 28) and labels.dtype == torch.int64


def test_mnist_digits_keep_their_position_when_resized(digits):
    """At twice the size, a pixel of 50 becomes 2 x 2 pixels of 0.75^2 * 50, with weaker ones around them."""
    image = MNIST(digits, True, 56)[4][0]
    torch.testing.assert_close(image[:, 6:8, 40:42], torch.full((3, 2, 2), 50 * 0.75**2))
    assert image.max() == 50 * 0.75**2 and image.min() == 0
    torch.testing.assert_close(image.sum((1, 2)), torch.full((3,), 200.0))
    assert MNIST(digits, True)[0][0].shape == (3, 260, 260)


def test_mnist_selects_the_first_classes(digits):
    few = MNIST(digits, True, 28, classes=2)
    assert few.classes == ["0", "1"] and few.labels == [0, 1, 0, 1]
    assert [few[i][0].max().item() for i in range(4)] == [10, 20, 110, 120]
    with pytest.raises(ValueError, match=r"classes must be in 1\.\.10, the number of classes in .*, got 11"):
        MNIST(digits, classes=11)


@pytest.mark.parametrize("download", [True, False])
def test_mnist_raises_if_files_are_missing(digits, download):
    message = get_error_message(FileNotFoundError, lambda: MNIST(digits / "none", download=download))
    assert str(digits / "none" / "MNIST" / "raw") in message and "train-images-idx3-ubyte" in message


def test_mnist_raises_if_a_file_is_truncated(digits):
    file = digits / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:1000])
    assert str(file.parent) in get_error_message(FileNotFoundError, lambda: MNIST(digits))


def test_mnist_on_the_real_data():
    if not (DOWNLOADS / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").is_file():
        pytest.skip("MNIST is not in data/downloads")
    train, test = (MNIST(DOWNLOADS, part, 56, download=False) for part in (True, False))
    assert len(train) == 60_000 and len(test) == 10_000
    assert train.labels[:5] == [5, 0, 4, 1, 9] and test.labels[:5] == [7, 2, 1, 0, 4]
    assert 200 < train[0][0].max() <= 255 and train[0][0].min() == 0
    assert len(MNIST(DOWNLOADS, False, classes=2, download=False)) == 980 + 1135


# --- Con-Text ---


@pytest.fixture
def shops(tmp_path):
    for name, count in {"Cafe": 10, "Bakery": 5, "Pharmacy": 20}.items():
        for i in range(count):
            save_image(tmp_path / "JPEGImages" / name / f"{name}_{i:02}.jpg")
    return tmp_path


def test_context_items(shops):
    data = ConText(shops, True, 8, classes=3)
    assert data.classes == ["Bakery", "Cafe", "Pharmacy"]
    image, label = data[0]
    assert image.shape == (3, 8, 8) and image.dtype == torch.float32 and label == 0
    torch.testing.assert_close(image.mean((1, 2)), torch.tensor([200.0, 100, 50]), rtol=0, atol=2)
    assert ConText(str(shops / "JPEGImages"), True, 8, classes=3).files == data.files
    assert all(path.parent.name == data.classes[label] for path, label in zip(data.files, data.labels, strict=True))


def test_context_trains_on_four_fifths_of_every_class(shops):
    train, test = (ConText(shops, part, 8, classes=3) for part in (True, False))
    assert [train.labels.count(i) for i in range(3)] == [4, 8, 16] and [test.labels.count(i) for i in range(3)] == [1, 2, 4]
    assert not set(train.files) & set(test.files)
    assert {*train.files, *test.files} == set(shops.rglob("*.jpg"))


def test_context_split_depends_on_the_seed(shops):
    split = lambda seed, classes=3: ConText(shops, False, 8, classes, seed).files  # noqa: E731
    assert split(0) == split(0) and split(0) != split(1)
    assert split(0, classes=2) == split(0)[:3]  # the split of a class does not depend on the number of classes
    state = torch.get_rng_state()
    split(5)
    assert torch.equal(state, torch.get_rng_state())


def test_context_ignores_other_files(shops):
    before = ConText(shops, True, 8, classes=3).files
    for name in ("._Cafe_00.jpg", "Thumbs.db", "notes.txt"):  # as in archives from macOS and Windows
        (shops / "JPEGImages" / "Cafe" / name).write_text("not an image")
    (shops / "JPEGImages" / ".AppleDouble").mkdir()
    (shops / "JPEGImages" / "README.txt").touch()
    assert ConText(shops, True, 8, classes=3).files == before


# --- CUB-200-2011 ---

RED = (255, 0, 0)
BIRDS = [  # file, class, 1 for training, box
    ("001.Albatross/a_1.jpg", 1, 1, (1, 2, 3, 4)),
    ("001.Albatross/a_2.jpg", 1, 0, (1, 2, 3, 4)),
    ("002.Auklet/b_1.jpg", 2, 1, (60, 20, 60, 60)),
    ("002.Auklet/b_2.jpg", 2, 0, (20, 60, 60, 60)),
    ("002.Auklet/b_3.jpg", 2, 0, (0, 30, 80, 40)),
    ("003.Bunting/c_1.jpg", 3, 1, (1, 2, 3, 4)),
    ("003.Bunting/c_2.jpg", 3, 0, (1, 2, 3, 4)),
]
SIZES = {"b_1.jpg": (200, 100), "b_2.jpg": (100, 200), "b_3.jpg": (200, 100)}  # width, height


@pytest.fixture
def birds(tmp_path):
    root = tmp_path / "CUB_200_2011"
    for name, _, _, (x, y, w, h) in BIRDS:
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", SIZES.get(Path(name).name, (16, 12)), "white")
        image.paste(RED, (x, y, x + w, y + h))
        image.save(root / "images" / name, quality=95, subsampling=0)
    lines = {
        "images": [name for name, *_ in BIRDS],
        "image_class_labels": [bird[1] for bird in BIRDS],
        "train_test_split": [bird[2] for bird in BIRDS],
        "bounding_boxes": [" ".join(f"{x:.1f}" for x in bird[3]) for bird in BIRDS],
        "classes": ["001.Albatross", "002.Auklet", "003.Bunting"],
    }
    for name, rows in lines.items():
        (root / f"{name}.txt").write_text("".join(f"{i} {row}\n" for i, row in enumerate(rows, 1)))
    return root


def test_cub200_items(birds):
    data = CUB200(birds, True, 8, classes=3)
    assert data.classes == ["001.Albatross", "002.Auklet", "003.Bunting"] and data.labels == [0, 1, 2]
    image, label = data[2]
    assert image.shape == (3, 8, 8) and image.dtype == torch.float32 and 0 <= image.min() < 50 and 200 < image.max() <= 255
    assert label == 2 and len(data[0]) == 2


def test_cub200_uses_the_official_split(birds):
    train, test = (CUB200(birds, part, 8, classes=3) for part in (True, False))
    assert [path.name for path in train.files] == ["a_1.jpg", "b_1.jpg", "c_1.jpg"]
    assert [path.name for path in test.files] == ["a_2.jpg", "b_2.jpg", "b_3.jpg", "c_2.jpg"] and test.labels == [0, 1, 1, 2]
    assert [path.name for path in CUB200(birds, False, 8, classes=2).files] == ["a_2.jpg", "b_2.jpg", "b_3.jpg"]


@pytest.mark.parametrize(
    ("train", "index", "size", "expected"),
    [
        (True, 1, 50, (5, 10, 35, 40)),  # 200 x 100: half the size, 25 pixels cropped at the left
        (False, 1, 50, (10, 5, 40, 35)),  # 100 x 200: the same, at the top
        (False, 2, 50, (0, 15, 15, 35)),  # crosses the left edge
        (True, 1, 150, (15, 30, 105, 120)),  # enlarged
    ],
)
def test_cub200_boxes_match_the_image(birds, train, index, size, expected):
    image, _, box = CUB200(birds, train, size, classes=3, boxes=True)[index]
    assert box.shape == (4,) and box.dtype == torch.float32 and box.tolist() == list(expected)
    rows, columns = ((image[0] > 128) & (image[1] < 128)).nonzero().T
    red = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
    torch.testing.assert_close(red, box, rtol=0, atol=1)


def test_cub200_boxes_can_be_batched(birds):
    images, labels, boxes = next(iter(DataLoader(CUB200(birds, False, 8, classes=3, boxes=True), 4)))
    assert images.shape == (4, 3, 8, 8) and labels.tolist() == [0, 1, 1, 2] and boxes.shape == (4, 4)


@pytest.mark.parametrize("name", ["images", "bounding_boxes.txt", "train_test_split.txt"])
def test_cub200_raises_if_a_file_is_missing(birds, name):
    (birds / name).rename(birds / "elsewhere")
    message = get_error_message(FileNotFoundError, lambda: CUB200(birds, classes=3))
    assert f"{name} not found in {birds};" in message and "CUB_200_2011.tgz" in message


# --- ImageNet ---


@pytest.fixture
def wnids(tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        for wnid in ("n01484850", "n01440764", "n01443537"):
            for i in range(count):
                save_image(tmp_path / part / wnid / f"{wnid}_{i}.JPEG")
    return tmp_path


def test_imagenet_items(wnids):
    train, test = (ImageNetSubset(wnids, part, 8, classes=2) for part in (True, False))
    assert train.classes == test.classes == ["n01440764", "n01443537"]
    assert train.labels == [0, 0, 0, 1, 1, 1] and test.labels == [0, 0, 1, 1]
    assert {path.parent.parent.name for path in test.files} == {"val"}
    image, label = test[3]
    assert image.shape == (3, 8, 8) and image.dtype == torch.float32 and label == 1


def test_imagenet_labels_are_the_same_in_train_and_val(wnids):
    """A class that is missing in val must not shift the labels of the following classes."""
    (wnids / "val" / "n01440764").rename(wnids / "val" / "n09999999")
    assert set(ImageNetSubset(wnids, False, 8, classes=3).labels) == {1, 2}


def test_imagenet_raises_if_val_is_not_sorted(wnids):
    (wnids / "val").rename(wnids / "sorted")
    save_image(wnids / "val" / "ILSVRC2012_val_00000001.JPEG")
    message = get_error_message(FileNotFoundError, lambda: ImageNetSubset(wnids, False, 8, classes=2))
    assert str(wnids / "val") in message and "sort val into such folders" in message


# --- all data sets ---


def test_grey_images_have_three_channels(shops, birds, wnids):
    for path in (shops / "JPEGImages" / "Bakery").iterdir():
        save_image(path, mode="L")
    save_image(birds / "images" / "001.Albatross" / "a_1.jpg", mode="L")
    save_image(wnids / "train" / "n01440764" / "n01440764_0.JPEG", mode="L")
    for data in (ConText(shops, classes=3), CUB200(birds, classes=3), ImageNetSubset(wnids, classes=3)):
        image = data[0][0]
        assert image.shape == (3, 260, 260) and torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])


@pytest.mark.parametrize(
    ("data", "folder", "expected"),
    [(ConText, "", "JPEGImages"), (ImageNetSubset, "train", "n01440764"), (CUB200, "", "CUB_200_2011")],
)
def test_data_sets_raise_if_the_folder_is_missing_or_empty(tmp_path, data, folder, expected):
    message = get_error_message(FileNotFoundError, lambda: data(tmp_path / "none"))
    assert str(tmp_path / "none" / folder) in message and expected in message
    (tmp_path / "none" / folder / "empty").mkdir(parents=True)
    assert str(tmp_path / "none" / folder) in get_error_message(FileNotFoundError, lambda: data(tmp_path / "none", classes=1))


@pytest.mark.parametrize("classes", [4, 0, -1])
def test_data_sets_raise_for_a_number_of_classes_out_of_range(shops, birds, wnids, classes):
    for data, root in ((ConText, shops), (CUB200, birds), (ImageNetSubset, wnids)):
        with pytest.raises(ValueError, match=rf"classes must be in 1\.\.3, the number of classes in .*, got {classes}$"):
            data(root, classes=classes)
