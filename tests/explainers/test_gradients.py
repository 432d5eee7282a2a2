import pytest
import torch
import torchvision
from torch import nn

from scanlib import ExpectedGradients, GradCAM, InputXGradient, IntegratedGradients, Saliency, SmoothGrad
from scanlib.targets import LogProbability


class Square(nn.Module):
    """y_k = w_k . x^2: every map is known."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3 * 4 * 4, 5, bias=False).double()

    def forward(self, x):
        return self.head(x.flatten(1).square())

    def weigh(self, target):
        return self.head.weight[target].detach().view(3, 4, 4)


def scale(images):
    return images / 255 - 0.25


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Square().eval()


@pytest.fixture
def images():
    return torch.rand(3, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 255


def test_saliency_and_input_times_gradient_of_a_square(model, images):
    x, w = scale(images), model.weigh(2)
    found = Saliency(model, preprocess=scale)(images, target=2, normalize=False)
    torch.testing.assert_close(found, (2 * w * x).abs().amax(1))
    found = InputXGradient(model, preprocess=scale)(images, target=2, normalize=False)
    torch.testing.assert_close(found, (2 * w * x * x).sum(1))


def test_integrated_gradients_of_a_square_sum_to_the_difference(model, images):
    start = torch.full((3, 4, 4), 100.0, dtype=torch.float64)
    found = IntegratedGradients(model, preprocess=scale, baseline=start, batch_size=7)(images, target=2, normalize=False)
    x, b, w = scale(images), scale(start), model.weigh(2)
    torch.testing.assert_close(found, (w * (x * x - b * b)).sum(1))  # the midpoint rule is exact for a square
    torch.testing.assert_close(found.sum((1, 2)), (model(x) - model(b[None]))[:, 2].detach())


def test_expected_gradients_sum_to_the_difference_on_average(model, images):
    starts = torch.rand(6, 3, 4, 4, dtype=torch.float64) * 255
    explainer = ExpectedGradients(model, preprocess=scale, baselines=starts, samples=3000)
    found = explainer(images, target=2, normalize=False)
    logits = model(scale(images))[:, 2] - model(scale(starts))[:, 2].mean()
    torch.testing.assert_close(found.sum((1, 2)), logits.detach(), atol=0.05, rtol=0)
    assert torch.equal(found, explainer(images, target=2, normalize=False))


def test_smooth_grad_of_a_square(model, images):
    plain = Saliency(model, preprocess=scale)(images, target=2, normalize=False)
    found = SmoothGrad(model, preprocess=scale, samples=3, noise=0.0)(images, target=2, normalize=False)
    torch.testing.assert_close(found, plain)
    found = SmoothGrad(model, preprocess=scale, samples=4000)(images, target=2, normalize=False)
    torch.testing.assert_close(found, plain, atol=0.01, rtol=0)  # the gradient is linear, so noise averages out


METHODS = [Saliency, InputXGradient, IntegratedGradients, SmoothGrad]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", [None, 3, [0, 1, 4], LogProbability(1), [LogProbability(k) for k in (0, 1, 2)]])
def test_batches_equal_single_images(method, target, model, images):
    explainer = method(model, preprocess=scale, **({"noise": 0.0} if method is SmoothGrad else {}))
    found = explainer(images, target=target, normalize=False)
    for index, image in enumerate(images):
        one = target[index] if isinstance(target, list) else target
        torch.testing.assert_close(explainer(image[None], target=one, normalize=False)[0], found[index])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("libra", [False, True])
def test_the_model_stays_unchanged(method, libra):
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(16, 4, 1, 2, 16, 32, num_classes=5).train()
    nn.init.normal_(vit.heads.head.weight)
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    maps = method(vit, libra=libra)(torch.rand(2, 3, 16, 16) * 255)
    assert maps.shape == (2, 16, 16) and maps.min() >= 0 and maps.amax((1, 2)).eq(1).all()
    assert vit.training and all(parameter.grad is None for parameter in vit.parameters())
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda m: IntegratedGradients(m, steps=0), "steps must be at least 1, got 0"),
        (lambda m: SmoothGrad(m, samples=0), "samples must be at least 1"),
        (lambda m: ExpectedGradients(m, baselines=torch.zeros(0, 3, 4, 4)), r"baselines must be images .* got \(0, 3, 4, 4\)"),
        (lambda m: Saliency(m, "head"), "target_layer must be None for Saliency"),
        (lambda m: Saliency(m, batch_size=0), "batch_size must be at least 1"),
    ],
)
def test_bad_arguments(build, message, model):
    with pytest.raises(ValueError, match=message):
        build(model)


def test_captum_agrees(images):
    attr = pytest.importorskip("captum.attr")
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5).double().eval()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64) * 255
    torch.testing.assert_close(Saliency(model)(x, target=1, normalize=False), attr.Saliency(model).attribute(x, target=1).amax(1))
    found = InputXGradient(model)(x, target=1, normalize=False)
    torch.testing.assert_close(found, attr.InputXGradient(model).attribute(x, target=1).sum(1).detach())
    found = IntegratedGradients(model, steps=8)(x, target=1, normalize=False)
    other = attr.IntegratedGradients(model).attribute(x, target=1, n_steps=8, method="riemann_middle")
    torch.testing.assert_close(found, other.sum(1).detach(), atol=1e-6, rtol=1e-6)


def test_libra_changes_a_cam_of_a_transformer():
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(16, 4, 2, 2, 16, 32, num_classes=5).eval()
    nn.init.normal_(vit.heads.head.weight)
    x, layer = torch.rand(2, 3, 16, 16) * 255, "encoder.layers.encoder_layer_0"
    plain, changed = (GradCAM(vit, layer, libra=libra)(x, target=1, normalize=False) for libra in (False, True))
    assert not torch.allclose(plain, changed)
