"""Make data/photographs and data/cutouts from pictures that come with packages. SOURCES.md names their authors and licences.

mkdir packages && cd packages                    # in data/
pip download --no-deps scikit-image scikit-learn
apt-get download opencv-doc                      # on Debian or Ubuntu; dpkg-deb unpacks it
cd .. && pip install opencv-python-headless && python make_photographs.py packages

The photographs are resized, and otherwise unchanged. A cut-out is a photograph whose background is transparent: cv2.grabCut
(Rother, Kolmogorov, Blake, 2004) finds the object inside a polygon that was drawn by hand. Its file is named after the ImageNet
class.
"""

import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

DATA = Path(__file__).parent
OPENCV, SKIMAGE, SKLEARN = "opencv-doc_*.deb", "scikit_image-*.whl", "scikit_learn-*.whl"
EXAMPLES = "usr/share/doc/opencv-doc/examples"
PHOTOGRAPHS = {
    "aloe": (OPENCV, f"{EXAMPLES}/data/aloeL.jpg"),
    "apple": (OPENCV, f"{EXAMPLES}/data/apple.jpg"),
    "astronaut": (SKIMAGE, "skimage/data/astronaut.png"),
    "building": (OPENCV, f"{EXAMPLES}/data/building.jpg"),
    "butterfly": (OPENCV, f"{EXAMPLES}/data/butterfly.jpg"),
    "cat": (SKIMAGE, "skimage/data/chelsea.png"),
    "coffee": (SKIMAGE, "skimage/data/coffee.png"),
    "dog": (OPENCV, f"{EXAMPLES}/data/chicky_512.png"),
    "flower": (SKLEARN, "sklearn/datasets/images/flower.jpg"),
    "fruits": (OPENCV, f"{EXAMPLES}/data/fruits.jpg"),
    "lake": (OPENCV, f"{EXAMPLES}/hfs/data/001.jpg"),
    "orange": (OPENCV, f"{EXAMPLES}/data/orange.jpg"),
    "palace": (SKLEARN, "sklearn/datasets/images/china.jpg"),
    "plant": (OPENCV, f"{EXAMPLES}/alphamat/input_images/plant.jpg"),
    "robin": (OPENCV, f"{EXAMPLES}/hfs/data/000.jpg"),
    "rocket": (SKIMAGE, "skimage/data/rocket.jpg"),
    "squirrel": (OPENCV, f"{EXAMPLES}/data/squirrel_cls.jpg"),
    "tower": (OPENCV, f"{EXAMPLES}/data/home.jpg"),
    "town": (OPENCV, f"{EXAMPLES}/data/leuvenA.jpg"),
    "tree": (OPENCV, f"{EXAMPLES}/hfs/data/002.jpg"),
}
CUTOUTS = {  # class: the photograph, and a polygon around the object, x,y in its pixels
    "brambling": (
        "robin",
        "78,36 95,14 125,16 150,42 200,80 232,135 318,168 316,182 240,166 185,168 150,185 118,180 84,150 74,100 88,55",
    ),
    "Egyptian cat": (
        "cat",
        "5,0 90,0 330,0 440,0 385,120 395,190 330,280 240,298 60,298 5,230",
    ),
    "espresso": (
        "coffee",
        "170,20 330,3 420,20 480,180 480,260 440,340 370,395 230,398 120,350 68,260 80,180 130,120",
    ),
    "fox squirrel": (
        "squirrel",
        "115,230 150,160 200,190 235,125 300,105 345,150 330,215 380,235 370,260 310,270 290,330 240,350 160,340 120,300",
    ),
    "Granny Smith": (
        "apple",
        "150,0 40,110 40,290 110,450 190,498 340,498 410,440 462,280 455,110",
    ),
    "lemon": (
        "fruits",
        "312,370 335,300 400,250 470,240 512,255 512,480 370,480 325,440",
    ),
    "orange": (
        "orange",
        "36,285 50,185 95,110 160,72 250,60 340,72 410,115 450,190 462,285 448,380 405,455 340,500 150,500 90,455 50,380",
    ),
    "orange 2": (
        "fruits",
        "200,45 255,40 330,290 340,400 300,440 200,470 120,440 75,300 110,180",
    ),
    "Pekinese": (
        "dog",
        "172,120 150,85 180,50 250,38 330,45 400,70 440,110 478,190 460,225 450,300 470,400 480,511 130,511 100,400 90,300",
    ),
}


def read_picture(packages: Path, pattern: str, member: str) -> Image.Image:
    """Read a picture from a package. Raises FileNotFoundError if the package is not there."""
    package = next(iter(sorted(packages.glob(pattern))), None)
    if package is None:
        raise FileNotFoundError(f"{pattern} not found in {packages}; see the first lines of {Path(__file__).name}")
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as archive:
            return Image.open(io.BytesIO(archive.read(member))).convert("RGB")
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", folder, f"./{member}"], check=True, input=archive)
        return Image.open(Path(folder) / member).convert("RGB")


def cut_out(photo: Image.Image, polygon: str) -> Image.Image:
    """Return the object inside the polygon "x,y x,y ...", with an alpha channel."""
    corners = [[int(number) for number in corner.split(",")] for corner in polygon.split()]
    pixels = np.array(photo)[:, :, ::-1].copy()
    mask = np.zeros(pixels.shape[:2], np.uint8)
    cv2.fillPoly(mask, [np.array(corners)], 1)
    core = cv2.distanceTransform(np.pad(mask, 1, mode="edge"), cv2.DIST_L2, 5)[1:-1, 1:-1] > 0.04 * max(photo.size)
    mask = np.where(core, cv2.GC_FGD, np.where(mask == 1, cv2.GC_PR_FGD, cv2.GC_BGD)).astype(np.uint8)
    cv2.setRNGSeed(0)
    cv2.grabCut(pixels, mask, None, np.zeros((1, 65)), np.zeros((1, 65)), 8, cv2.GC_INIT_WITH_MASK)
    inside = ((mask == cv2.GC_FGD) | (mask == cv2.GC_PR_FGD)).astype(np.uint8)
    _, parts, statistics, _ = cv2.connectedComponentsWithStats(inside)
    inside = (parts == 1 + statistics[1:, cv2.CC_STAT_AREA].argmax()).astype(np.uint8)
    outline, _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(inside, outline, -1, 1, thickness=cv2.FILLED)  # without holes
    alpha = Image.fromarray((cv2.GaussianBlur(inside.astype(np.float32), (0, 0), 1.0) * 255).round().astype(np.uint8))
    return Image.merge("RGBA", (*photo.split(), alpha)).crop(Image.fromarray(inside * 255).getbbox())


def main() -> None:
    """Write all photographs and cut-outs."""
    photos = {name: read_picture(Path(sys.argv[1]), *place) for name, place in PHOTOGRAPHS.items()}
    for folder in ("photographs", "cutouts"):
        (DATA / folder).mkdir(exist_ok=True)
    for name, (source, polygon) in CUTOUTS.items():
        cutout = cut_out(photos[source], polygon)
        cutout.thumbnail((200, 200), Image.Resampling.LANCZOS)
        cutout.save(DATA / "cutouts" / f"{name.replace(' ', '_')}.png", optimize=True)
    for name, photo in photos.items():
        scale = 320 / min(photo.size)
        if scale < 1:
            photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.LANCZOS)
        photo.save(DATA / "photographs" / f"{name}.jpg", quality=88, optimize=True)


if __name__ == "__main__":
    main()
