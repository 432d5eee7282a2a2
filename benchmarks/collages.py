"""Do maps of a network trained on ImageNet answer for the class that is asked? Writes benchmarks/COLLAGES.md.

apt-get download tuxpaint-stamps-default && dpkg-deb -x tuxpaint-stamps-default_*.deb stamps      # on Debian or Ubuntu
python benchmarks/collages.py --stamps stamps/usr/share/tuxpaint/stamps      # 8 minutes on one CPU core

Two objects are pasted on a photograph that ships with the repository. The objects are the stamps in stamps.json: photographic
cut-outs of Tux Paint (GPL-2). On a plain background EfficientNet-Lite0 names them rightly and is more than half sure. A checksum
of the file's name puts half of them into the test part. The others were used to choose settings.
"""

import argparse
import json
import platform
import time
import zlib
from pathlib import Path

import torch

from scanlib import SCAN, GradCAM, Libra, compare, load_classifier
from scanlib.data import Collages
from scanlib.explainers import explain_log_probability, scale_to_unit_range, weight_by_confidence
from scanlib.metrics import make_centre_maps
from scanlib.models import CHECKPOINTS

ROOT = Path(__file__).parent.parent
BACKGROUNDS = ("aloe", "building", "lake", "palace", "rocket", "tower", "town", "tree")
SEVERAL = (80, 85, 90, 95, 98)
METRICS = ("energy", "energy in other", "asked denser", "other correlation")


def list_stamps(root: Path, part: str, folder: Path) -> Path:
    """Link the stamps of a part into ``folder``, named after their classes, and return it."""
    for file, name in json.loads((ROOT / "benchmarks" / "stamps.json").read_text()).items():
        if (zlib.crc32(file.encode()) % 2 == 0) == (part == "test"):
            link = folder / name / Path(file).name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to((root / file).resolve())
    return folder


def load_scanner(classifier, path: Path, mask_by: str = "position", score: str = "log_probability") -> SCAN:
    """Return a scanner of a classifier with a decoder."""
    scanner = SCAN(classifier.model, classifier.layer, classifier.image_size, device="cpu", mask_by=mask_by, score=score)
    return scanner.set_preprocess(classifier.preprocess).load_decoder(path)


def main() -> None:
    """Measure all explainers and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stamps", type=Path, required=True)
    parser.add_argument("--part", choices=("validation", "test"), default="test")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--decoder", type=Path, default=CHECKPOINTS / "efficientnet_lite0_decoder.pt")
    options = parser.parse_args()
    classifier = load_classifier("efficientnet_lite0")
    classifier.model.requires_grad_(False)
    stamps = list_stamps(options.stamps, options.part, ROOT / "data" / "cache" / "stamps" / options.part)
    backgrounds = [ROOT / "data" / "photographs" / f"{name}.jpg" for name in BACKGROUNDS]
    collages = Collages(stamps, backgrounds, options.count, seed=7, objects=2, classes=classifier.classes)
    scenes = [collages.scene(i) for i in range(options.count)]
    images, classes = torch.stack([scene.image for scene in scenes]), torch.tensor([scene.labels for scene in scenes])
    masks = torch.stack([scene.masks for scene in scenes])
    own = {"preprocess": classifier.preprocess}
    cam, libra = GradCAM(classifier.model, **own), Libra(classifier.model, **own)
    scanner = load_scanner(classifier, options.decoder)

    def weight_by_centre(images, target):
        centre = make_centre_maps(len(images), images.shape[-2:])
        return scale_to_unit_range(weight_by_confidence(cam(images, target), centre))

    explainers = {
        "SCAN": scanner.as_explainer(SEVERAL),
        "SCAN x Grad-CAM": scanner.as_explainer(SEVERAL, evidence=cam),
        "centre prior x Grad-CAM, log p": explain_log_probability(weight_by_centre),
        "Grad-CAM, log p": explain_log_probability(cam),
        "Grad-CAM": cam,
        "Libra, log p": explain_log_probability(libra),
    }
    about = (
        __doc__.replace("\n\napt", "\n\n```bash\napt")
        .replace("core\n", "core\n```\n")
        .replace(" Writes benchmarks/COLLAGES.md.", "")
    )
    text = [f"# Collages of two objects\n\n{about.strip()}\n"]
    for title, asked, other in (("larger", 0, 1), ("smaller", 1, 0)):
        table = compare(
            classifier.model,
            images,
            explainers,
            METRICS,
            masks=masks[:, asked],
            target=classes[:, asked],
            other_masks=masks[:, other],
            other_classes=classes[:, other],
            batch_size=25,
            **own,
        )
        text.append(f"## The class of the {title} object\n\n{table.to_markdown()}\n")
        print(text[-1], flush=True)
    pasted = len(set(classes.flatten().tolist()))
    found = f"{options.part} part of the stamps, {pasted} classes of {len(classifier.classes)}"
    text.append(f"{found}; {time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {platform.machine()} CPU.\n")
    (ROOT / "benchmarks" / "COLLAGES.md").write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
