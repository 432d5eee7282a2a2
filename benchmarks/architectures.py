"""What works with which architecture: tap a layer, choose it, train a decoder one step, explain. Writes ARCHITECTURES.md.

    python benchmarks/architectures.py                  # all, about 5 minutes on 2 CPU cores
    python benchmarks/architectures.py resnet18 swin_t  # some, printed only

Random weights: this shows that the pieces fit, not how good the maps are. timm's rows need the extra `timm`.
"""

import platform
import sys
import time
import types
import warnings
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from scanlib import SCAN, FeatureTap
from scanlib.layers import find_default_layer
from scanlib.models import Normalize

TORCHVISION = """
alexnet vgg11 vgg13_bn vgg16 vgg19_bn squeezenet1_0 squeezenet1_1 resnet18 resnet34 resnet50 resnet101 resnext50_32x4d
wide_resnet50_2 densenet121 densenet169 googlenet inception_v3 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5
mnasnet0_75 mnasnet1_0 mnasnet1_3 shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0 efficientnet_b0
efficientnet_b1 efficientnet_b2 efficientnet_v2_s regnet_x_400mf regnet_x_800mf regnet_y_400mf regnet_y_800mf convnext_tiny
convnext_small vit_b_16 vit_b_32 swin_t swin_s swin_v2_t swin_v2_s maxvit_t
""".split()
TIMM = """
vit_tiny_patch16_224 deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 vit_small_patch14_reg4_dinov2
vit_medium_patch16_reg4_gap_256 convnext_atto resnest26d swin_tiny_patch4_window7_224 mobilenetv3_small_050
""".split()
COLUMNS = ("model", "image", "chosen layer", "features", "decoder", "one step, one map", "seconds")


class LikeHuggingFace(nn.Module):
    """Keyword call and an output object with .logits, as transformers' classifiers have."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.vit = model

    def forward(self, pixel_values, **options):
        return types.SimpleNamespace(logits=self.vit(pixel_values), hidden_states=None)


def built(name: str) -> tuple[nn.Module, int]:
    """The model with random weights, and the image size it expects."""
    torch.manual_seed(0)
    if name == "object with .logits":
        return LikeHuggingFace(torchvision.models.vit_b_32(weights=None)), 224
    if name.startswith("timm "):
        import timm

        small = {"img_size": 224} if "dinov2" in name else {}
        model = timm.create_model(name.removeprefix("timm "), pretrained=False, num_classes=1000, **small)
        return model, 224 if small else model.default_cfg["input_size"][-1]
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    transform = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    return torchvision.models.get_model(name, weights=None, **options), transform.crop_size[0]


def row(name: str) -> tuple[str, ...]:
    """One line of the table; an error becomes its words."""
    start = time.perf_counter()
    layer = size = shape = decoder = "-"
    try:
        model, size = built(name)
        for module in model.modules():  # classifiers that start at zero have no gradient to show
            if isinstance(module, nn.Linear) and not module.weight.any():
                nn.init.normal_(module.weight, std=0.02)
        images = torch.rand(2, 3, size, size) * 255
        layer = find_default_layer(model.eval(), size)
        with FeatureTap(model, layer) as tap:
            tap(Normalize()(images))
            gradient = tap.gradient([1, 2])
            shape = f"{tap.layout.kind} {tap.layout.channels} x {tap.layout.grid[0]} x {tap.layout.grid[1]}"
            shape += f" + {tap.layout.prefix}" if tap.layout.prefix else ""
        if not gradient.isfinite().all() or not tap.layout.to_maps(gradient).any():
            raise ValueError("no finite gradient at the layer")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scanner = SCAN(model, layer, (size, size), device="cpu").set_preprocess(Normalize())
            loader = DataLoader(TensorDataset(images, torch.tensor([1, 2])), 2)
            scanner.set_dataset(loader).generate_decoder().compile().fit(1, verbose=False)
            confidence, _ = scanner(images)
        decoder = type(scanner.decoder).__name__.removesuffix("Decoder").lower()
        worked = "yes" if confidence.shape == (2, size, size) and confidence.std() > 0 else "no: a constant map"
    except Exception as error:  # the reason belongs into the table
        worked = f"no: {type(error).__name__}: {str(error).splitlines()[0]}"
    return name, str(size), f"`{layer}`", shape, decoder, worked, f"{time.perf_counter() - start:.1f}"


def main() -> None:
    names = sys.argv[1:]
    if not names:
        names = [*TORCHVISION, "object with .logits"]
        try:
            import timm  # noqa: F401

            names += [f"timm {name}" for name in TIMM]
        except ImportError:
            print("timm is not installed; its rows are left out", file=sys.stderr)
    start, rows = time.perf_counter(), []
    for name in names:
        rows.append(row(name))
        print(" | ".join(rows[-1]), flush=True)
    if sys.argv[1:]:
        return
    machine = (
        f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    took = f"{time.perf_counter() - start:.0f} s in all"
    good = sum(line[5] == "yes" for line in rows)
    lines = [" | ".join(COLUMNS), "|".join(["---"] * len(COLUMNS)), *(" | ".join(line) for line in rows)]
    text = (
        f"""# Architectures

`python benchmarks/architectures.py`, {time.strftime("%Y-%m-%d")}, {machine}; {took}.
{good} of {len(rows)} work.

Random weights, seed 0: the layer that is chosen when none is given; its features as layout, channels x grid, + prefix tokens; one
training step of SCAN on two pictures, and a map of both. It shows that the pieces fit, not how good the maps are.

"""
        + "\n".join(f"| {line} |" for line in lines)
        + "\n"
    )
    (Path(__file__).parent / "ARCHITECTURES.md").write_text(text, "utf-8", newline="\n")


if __name__ == "__main__":
    main()
