"""Is every layer's layout read correctly? Families of torchvision and timm x image sizes, against a moved bright spot.

python benchmarks/layouts.py [--families 20] [--sizes 60] [--workers 2]     # a line per family, and every wrong reading

The truth is measured without the package's own inference. A 4-d output of a model that takes any size shows its axes: one grows
with the image's height, another with its width. Otherwise the response to a spot must lie where the spot is, for two places of
the spot. A refusal is an answer too; a wrong reading is not, and ends the run with an error.
"""

import argparse
import contextlib
import math
import multiprocessing
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial

import torch
import torchvision
from torch import Tensor, nn
from tqdm.auto import tqdm

from scanlib.hooks import FeatureTap
from scanlib.layers import find_default_layer

TORCHVISION = [
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5"),
    *("mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t"),
    *("swin_v2_t", "vgg11", "vit_b_32"),
]
SPOTS = [(0.25, 0.75), (0.75, 0.25)]  # (y, x) as shares of the image
SIZES = [
    *((224, 224), (256, 256), (384, 384), (96, 96), (64, 64), (128, 128), (160, 160), (192, 192), (288, 288), (112, 112)),
    *((1024, 70), (70, 1024), (512, 68), (256, 66), (300, 100), (100, 300), (197, 64), (64, 197), (224, 448), (448, 224)),
    *((97, 131), (131, 97), (200, 333), (333, 200), (256, 96), (96, 256), (224, 64), (64, 224), (160, 480), (480, 160)),
    *((65, 65), (99, 99), (101, 257), (257, 101), (127, 129), (180, 240), (240, 180), (320, 240), (240, 320), (72, 512)),
    *((512, 72), (384, 96), (96, 384), (768, 64), (64, 768), (192, 256), (256, 192), (230, 225), (225, 230), (150, 150)),
    *((222, 222), (223, 227), (400, 72), (72, 400), (130, 600), (600, 130), (88, 88), (176, 144), (144, 176), (640, 80)),
]


def list_layers(model: nn.Module) -> list[str]:
    """Return the default layer, the model's children, and their children."""
    names = [find_default_layer(model)]
    for name, child in model.named_children():
        names += [name, *(f"{name}.{inner}" for inner, _ in list(child.named_children())[:4])]
    return list(dict.fromkeys(names))


def find_wrong_axis(maps: list[Tensor], spots: list[tuple[float, float]]) -> str:
    """Return which axis of the responses (h, w) does not follow the spots, given as (y, x) in [0, 1]; "" if both do."""
    for axis, name in ((0, "y"), (1, "x")):
        places = []
        for response in maps:
            profile = response.sum(1 - axis)
            if float(profile.max() - profile.min()) <= 1e-3 * float(profile.max()):
                break  # one cell, spread over all
            profile = (profile - profile.median()).clamp_min(0) + 1e-12
            places.append(float((profile * torch.linspace(0, 1, len(profile))).sum() / profile.sum()))
        expected = spots[1][axis] - spots[0][axis]
        if len(places) == 2 and maps[0].shape[axis] > 2 and (places[1] - places[0]) * expected < 0.02:
            return name
    return ""


@torch.no_grad()
def find_growing_axes(model: nn.Module, layers: list[str]) -> dict[str, tuple[int, int]]:
    """Return, for each layer where that shows, the axes of its 4-d output that grow with the image's height and its width."""
    shapes: dict[str, list[tuple[int, ...]]] = {layer: [] for layer in layers}

    def record(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            shapes[name].append(tuple(output.shape))

    handles = [model.get_submodule(layer).register_forward_hook(partial(record, layer)) for layer in layers]
    try:
        for size in ((192, 192), (256, 192), (192, 256)):
            model(torch.zeros(1, 3, *size, device=next(model.parameters()).device))
    except (RuntimeError, AssertionError, ValueError, TypeError):  # other sizes are refused
        return {}
    finally:
        for handle in handles:
            handle.remove()
    axes = {}
    for layer, (first, *others) in ((layer, found) for layer, found in shapes.items() if len(found) == 3):
        grown = [[axis for axis in range(4) if other[axis] != first[axis]] for other in others]
        if list(map(len, grown)) == [1, 1]:
            axes[layer] = (grown[0][0], grown[1][0])
    return axes


@torch.no_grad()
def check_layers(model: nn.Module, layers: list[str], size: tuple[int, int], axes: dict[str, tuple[int, int]]) -> dict[str, str]:
    """Return, for each layer, "right", "refused", "no run", "unclear", or what is wrong with its layout. One forward pass."""
    height, width = size
    images = torch.zeros(3, 3, height, width, device=next(model.parameters()).device)
    for image, (y, x) in zip(images[1:], SPOTS, strict=True):
        top, left = int(y * height), int(x * width)
        image[:, max(0, top - height // 12) : top + height // 12 + 1, max(0, left - width // 12) : left + width // 12 + 1] = 3
    outputs: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        tensor = output[0] if isinstance(output, (tuple, list)) else output
        if isinstance(tensor, Tensor):
            outputs[name] = tensor.clone()

    handles = [model.get_submodule(layer).register_forward_hook(partial(record, layer)) for layer in layers]
    try:
        model(images)
    except (RuntimeError, AssertionError, ValueError, TypeError):
        return dict.fromkeys(layers, "no run")
    finally:
        for handle in handles:
            handle.remove()
    return {layer: check_reading(model, layer, outputs[layer], images, axes.get(layer)) for layer in layers if layer in outputs}


def check_reading(model: nn.Module, layer: str, output: Tensor, images: Tensor, axes: tuple[int, int] | None) -> str:
    """Compare the package's reading of a layer's output for the blank image and two spots with where the response lies."""
    try:
        with FeatureTap(model, layer, record=None) as tap, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            layout = tap.read_layout_of(layer, output, images)
    except (ValueError, TypeError, RuntimeError):
        return "refused"
    if axes is not None:
        return "right" if axes == ((2, 3) if layout.kind == "BCHW" else (1, 2)) else f"wrong axes: {layout}, grows along {axes}"
    features = layout.to_maps(output).float()
    responses = [(features[index] - features[0]).square().sum(0).cpu() for index in (1, 2)]
    if not all(bool(response.any()) for response in responses):
        return "right"  # dead
    if any("do not follow" in str(each.message) for each in caught):
        return "warned"
    if not (wrong := find_wrong_axis(responses, SPOTS)):
        return "right"
    profiles = [features[index].sub(features[0]).square().sum(0) for index in (1, 2)]
    is_spread = all(float(profile.amin()) > 0.2 * float(profile.amax()) for profile in profiles)
    if layout.kind != "BTC" or is_spread:
        return "unclear"  # attention over the whole image spreads the response, and the shape allows one reading only
    return f"wrong along {wrong}: {layout}"


def list_models(count: int | None) -> list[str]:
    """Return the smallest model of each family, in parameters; models of timm begin with "timm "."""
    import timm

    smallest: dict[str, tuple[float, str]] = {}
    for name in tqdm(timm.list_models(), desc="families"):
        size = math.inf
        with torch.device("meta"), contextlib.suppress(NotImplementedError):  # some cannot be built without memory
            size = sum(weight.numel() for weight in timm.create_model(name).parameters())
        family = timm.models._registry._model_to_module[name]
        smallest[family] = min(smallest.get(family, (size, name)), (size, name))
    return TORCHVISION[:count] + [f"timm {name}" for _, name in list(smallest.values())[:count]]


def check_model(name: str, sizes: list[tuple[int, int]]) -> tuple[str, int]:
    """Check a randomly initialised model. Returns a report, and the number of wrong readings."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    if name.startswith("timm "):
        import timm

        model = timm.create_model(name.removeprefix("timm "), pretrained=False).eval()
    else:
        options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, **options).eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    try:
        layers = list_layers(model)
    except ValueError as error:
        return f"{name}: refused: {error}", 0
    axes, counts, lines = find_growing_axes(model, layers), dict[str, int](), []
    for size in sizes:
        for layer, found in check_layers(model, layers, size, axes).items():
            kind = found.split(":")[0]
            counts[kind] = counts.get(kind, 0) + 1
            if found.startswith("wrong"):
                lines.append(f"  {name} {layer} at {size}: {found}")
    summary = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    return "\n".join([f"{name}: {len(layers)} layers, {len(sizes)} sizes: {summary}", *lines]), len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", type=int, help="number of families of each library")
    parser.add_argument("--sizes", type=int, default=len(SIZES))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--models", nargs="+", help="names of models, instead of the smallest of each family")
    options = parser.parse_args()
    names, lost = options.models or list_models(options.families), 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context, torch.set_num_threads, (1,)) as pool:
        runs = [pool.submit(check_model, name, SIZES[: options.sizes]) for name in names]
        for run in tqdm(as_completed(runs), total=len(runs), desc="models"):
            if run.exception() is not None:
                report, wrong = f"failed: {str(run.exception()).splitlines()[0]}", 0
            else:
                report, wrong = run.result()
            lost += wrong
            tqdm.write(report, sys.stdout)
            sys.stdout.flush()
    sys.exit(f"{lost} wrong readings" if lost else 0)


if __name__ == "__main__":
    main()
