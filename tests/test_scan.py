import copy
import itertools
import warnings

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from scanlib import SCAN, AttentionRelevance, build_small_vit, load_classifier
from scanlib.data import Signs
from scanlib.explainers.attention import RelevanceTap
from scanlib.explainers.base import normalize_map
from scanlib.explainers.formulas import grad_cam, layer_cam
from scanlib.hooks import FeatureTap
from scanlib.masking import MASK_METHODS, blur_to_grid, compute_mask_scores, compute_threshold
from scanlib.metrics import build_class_score, compute_checkerboard, evaluate_maps
from scanlib.models.small import Normalize
from scanlib.models.zoo import CHECKPOINTS
from tests.explainers.test_attention import TinyTransformer


class Killed(BaseException):
    pass


def pictures(count=12, size=32):
    x = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(2)) * 255
    return TensorDataset(x, torch.arange(count) % 5)


def scanner_for(model, layer="back", size=32, **options):
    return SCAN(model, layer, image_size=(size, size), device="cpu", **options).set_preprocess(lambda x: x / 255)


def ready(model, **options):
    """A scanner set up and one epoch old."""
    scanner = scanner_for(model, **options).set_dataset(DataLoader(pictures(), 4)).generate_decoder().compile()
    scanner.fit(1, verbose=False)
    return scanner


# --- the maths ---


@settings(deadline=None)
@given(st.integers(1, 40), st.floats(0, 100), st.integers(0, 10**6), st.floats(0, 1))
def test_percentile_is_numpys_over_the_positives(entries, percentile, seed, share):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(3, 2, entries)) * (rng.random((3, 2, entries)) < share)
    result = compute_threshold(torch.tensor(scores), percentile)
    assert result.shape == (3, 1, 1)
    for row, threshold in zip(scores, result.flatten().tolist(), strict=True):
        positives = row[row > 0]
        assert threshold == pytest.approx(np.percentile(positives, percentile) if positives.size else 0.0, abs=1e-12)


def test_percentile_per_image():
    scores = torch.arange(1.0, 12).expand(3, 11)
    assert compute_threshold(scores, torch.tensor([0.0, 50, 100])).flatten().tolist() == [1, 6, 11]


def test_mask_scores_by_hand():
    features = torch.tensor([[[[1.0]], [[2.0]], [[3.0]]]])
    gradient = torch.tensor([[[[2.0]], [[-1.0]], [[1.0]]]])
    assert compute_mask_scores(features, gradient, "gradient").flatten().tolist() == [2, 0, 1]
    assert compute_mask_scores(features, gradient, "attribution").flatten().tolist() == [2, 0, 3]
    assert compute_mask_scores(features, gradient, "position").flatten().tolist() == [6, 0, 9]  # times 2 - 2 + 3
    tokens = compute_mask_scores(
        features.flatten(2).transpose(1, 2), gradient.flatten(2).transpose(1, 2), "position", channel_dim=-1
    )
    assert tokens.flatten().tolist() == [6, 0, 9]
    two = torch.tensor([[[[2.0, 3.0]], [[-1.0, 5.0]]]]), torch.tensor([[[[1.0, 0.5]]]])  # gradient, relevance of two places
    assert compute_mask_scores(two[0], two[0], "relevance", relevance=two[1]).flatten().tolist() == [2, 1.5, 0, 2.5]


def test_masked_features_against_a_plain_loop(tiny, images):
    """Eq. 1 in numpy, image by image, with its own full backward pass."""
    scanner = ready(tiny)
    features, scores = scanner.extract(images, [0, 1, 2, 3])
    for percentile in (0, 70, 95):
        masked = scanner._masked(features, scores, percentile)
        for i in range(4):
            kept = {}
            handle = tiny.back.register_forward_hook(lambda m, x, y, kept=kept: kept.update(f=y))
            y = tiny(images[i : i + 1] / 255)[0, i]
            handle.remove()
            gradient = np.maximum(torch.autograd.grad(y, kept["f"])[0][0].numpy(), 0)
            threshold = np.percentile(gradient[gradient > 0], percentile)
            expected = kept["f"][0].detach().numpy() * (gradient >= threshold * (1 - 1e-6))
            np.testing.assert_allclose(masked[i].numpy(), expected, rtol=1e-4, atol=1e-6)


def test_blur_against_torchvision_and_its_band_limit():
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    expected = torchvision.transforms.functional.gaussian_blur(x, [17, 17], [8.0, 8.0])
    torch.testing.assert_close(blur_to_grid(x, (8, 8)), expected)
    wide = blur_to_grid(torch.rand(1, 3, 32, 64, dtype=torch.float64), (8, 8))  # sigma 4 down, 8 across
    assert wide.shape == (1, 3, 32, 64)
    assert wide.diff(dim=3).abs().mean() < wide.diff(dim=2).abs().mean()
    torch.testing.assert_close(blur_to_grid(torch.full((1, 3, 16, 16), 7.0), (2, 2)), torch.full((1, 3, 16, 16), 7.0))


def test_target_image_is_the_blurred_picture_in_range(tiny, images):
    scanner = scanner_for(tiny).generate_decoder()
    target = scanner.target_image(images)
    assert target.shape == (4, 3, 32, 32) and target.abs().max() <= 1
    torch.testing.assert_close(target.mean(), images.mean() / 127.5 - 1, atol=0.02, rtol=0)


# --- the published way of use, call for call ---


def test_published_use_on_a_resnet50(tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    loader = DataLoader(pictures(2, 224), batch_size=2)
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
    assert scanner.optimizer.param_groups[0]["lr"] == pytest.approx(1e-6)
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


def test_training_lowers_the_loss_and_metrics_are_validation_ones(tiny):
    scanner = (
        scanner_for(tiny)
        .set_dataset(DataLoader(pictures(), 4), use_augmentation=False)
        .set_validation_dataset(DataLoader(pictures(), 12))
    )
    history = scanner.generate_decoder().compile(learning_rate=3e-3).fit(15, verbose=False)
    assert history["loss"][-1] < 0.8 * history["loss"][0]
    # validation by hand: mask G > 0, eval mode
    images, labels = pictures().tensors
    features, scores = scanner.extract(images, labels)
    with torch.no_grad():
        outputs = scanner.decoder.eval()(features * (scores > 0))
        loss = scanner.criterion(outputs, scanner.target_image(images))
    assert history["val_loss"][-1] == pytest.approx(float(loss), rel=1e-4)


def test_percentiles_are_drawn_per_image_and_visit_within_the_range(tiny, monkeypatch):
    import scanlib.scan

    drawn = []
    real = scanlib.scan.compute_threshold
    monkeypatch.setattr(scanlib.scan, "compute_threshold", lambda scores, p: drawn.append(torch.as_tensor(p)) or real(scores, p))
    scanner = (
        scanner_for(tiny)
        .set_dataset(DataLoader(pictures(), 4), use_augmentation=(80, 90))
        .set_validation_dataset(DataLoader(pictures(), 12))
    )
    scanner.generate_decoder().compile().fit(2, verbose=False)
    training = torch.cat([p for p in drawn if p.ndim])
    assert len(training) == 24 and len(set(training.tolist())) == 24 and 80 <= training.min() < training.max() <= 90
    assert [float(p) for p in drawn if not p.ndim] == [0, 0]


WAYS = [(kind, way) for kind in ("conv", "tokens") for way in MASK_METHODS if (kind, way) != ("conv", "relevance")]


@pytest.mark.parametrize(("layer_kind", "mask_by"), WAYS)
def test_cache_changes_no_figure(tiny, mask_by, layer_kind):
    if layer_kind == "tokens":
        torch.manual_seed(0)
        model, layer = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5), "encoder.layers.encoder_layer_0"
        nn.init.normal_(model.heads.head.weight)
    else:
        model, layer = tiny, "back"
    histories = []
    warnings.filterwarnings("ignore", "[0-9]+ of [0-9]+ images have no positive position")  # an untrained network may have such
    for cache in (True, False):
        torch.manual_seed(0)
        scanner = scanner_for(model, layer, mask_by=mask_by).set_dataset(DataLoader(pictures(), 4)).generate_decoder().compile()
        histories.append(scanner.fit(3, verbose=False, cache=cache))
    assert histories[0]["loss"] == pytest.approx(histories[1]["loss"], rel=1e-4)


def test_the_model_runs_once_with_a_cache_and_once_an_epoch_without(tiny):
    calls = []
    tiny.head.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    for cache, expected in ((True, 12), (False, 36), ("auto", 12)):
        scanner = scanner_for(tiny).set_dataset(DataLoader(pictures(), 4, shuffle=True)).generate_decoder().compile()
        calls.clear()
        scanner.fit(3, verbose=False, cache=cache)
        assert sum(calls) == expected
    calls.clear()
    scanner.fit(2, verbose=False, cache_budget=1000)  # too small a budget: auto does not cache
    assert sum(calls) == 24


def test_auto_cache_does_not_freeze_random_augmentation(tiny):
    class Flipping(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            image = pictures()[index][0]
            return (image.flip(-1) if torch.rand(()) < 0.5 else image), 0

    calls = []
    tiny.head.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    scanner = scanner_for(tiny).set_dataset(DataLoader(Flipping(), 4)).generate_decoder().compile()
    calls.clear()
    scanner.fit(2, verbose=False)
    assert sum(calls) == 24


@pytest.mark.parametrize("cache", [True, False, "auto"])
@pytest.mark.parametrize("drop_last", [False, True])
def test_killed_fit_resumes_bit_for_bit(tiny, tmp_path, cache, drop_last):
    def run(checkpoint=None, on_step=None, global_seed=0):
        torch.manual_seed(0)
        loader = DataLoader(TensorDataset(*(column[:11] for column in pictures().tensors)), 4, shuffle=True, drop_last=drop_last)
        scanner = (
            scanner_for(tiny).set_dataset(loader).set_validation_dataset(DataLoader(pictures(), 5)).generate_decoder().compile()
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


def test_batch_samplers_with_a_generator_of_their_own_resume_too(tiny, tmp_path):
    def run(checkpoint=None, kill=None):
        torch.manual_seed(0)
        sampler = torch.utils.data.RandomSampler(pictures(), generator=torch.Generator().manual_seed(7))
        loader = DataLoader(pictures(), batch_sampler=torch.utils.data.BatchSampler(sampler, 4, False))

        def on_step(trainer):
            trainer.save_every = 0
            if trainer.epoch * 3 + trainer.step == kill:
                raise Killed

        scanner = scanner_for(tiny).set_dataset(loader).generate_decoder().compile()
        return scanner.fit(2, verbose=False, checkpoint=checkpoint, on_step=on_step)

    whole = run()
    with pytest.raises(Killed):
        run(tmp_path / "run.pt", kill=5)
    assert run(tmp_path / "run.pt") == whole


def test_resuming_another_run_is_refused(tiny, tmp_path):
    def run(count=12, percentiles=(70, 100), optimizer=torch.optim.Adam, mask_by="gradient", **options):
        loader = DataLoader(TensorDataset(*(column[:count] for column in pictures().tensors)), 4)
        scanner = scanner_for(tiny, mask_by=mask_by).set_dataset(loader, percentiles).generate_decoder()
        scanner.compile(optimizer_class=optimizer, **options).fit(1, verbose=False, checkpoint=tmp_path / "run.pt")

    run()
    schedule = {"scheduler_class": torch.optim.lr_scheduler.StepLR, "scheduler_kwargs": {"step_size": 1}}
    for change, said in [
        ({"count": 8}, "batches = 3, this one has 2"),
        ({"percentiles": (90, 100)}, r"percentiles = \[70, 100\], this one has \[90, 100\]"),
        ({"optimizer": torch.optim.SGD}, "optimizer = Adam, this one has SGD"),
        ({"mask_by": "position"}, "mask_by = gradient, this one has position"),
        ({"learning_rate": 0.5}, "learning_rate = 0.001, this one has 0.5"),
        ({"metrics": []}, "metrics"),
        (schedule, "scheduler = None, this one has StepLR"),
    ]:
        with pytest.raises(ValueError, match=f"run.pt is of a run with {said}"):
            run(**change)


def test_the_cache_is_shuffled_anew_each_epoch_as_the_loader_is(tiny):
    for shuffle in (True, False):
        scanner = scanner_for(tiny).set_dataset(DataLoader(pictures(), 4, shuffle=shuffle)).generate_decoder().compile()
        scanner.fit(1, verbose=False)
        cached, _ = scanner._prepared(scanner.dataset, 3, True, 1e9, False)
        first, second = (torch.cat([batch[2] for batch in cached]) for _ in range(2))
        assert torch.equal(first, second) != shuffle


def test_auto_cache_takes_plain_loaders_only(tiny):
    data = torch.utils.data
    own_collate = lambda items: torch.utils.data.default_collate(items)  # noqa: E731
    plain = [DataLoader(pictures(), 4), DataLoader(pictures(), 4, shuffle=True)]
    other = [
        DataLoader(pictures(), 4, collate_fn=own_collate),
        DataLoader(pictures(), 4, sampler=data.RandomSampler(pictures(), num_samples=6)),
        DataLoader(pictures(), 4, sampler=data.WeightedRandomSampler([1.0] * 12, 12)),
        DataLoader(pictures(), 5, shuffle=True, drop_last=True),
        DataLoader(pictures(), batch_sampler=data.BatchSampler(data.RandomSampler(pictures()), 4, False)),
        [pictures().tensors],
    ]
    from scanlib.training.feature_cache import FeatureCache

    for loaders, cached in ((plain, True), (other, False)):
        for loader in loaders:
            scanner = scanner_for(tiny).set_dataset(loader).generate_decoder().compile()
            scanner.fit(1, verbose=False)
            prepared, _ = scanner._prepared(loader, 2, "auto", 1e9, False)
            assert isinstance(prepared, FeatureCache) == cached


def test_loaders_of_images_alone_and_of_unknown_labels_use_the_predicted_class(tiny):
    images, _ = pictures().tensors
    predicted = tiny(images / 255).argmax(1)
    losses = []
    for loader in ([images[:6], images[6:]], [(images, torch.full((12,), -1))], [(images, predicted)]):
        torch.manual_seed(0)
        scanner = scanner_for(tiny).set_dataset(loader, use_augmentation=False).generate_decoder().compile(learning_rate=0.0)
        losses.append(scanner.fit(1, verbose=False)["loss"][0])
    assert losses[1] == pytest.approx(losses[2]) and losses[0] == pytest.approx(
        losses[2], rel=0.02
    )  # other batches for BatchNorm


def test_streams_train_too(tiny):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(list(pictures()))

    scanner = scanner_for(tiny).set_dataset(DataLoader(Stream(), 4)).generate_decoder().compile()
    assert len(scanner.fit(2, verbose=False)["loss"]) == 2


def test_without_the_gradient_mask_nothing_is_differentiated(tiny, images, monkeypatch):
    monkeypatch.setattr(FeatureTap, "gradient", lambda *_: pytest.fail("a gradient was taken"))
    scanner = ready(tiny, use_gradient_mask=False)
    features, scores = scanner.extract(images)
    torch.testing.assert_close(scanner._masked(features, scores, 95), features)
    assert scanner(images)[0].shape == (4, 32, 32)


def own_decoder(channels=4):
    return nn.Sequential(
        nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, channels, 1), nn.Upsample(scale_factor=2)
    )


def test_own_decoder(tiny, images, tmp_path):
    scanner = scanner_for(tiny, decoder_model=own_decoder()).set_dataset(DataLoader(pictures(), 4)).compile()
    scanner.fit(1, verbose=False)
    assert scanner.decoder[1].num_batches_tracked == 3  # trained in training mode, and no batch but the loader's
    assert scanner(images)[0].shape == (4, 32, 32)
    scanner.save_decoder(tmp_path / "own.pt")
    with pytest.raises(ValueError, match="a decoder of one's own making; pass that module as decoder_model first"):
        scanner_for(tiny).load_decoder(tmp_path / "own.pt")
    again = scanner_for(tiny, decoder_model=own_decoder())
    again.load_decoder(tmp_path / "own.pt")
    torch.testing.assert_close(again(images), scanner(images))
    with pytest.raises(
        ValueError, match=r"decoder_model returns \(1, 3, 16, 16\) for one picture; it must return \(N, 4, h, w\)"
    ):
        scanner_for(tiny, decoder_model=own_decoder(3)).set_dataset(DataLoader(pictures(), 4)).compile().fit(1, verbose=False)


def test_full_resolution(tiny, images):
    full = scanner_for(tiny).set_dataset(DataLoader(pictures(), 4)).generate_decoder(output_stride=1).compile()
    full.fit(1, verbose=False)
    assert full.explain(images, normalize=False).shape == (4, 32, 32)


def test_confidence_and_reconstruction_from_the_decoders_output(tiny, images):
    """A decoder that always says z = 1 and colours (-1, 0, 0.5): Eq. 4 and the way back to pixels by hand."""

    class Constant(nn.Module):
        def forward(self, x):
            return torch.tensor([1.0, -1.0, 0.0, 0.5]).view(1, 4, 1, 1).expand(len(x), 4, 4, 4)

    confidence, reconstruction = scanner_for(tiny, decoder_model=Constant())(images)
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


def test_token_layers_take_the_transformer_decoder_unless_told_otherwise(vit):
    picture = torch.rand(3, 64, 64) * 255
    scanner = vit_scanner(vit, "encoder.layers.encoder_layer_4")
    for asked, kind in ((None, "TransformerDecoder"), (True, "TransformerDecoder"), (False, "ConvolutionalDecoder")):
        scanner.generate_decoder(is_Transformer=asked).compile().fit(1, verbose=False)
        assert type(scanner.decoder).__name__ == kind and scanner(picture)[0].shape == (64, 64)


def test_the_last_blocks_output_gives_way_to_its_first_norm(vit, tmp_path):
    said = "_5' sends no gradient to the patch tokens .behind it the head reads the class token.; moved to '.*_layer_5.ln_1'"
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
def test_masks_by_relevance_weigh_each_place(vit, transformer):
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
        torch.testing.assert_close(scores, gradient * relevance[:, None])
    assert (relevance > 0).all()


def test_masks_by_relevance_run_the_model_once(vit):
    scanner = vit_scanner(vit, "encoder.layers.encoder_layer_4", mask_by="relevance").generate_decoder()
    runs = []
    with vit.register_forward_hook(lambda *_: runs.append(1)):
        extracted = scanner.extract(torch.rand(2, 3, 64, 64) * 255)
    assert len(runs) == 1 and not any(each.requires_grad for each in extracted)  # no graph is dragged along
    assert all(parameter.grad is None for parameter in vit.parameters())
    with pytest.raises(RuntimeError, match="nothing captured"), RelevanceTap(vit, scanner.layer_name) as tap:
        tap.gradient_and_relevance()


class Beside(nn.Module):
    """A CNN with a transformer at its side, which the score does not ask."""

    def __init__(self, graph: bool):
        super().__init__()
        self.graph, self.front, self.head = graph, nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4, 5)
        self.side = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)

    def forward(self, x):
        with torch.set_grad_enabled(self.graph and torch.is_grad_enabled()):
            self.seen = self.side(x)
        return self.head(self.front(x).square().mean((2, 3)))


@pytest.mark.parametrize("graph", [True, False])
def test_masks_by_relevance_need_attention_that_the_score_asks(graph):
    with pytest.raises(ValueError, match="mask_by 'relevance' needs attention over the whole picture"):
        scanner_for(Beside(graph).eval(), "front", mask_by="relevance").generate_decoder()


def test_masks_by_relevance_at_a_finer_grid_than_attentions():
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(16, 4, 2, 2, 16, 32, num_classes=5)
    nn.init.normal_(vit.heads.head.weight)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1), vit).eval()  # features 16 x 16, attention 4 x 4
    images = torch.rand(2, 3, 32, 32) * 255
    weighing, plain = (scanner_for(model, "0", mask_by=way).generate_decoder() for way in ("relevance", "gradient"))
    relevance = AttentionRelevance(model, preprocess=lambda x: x / 255)(images, 1, normalize=False)
    finer = nn.functional.interpolate(relevance[:, None], size=(16, 16), mode="bilinear")
    torch.testing.assert_close(weighing.extract(images, 1)[1], plain.extract(images, 1)[1] * finer)
    double = SCAN(model.double(), "0", (32, 32), device="cpu", mask_by="relevance").set_preprocess(lambda x: x.double() / 255)
    assert all(each.dtype == torch.float32 for each in double.generate_decoder().extract(images, 1))


def test_masks_by_relevance_need_attention_over_the_picture(tiny):
    with pytest.raises(ValueError, match="mask_by 'relevance' needs attention over the whole picture, and .* attribution"):
        scanner_for(tiny, mask_by="relevance").generate_decoder()
    scanner_for(tiny, mask_by="relevance", use_gradient_mask=False).generate_decoder()  # it is not asked for


def test_masked_tokens_against_a_plain_loop(vit):
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(4)) * 255
    scanner = vit_scanner(vit, "encoder.layers.encoder_layer_4").generate_decoder()
    features, scores = scanner.extract(images, [1, 2, 3])
    masked = scanner._masked(features, scores, 90.0).detach().numpy()
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


# --- the explainer call ---


def test_explain_answers_the_common_call(tiny, images):
    scanner = ready(tiny)
    maps = scanner.explain(images, [0, 1, 2, 3])
    assert maps.shape == (4, 32, 32) and maps.amin() == 0 and maps.amax() == 1
    torch.testing.assert_close(scanner.explain(images[2:3], 2)[0], maps[2], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(scanner.explain(images, lambda row: row[1]), scanner.explain(images, 1), rtol=1e-4, atol=1e-5)
    bigger = torch.nn.functional.interpolate(images, size=(48, 40))
    assert scanner.explain(bigger).shape == (4, 48, 40)
    assert scanner.explain(images, normalize=False).max() <= 1
    with pytest.raises(ValueError, match="2 classes for 4 images"):
        scanner.explain(images, [0, 1])


def test_float64_uint8_and_other_sizes(tiny, images):
    scanner = ready(tiny)
    a, _ = scanner(images.round().to(torch.uint8))
    b, _ = scanner(images.round().double())
    torch.testing.assert_close(a, b)
    assert scanner(torch.nn.functional.interpolate(images, size=50))[0].shape == (4, 32, 32)


# --- saved decoders ---


def test_half_precision_round_trip(tiny, images, tmp_path):
    scanner = ready(tiny)
    scanner.save_decoder(tmp_path / "half.pt", half=True, notes={"who": "me"})
    scanner.save_decoder(tmp_path / "full.pt")
    assert (tmp_path / "half.pt").stat().st_size < (tmp_path / "full.pt").stat().st_size
    again = scanner_for(tiny)
    assert again.load_decoder(tmp_path / "half.pt") is again and again.notes == {"who": "me"}
    assert next(again.decoder.parameters()).dtype == torch.float32
    torch.testing.assert_close(again(images)[0], scanner(images)[0], atol=0.02, rtol=0)
    assert all(value.device.type == "cpu" for value in torch.load(tmp_path / "half.pt", weights_only=True)["state_dict"].values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_decoders_travel_between_cpu_and_cuda(tiny, images, tmp_path):
    scanner = ready(tiny)
    expected = scanner(images)[0]
    scanner.save_decoder(tmp_path / "cpu.pt")
    on_gpu = SCAN(copy.deepcopy(tiny), "back", (32, 32), device="cuda").set_preprocess(lambda x: x / 255)
    on_gpu.load_decoder(tmp_path / "cpu.pt")
    torch.testing.assert_close(on_gpu(images)[0], expected, rtol=1e-2, atol=1e-2)
    on_gpu.save_decoder(tmp_path / "cuda.pt")
    back = scanner_for(tiny)
    back.load_decoder(tmp_path / "cuda.pt")
    torch.testing.assert_close(back(images)[0], expected, rtol=1e-2, atol=1e-2)


def test_decoders_of_another_layer_model_or_weights(tiny, tmp_path):
    ready(tiny).save_decoder(tmp_path / "d.pt")
    with pytest.raises(
        ValueError, match="d.pt was trained for layer = back, this scanner has front; build the scanner as it was"
    ):
        scanner_for(tiny, "front").load_decoder(tmp_path / "d.pt")
    with pytest.raises(ValueError, match="was trained for model = TinyNet, this scanner has ResNet"):
        SCAN(torchvision.models.resnet18(weights=None), "layer1", (32, 32), device="cpu").load_decoder(tmp_path / "d.pt")
    with pytest.raises(ValueError, match="mask_by = gradient, this scanner has position"):
        scanner_for(tiny, mask_by="position").load_decoder(tmp_path / "d.pt")
    other = copy.deepcopy(tiny)
    nn.init.normal_(other.head.weight)
    with pytest.warns(UserWarning, match="other weights of the same architecture"):
        scanner_for(other).load_decoder(tmp_path / "d.pt")


class Hostile:
    def __reduce__(self):
        return (print, ("code ran",))


def test_damaged_and_hostile_decoders(tiny, images, tmp_path, capsys):
    ready(tiny).save_decoder(tmp_path / "d.pt")
    whole = (tmp_path / "d.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    torch.save(Hostile(), tmp_path / "hostile.pt")
    for name in ("cut.pt", "hostile.pt"):
        with pytest.raises(ValueError, match=f"{name} is truncated or no plain checkpoint"):
            scanner_for(tiny).load_decoder(tmp_path / name)
    assert "code ran" not in capsys.readouterr().out
    torch.save(tiny.state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match="checkpoint of another kind: it lacks identity"):
        scanner_for(tiny).load_decoder(tmp_path / "other.pt")
    broken = torch.load(tmp_path / "d.pt", weights_only=True)
    broken["config"]["decoder"] = "os.system"
    torch.save(broken, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match="does not fit its own description"):
        scanner_for(tiny).load_decoder(tmp_path / "broken.pt")
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
        scanner = ready(tiny)
        before = scanner(images)
        with pytest.raises(ValueError, match=r"broken.pt") as raised:
            scanner.load_decoder(tmp_path / "broken.pt")
        assert "\n" not in str(raised.value)
        torch.testing.assert_close(scanner(images), before)  # the decoder that was there still is


def test_shipped_decoder_on_fresh_scenes():
    target = load_classifier("signs_cnn")
    scanner = SCAN(target.model, target.layer, target.image_size, device="cpu").set_preprocess(target.preprocess)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it must be the decoder of these very weights
        scanner.load_decoder(CHECKPOINTS / "signs_cnn_decoder.pt")
    images, _, masks = map(list, zip(*Signs(200, seed=77, masks=True), strict=True))
    maps, masks = scanner.explain(torch.stack(images)), torch.stack(masks)
    images = torch.stack(images)
    with FeatureTap(target.model, target.layer) as tap:
        classes = tap(target.preprocess(images)).argmax(1)
        cam = normalize_map(grad_cam(tap.features, tap.gradient(classes)), (64, 64))
    score = build_class_score(target.model, target.preprocess, classes)
    ours, theirs = evaluate_maps(maps, masks, images, score), evaluate_maps(cam, masks, images, score)
    assert ours["energy"] >= 0.57 and ours["peak"] >= 0.85 and ours["IoU"] > theirs["IoU"]
    assert ours["deletion"] <= theirs["deletion"] and ours["insertion"] >= theirs["insertion"] - 0.01
    assert sum(path.stat().st_size for path in CHECKPOINTS.glob("signs_cnn*.pt")) < 4e6


def test_shipped_vit_decoder_on_fresh_scenes():
    target = load_classifier("signs_vit")
    scanner = SCAN(target.model, target.layer, target.image_size, device="cpu", mask_by="relevance")
    scanner.set_preprocess(target.preprocess)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scanner.load_decoder(CHECKPOINTS / "signs_vit_decoder.pt")
    images, _, masks = map(list, zip(*Signs(200, seed=77, masks=True), strict=True))
    images, masks = torch.stack(images), torch.stack(masks)
    with FeatureTap(target.model, target.layer) as tap:
        classes = tap(target.preprocess(images)).argmax(1)
        cam = normalize_map(layer_cam(tap.layout.to_maps(tap.features), tap.layout.to_maps(tap.gradient(classes))), (64, 64))
    score = build_class_score(target.model, target.preprocess, classes)
    ours = evaluate_maps(scanner.explain(images, classes), masks, images, score)
    theirs = evaluate_maps(cam, masks, images, score)
    assert ours["energy"] >= 0.65 and ours["peak"] >= 0.85 and ours["IoU"] >= 0.55
    assert ours["deletion"] <= 0.21 and ours["insertion"] >= 0.89
    assert all(ours[name] > theirs[name] for name in ("energy", "peak", "IoU")) and ours["deletion"] < theirs["deletion"]
    raw = scanner.explain(images, classes, normalize=False)
    assert compute_checkerboard(raw).mean() < 0.005 and compute_checkerboard(raw, 4).mean() < 0.005  # no dithering
    assert sum(path.stat().st_size for path in CHECKPOINTS.glob("signs_vit*.pt")) < 4e6


# --- bad input: one line that says what would work ---


def test_bad_images(tiny, images):
    scanner = ready(tiny)
    for bad, message in [
        (images[:, :2], r"image must be a tensor \(3, H, W\) or \(N, 3, H, W\) in \[0, 255\], not \(4, 2, 32, 32\)"),
        (images.numpy(), "image must be a tensor"),
        ("cat.jpg", "not str"),
        (images * float("nan"), "image holds NaN or infinite values; expected finite pixels"),
    ]:
        with pytest.raises(ValueError, match=message):
            scanner(bad)
    with pytest.warns(UserWarning, match=r"image values lie in \[.*\], but \[0, 255\] is expected; multiply by 255"):
        scanner(images / 255)


def test_warnings_come_once_a_scanner_and_only_for_cause(tiny, images):
    scanner = ready(tiny)
    with pytest.warns(UserWarning, match="multiply by 255") as raised:
        for shift in range(3):
            scanner(images / (256 + shift))
    assert len(raised) == 1
    with pytest.warns(UserWarning, match="is expected, before normalising"):
        ready(tiny)(images - 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ready(tiny)(torch.ones(3, 32, 32, dtype=torch.uint8))


def test_models_in_other_precisions(tiny, images):
    expected = ready(tiny)(images)[0]
    double = scanner_for(copy.deepcopy(tiny).double()).set_preprocess(lambda x: (x / 255).double())
    torch.manual_seed(0)
    double.set_dataset(DataLoader(pictures(), 4)).generate_decoder().compile().fit(1, verbose=False)
    assert double(images)[0].dtype == expected.dtype == torch.float32
    features, scores = double.extract(images)
    assert features.dtype == scores.dtype == torch.float32


def test_fit_works_where_gradients_are_off(tiny, images):
    with torch.no_grad():
        ready(tiny)(images)
    with torch.inference_mode():
        ready(tiny)


def test_a_fit_that_took_no_step_trained_nothing(tiny, images):
    scanner = scanner_for(tiny).set_dataset([]).generate_decoder().compile()
    with pytest.raises(ValueError, match="the loader is empty"):
        scanner.fit(1, verbose=False)
    with pytest.raises(RuntimeError, match="not trained yet"):
        scanner(images)
    with pytest.raises(ValueError, match="epochs 0 is no number of epochs; give 1 or more"):
        scanner.fit(0)


def test_broken_weights_are_not_saved(tiny, tmp_path):
    scanner = ready(tiny)
    with torch.no_grad():
        next(scanner.decoder.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="weights are not finite, so it was not saved"):
        scanner.save_decoder(tmp_path / "d.pt")


def test_bad_sizes_and_batches(tiny):
    for size in (0, (32,), (32, 0)):
        with pytest.raises(ValueError, match="is no size; give"):
            SCAN(tiny, "back", image_size=size, device="cpu")
    for bad in (80, (70, 80, 90), None):
        with pytest.raises(ValueError, match=r"is no range; give \(low, high\)"):
            scanner_for(tiny).set_dataset([], use_augmentation=bad)
    scanner = scanner_for(tiny).set_dataset([{"image": 1}]).generate_decoder().compile()
    with pytest.raises(TypeError, match=r"the loader gives dictionaries \(image\); give \(images, labels\)"):
        scanner.fit(1, verbose=False)


def test_bad_percentiles_and_classes(tiny, images):
    scanner = ready(tiny)
    for percentile in (-1, 101, float("nan"), "95"):
        with pytest.raises(ValueError, match=r"out of range; give a number in 0\.\.100"):
            scanner(images, percentile=percentile)
    with pytest.raises(ValueError, match=r"class 5 is out of range: the model has classes 0\.\.4"):
        scanner(images, class_idx=5)
    for options in ({}, {"use_gradient_mask": False}):
        with pytest.raises(ValueError, match=r"class -1 is out of range"):
            ready(tiny, **options)(images, class_idx=-1)
    with pytest.raises(ValueError, match="3 classes for 4 images"):
        scanner(images, class_idx=[0, 1, 2])
    with pytest.raises(ValueError, match="runs backwards"):
        scanner.set_dataset([], use_augmentation=(100, 70))
    with pytest.raises(ValueError, match="percentile 120 is out of range"):
        scanner.set_dataset([], use_augmentation=(70, 120))


def test_bad_layers(tiny):
    with pytest.raises(ValueError, match="target_layer 'bak' not found; close matches: back"):
        scanner_for(tiny, "bak")
    with pytest.raises(RuntimeError, match="layer 'unused' did not run"):
        scanner_for(tiny, "unused").generate_decoder()
    with pytest.raises(ValueError, match="no spatial extent"):
        scanner_for(tiny, "head").generate_decoder()
    with pytest.raises(ValueError, match="mask_by 'grad' is not known; take one of gradient, attribution, position, relevance"):
        scanner_for(tiny, mask_by="grad")


def test_steps_out_of_order(tiny, images, tmp_path):
    scanner = scanner_for(tiny)
    with pytest.raises(RuntimeError, match="no decoder yet; call generate_decoder"):
        scanner(images)
    with pytest.raises(RuntimeError, match="no decoder yet"):
        scanner.compile()
    with pytest.raises(RuntimeError, match="nothing to train on; call set_dataset"):
        scanner.fit(1)
    scanner.set_dataset(DataLoader(pictures(), 4)).generate_decoder()
    with pytest.raises(RuntimeError, match="not compiled; call compile"):
        scanner.fit(1)
    for call in (lambda: scanner(images), lambda: scanner.explain(images), lambda: scanner.save_decoder(tmp_path / "d.pt")):
        with pytest.raises(RuntimeError, match=r"not trained yet; call fit\(\)"):
            call()
    scanner.compile().fit(1, verbose=False)
    scanner(images)


def test_empty_loader(tiny):
    for cache in (True, False):
        scanner = scanner_for(tiny).set_dataset([]).generate_decoder().compile()
        with pytest.raises(ValueError, match="the loader is empty; give it at least one batch"):
            scanner.fit(1, verbose=False, cache=cache)
    with pytest.raises(ValueError, match="cache 'yes' is not known"):
        scanner.fit(1, cache="yes")


# --- several percentiles, and evidence ---


def test_several_percentiles_are_the_mean_of_their_maps(tiny):
    scanner, images = ready(tiny), pictures().tensors[0]
    features, scores = scanner.extract(images)
    one = [scanner.decode(features, scores, p)[0] for p in (60, 80, 95)]
    several, rebuilt = scanner.decode(features, scores, (60, 80, 95))
    torch.testing.assert_close(several, sum(one) / 3)
    assert not torch.allclose(one[0], one[2]) and rebuilt.dtype == torch.uint8
    torch.testing.assert_close(scanner(images, percentile=np.array([60, 80, 95]))[0], several)
    maps = scanner.explain(images, percentile=(60, 80, 95), normalize=False)
    torch.testing.assert_close(maps, sum(scanner.explain(images, None, p, normalize=False) for p in (60, 80, 95)) / 3)


@pytest.mark.parametrize("wrong", [(), (50, 101), "95", [-1.0]])
def test_percentiles_that_are_none(tiny, wrong):
    scanner = ready(tiny)
    with pytest.raises(ValueError, match="percentile .*; give a number in 0..100"):
        scanner.explain(pictures().tensors[0], percentile=wrong)


def test_evidence_is_weighed_by_confidence_over_its_mean(tiny):
    scanner, images, seen = ready(tiny), pictures().tensors[0], []
    half = torch.zeros(len(images), 32, 32)
    half[:, :, 16:] = 0.5

    def evidence(pictures, target):
        seen.append((pictures, target))
        return half

    confidence = scanner.explain(images, 3, 90, normalize=False)
    assert confidence.shape[1:] == (32, 32)  # so nothing is resized
    by_hand = half * (1 + confidence / confidence.mean((1, 2), keepdim=True))
    torch.testing.assert_close(scanner.explain(images, 3, 90, normalize=False, evidence=evidence), by_hand)
    torch.testing.assert_close(scanner.explain(images, 3, 90, evidence=evidence), normalize_map(by_hand, (32, 32)))
    assert torch.equal(seen[0][0], images) and seen[0][1] == 3
    flat = scanner.explain(images, 3, 90, evidence=lambda pictures, target: torch.ones(len(pictures), 8, 8))
    torch.testing.assert_close(flat, scanner.explain(images, 3, 90))  # says nothing of any place


def test_evidence_sees_the_pictures_as_scan_does_and_may_need_gradients(tiny):
    scanner, sizes = ready(tiny), []

    def saliency(x, target):
        sizes.append(x.shape)
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            return torch.autograd.grad(tiny(x).amax(1).sum(), x)[0].abs().sum(1)

    maps = scanner.explain(torch.rand(2, 3, 48, 40) * 255, evidence=saliency)
    assert sizes == [(2, 3, 32, 32)] and maps.shape == (2, 48, 40)
    by_scan = scanner.explain(pictures().tensors[0], evidence=scanner)  # an object with ``explain`` will do
    assert by_scan.shape == (12, 32, 32)


def test_fine_evidence_is_averaged_not_sampled(tiny):
    scanner = SCAN(tiny, "back", (64, 64), device="cpu").set_preprocess(lambda x: x / 255)
    scanner.set_dataset(DataLoader(pictures(8, 64), 4)).generate_decoder(output_stride=4).compile().fit(1, verbose=False)
    images, dots = pictures(2, 64).tensors[0], torch.zeros(2, 64, 64)
    dots[:, ::4, ::4] = 1  # one pixel of each of the decoder's
    weighed = scanner.explain(images, normalize=False, evidence=lambda *_: dots)
    assert weighed.shape == (2, 16, 16) and (weighed > 0).all()


def test_empty_evidence_leaves_the_confidence(tiny):
    scanner, images = ready(tiny), pictures().tensors[0]
    half_empty = torch.ones(len(images), 8, 8)
    half_empty[:6] = 0
    with pytest.warns(UserWarning, match="the evidence of 6 images is empty"):
        maps = scanner.explain(images, evidence=lambda *_: half_empty)
    torch.testing.assert_close(maps[:6], scanner.explain(images)[:6])


@pytest.mark.parametrize("evidence", ["GradCAM", lambda x, _: x, lambda x, _: -torch.ones(len(x), 4, 4)])
def test_evidence_that_is_none(tiny, evidence):
    with pytest.raises(ValueError, match="^evidence "):
        ready(tiny).explain(pictures().tensors[0], evidence=evidence)


# --- encoded once, for several decoders ---


def test_decoders_share_encoded_pictures(tiny):
    loader = DataLoader(pictures(), 4, shuffle=True)
    apart, shared = scanner_for(tiny), scanner_for(tiny)
    histories = []
    for scanner in (apart, shared):
        torch.manual_seed(0)
        scanner.generate_decoder()
        scanner.set_dataset(loader if scanner is apart else scanner.encoded(loader, verbose=False)).compile()
        histories.append(scanner.fit(2, verbose=False, cache=True))
    assert histories[0] == histories[1]
    runs = []
    handle = tiny.register_forward_hook(lambda *_: runs.append(1))
    shared.generate_decoder().compile().fit(1, verbose=False)
    handle.remove()
    assert not runs  # the model rests
    with pytest.raises(RuntimeError, match="there is no decoder yet"):
        scanner_for(tiny).encoded(loader)


@pytest.mark.parametrize(
    ("other", "named"),
    [({"mask_by": "attribution"}, "mask_by"), ({"layer": "front"}, "layer"), ({"size": 64}, "grid"), ({"stride": 2}, "decoded")],
)
def test_pictures_encoded_for_another_scanner_are_refused(tiny, other, named):
    stride = other.pop("stride", None)
    cache = scanner_for(tiny).generate_decoder().encoded(DataLoader(pictures(), 4), verbose=False)
    scanner = scanner_for(tiny, **other).set_dataset(cache).generate_decoder(output_stride=stride).compile()
    with pytest.raises(ValueError, match=f"the pictures were encoded for {named} = "):
        scanner.fit(1, verbose=False)


def test_batches_of_a_single_tensor_are_images_alone(tiny):
    images = pictures().tensors[0]
    alone, tuples = (scanner_for(tiny).generate_decoder() for _ in range(2))
    first = alone.encoded(DataLoader(TensorDataset(images), 4), verbose=False)
    second = tuples.encoded(DataLoader(images, 4), verbose=False)
    for a, b in zip(first.tensors, second.tensors, strict=True):
        torch.testing.assert_close(a, b)
