"""The leaderboard: every explainer at its best setting, on scenes of Signs; writes benchmarks/LEADERBOARD_<CNN or VIT>.md.

python benchmarks/leaderboard.py cnn      # an hour each on one CPU core
python benchmarks/leaderboard.py vit

The layer and the other settings of each explainer are chosen on scenes apart from the test scenes, by insertion less deletion:
a measure that needs no masks. SCAN's decoders of the seeds 1 and 2 are trained if they are not in data/cache/leaderboard.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

import scanlib
from scanlib import SCAN, Libra, Signs, compare, load_classifier, metrics
from scanlib.explainers import explain_log_probability, scale_to_unit_range, weight_by_confidence
from scanlib.models import CHECKPOINTS

ROOT = Path(__file__).parent.parent
CACHE = ROOT / "data" / "cache" / "leaderboard"
ONE_SIGN = ("energy", "peak", "IoU", "deletion", "insertion", "absent energy", "absent correlation")
TWO_SIGNS = ("energy", "energy in other", "asked denser", "other correlation")
PERCENTILES = (80, 90, 95, 98, (80, 85, 90, 95, 98))
Settings = dict[str, Callable]  # label of a setting: explainer

TEXT = """# Leaderboard: the {kind} for Signs

`python benchmarks/leaderboard.py {short}`: {machine}, {date}. The shipped classifier,
{count} scenes that training never used (seed 987), their true class. The setting of each explainer is the best of those tried on
{chosen} other scenes (seed 555; the slow ones: a quarter of them), by insertion less deletion. SCAN: seeds of the decoder's
training. *absent energy*: the share of the map of a class that is not there on the sign. *absent correlation*: the correlation
of that map with the map of the true class.

{one}
## Which class?

{count} scenes with two signs (seed 4321), asked for the class of the smaller one. *asked denser*: the share of the scenes in
which the map is denser on that sign than on the other.

{two}
## Slow methods

The first {few} of the same scenes, because these methods take many runs of the model. The other rows repeat the first tables on
these scenes. The ceiling shows what deletion can reach; it is no explainer.

{slow_one}
{slow_two}
## The settings

| map | setting | tried |
|---|---|---|
{settings}"""


def load_decoders(short: str, classifier) -> dict[str, SCAN]:
    """Return SCAN with the decoders of three seeds, and for the ViT one whose masks rank by the gradient, as published."""
    name, scanners = f"signs_{short}", {}
    by = "gradient" if short == "cnn" else "relevance"
    wanted = [(f"SCAN, seed {seed}", seed, by) for seed in (0, 1, 2)]
    wanted += [("SCAN as published, seed 0", 0, "gradient")] if short == "vit" else []
    for label, seed, mask_by in wanted:
        path = CACHE / f"{name}_{mask_by}_{seed}.pt"
        if (seed, mask_by) == (0, by):
            path = CHECKPOINTS / f"{name}_decoder.pt"
        elif not path.exists():
            sys.path.insert(0, str(ROOT / "data"))
            from make_checkpoints import RECIPES

            CACHE.mkdir(parents=True, exist_ok=True)
            RECIPES[f"{name}_decoder"](mask_by=mask_by, seed=seed, path=path)
        scanner = SCAN(classifier.model, classifier.layer, classifier.image_size, device="cpu", mask_by=mask_by)
        scanners[label] = scanner.set_preprocess(classifier.preprocess).load_decoder(path)
    return scanners


def list_explainers(short: str, classifier) -> tuple[dict[str, Settings], dict[str, Settings]]:
    """Return the explainers with the settings to choose from, and the slow ones."""
    model, own = classifier.model, {"preprocess": classifier.preprocess}
    draws = torch.stack([image for image, _ in Signs(100, seed=5)])
    fast: dict[str, Settings] = {
        name: {f"P {p}": scanner.as_explainer(p) for p in PERCENTILES}
        for name, scanner in load_decoders(short, classifier).items()
    }
    with_gradient = (False,) if short == "cnn" else (False, True)  # a CNN of ReLU and BatchNorm is linear already

    def list_settings(name: str, options: list[dict], libra: tuple[bool, ...] = (False,)) -> Settings:
        method, settings = getattr(scanlib, name), {}
        for option in options:
            for with_libra in libra:
                given = {**option, **({"libra": True} if with_libra else {})}
                label = ", ".join(f"{key} {value}".removeprefix("target_layer ") for key, value in given.items()) or "default"
                settings[label.replace("encoder.layers.encoder_layer_", "block ")] = method(model, **own, **given)
        return settings

    cams = ["GradCAM", "GradCAMPlusPlus", "LayerCAM", "HiResCAM", "GradCAMElementWise", "EigenCAM", "EigenGradCAM", "FinerCAM"]
    if short == "cnn":
        layers = [{"target_layer": f"layer{k}"} for k in (1, 2, 3, 4)]
    else:
        layers = [
            {"target_layer": f"encoder.layers.encoder_layer_{k}"} for k in range(5)
        ]  # at the last, patches have no gradient
        layers += [{"target_layer": "encoder.layers.encoder_layer_5.ln_1"}]
        fast["attention rollout"] = list_settings("AttentionRollout", [{}])
        fast["attention relevance"] = list_settings("AttentionRelevance", [{}], with_gradient)
        fast["LeGrad"] = list_settings("LeGrad", [{}], with_gradient)
        relevance, several = fast["attention relevance"]["libra True"], fast["SCAN, seed 0"]["P (80, 85, 90, 95, 98)"]
        fast["SCAN x relevance"] = {"libra True": several.scanner.as_explainer(several.percentile, evidence=relevance)}

        def weight_by_centre(images: Tensor, target: Tensor) -> Tensor:
            centre = metrics.make_centre_maps(len(images), images.shape[2:])
            return scale_to_unit_range(weight_by_confidence(relevance(images, target), centre))

        fast["centre prior x relevance"] = {"libra True": weight_by_centre}
    for name in cams:
        libra = with_gradient if name not in ("EigenCAM",) else (False,)
        fast[name] = list_settings(name, layers, libra)
    fast["FullGrad"] = list_settings("FullGrad", [{}]) if short == "cnn" else {}
    for name in ("Saliency", "InputXGradient"):
        fast[name] = list_settings(name, [{}], with_gradient)
    fast["sum over blocks, plain gradient"] = {"default": Libra(model, **own, libra=False)}
    if short == "vit":
        fast["Libra"] = {"default": Libra(model, **own)}
    for name in ("SCAN, seed 0", "GradCAM", "Libra" if short == "vit" else "sum over blocks, plain gradient"):
        fast[f"{name}, log p"] = {label: explain_log_probability(each) for label, each in fast[name].items()}
    slow = {
        "SmoothGrad": list_settings("SmoothGrad", [{"noise": noise} for noise in (0.05, 0.15)], with_gradient),
        "IntegratedGradients": list_settings("IntegratedGradients", [{}], with_gradient),
        "ExpectedGradients": list_settings("ExpectedGradients", [{"baselines": draws}], with_gradient),
        "Occlusion": list_settings("Occlusion", [{"patch": patch, "stride": patch // 2} for patch in (8, 16)]),
        "RISE": list_settings("RISE", [{"masks": 1000}]),
        "AblationCAM": list_settings("AblationCAM", layers),
        "ScoreCAM": list_settings("ScoreCAM", layers),
    }
    for settings in slow.values():  # the baselines' pixels say nothing to a reader
        for label in [label for label in settings if "tensor" in label]:
            settings["libra True" if "libra" in label else "100 baselines"] = settings.pop(label)
    return {name: settings for name, settings in fast.items() if settings}, slow


def choose_settings(classifier, explainers: dict[str, Settings], count: int) -> dict[str, str]:
    """Return the label of the setting with the highest insertion less deletion."""
    images, labels = (torch.stack(list(map(torch.as_tensor, each))) for each in zip(*Signs(count, seed=555), strict=True))
    score, chosen = metrics.build_class_score(classifier.model, classifier.preprocess, labels), {}
    for name, settings in tqdm(explainers.items(), "settings"):
        values = {}
        for label, explainer in settings.items() if len(settings) > 1 else ():
            maps = torch.cat([explainer(*batch) for batch in zip(images.split(50), labels.split(50), strict=True)])
            curves = metrics.compute_removal_curves(score, images, maps, steps=5, patch=4)
            deletion, insertion = (float(metrics.compute_auc(curve).mean()) for curve in curves)
            values[label] = insertion - deletion
        chosen[name] = max(values, key=values.__getitem__, default=next(iter(settings)))
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("classifier", choices=("cnn", "vit"))
    parser.add_argument("--count", type=int, default=500, help="test scenes; default: 500")
    parser.add_argument("--few", type=int, default=40, help="test scenes for the slow methods; default: 40")
    parser.add_argument("--chosen", type=int, default=60, help="scenes to choose the settings on; default: 60")
    arguments = parser.parse_args()
    short, count, few = arguments.classifier, arguments.count, arguments.few
    classifier = load_classifier(f"signs_{short}")
    fast, slow = list_explainers(short, classifier)
    chosen = choose_settings(classifier, fast, arguments.chosen)
    chosen |= choose_settings(classifier, slow, max(2, arguments.chosen // 4))
    best = {name: settings[chosen[name]] for name, settings in (fast | slow).items()}
    quick = {name: best[name] for name in fast}
    again = {name: best[name] for name in ("SCAN, seed 0", "GradCAM", "Libra", "Libra, log p") if name in best}
    expensive = again | {name: best[name] for name in slow}

    images, labels, masks = zip(*Signs(count, seed=987, masks=True), strict=True)
    images, labels, masks = torch.stack(images), torch.tensor(labels), torch.stack(masks).bool()
    scenes = [Signs(count, seed=4321, objects=2).scene(index) for index in range(count)]
    pairs = torch.stack([scene.image for scene in scenes]).float()
    kinds = torch.tensor([scene.labels for scene in scenes])
    areas = [torch.stack([scene.masks[k] for scene in scenes]).bool() for k in (1, 0)]  # the smaller first

    def measure(explainers: dict[str, Callable], part: slice, two: bool, ceiling: int | None = None):
        common = {"preprocess": classifier.preprocess, "patch": 4}
        if two:
            known = {
                "target": kinds[part, 1],
                "other_classes": kinds[part, 0],
                "masks": areas[0][part],
                "other_masks": areas[1][part],
            }
            return compare(classifier.model, pairs[part], explainers, TWO_SIGNS, **known, **common)
        known = {"target": labels[part], "masks": masks[part]}
        known["absent_classes"] = metrics.draw_absent_classes(labels[part], 10)
        return compare(classifier.model, images[part], explainers, ONE_SIGN, ceiling=ceiling, **known, **common)

    everything, start = slice(None), slice(few)
    tables = {
        "one": measure(quick, everything, False),
        "two": measure(quick, everything, True),
        "slow_one": measure(expensive, start, False, ceiling=8),
        "slow_two": measure(expensive, start, True),
    }
    text = TEXT.format(
        kind="CNN" if short == "cnn" else "vision transformer",
        short=short,
        machine=f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}",
        date=time.strftime("%Y-%m-%d"),
        count=count,
        chosen=arguments.chosen,
        few=few,
        settings="".join(f"| {name} | {chosen[name]} | {len(settings)} |\n" for name, settings in (fast | slow).items()),
        **{name: table.to_markdown() for name, table in tables.items()},
    )
    path = Path(__file__).with_name(f"LEADERBOARD_{short.upper()}.md")
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
