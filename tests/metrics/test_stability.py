import pytest
import torch

from scanlib.metrics import compute_infidelity, compute_max_sensitivity


def linear_score(images, index):
    """Return the sum of the first row."""
    return images[:, :, 0].sum((1, 2)) / 255


def test_infidelity_known_values():
    images = torch.full((1, 3, 8, 8), 255.0)
    truth = torch.zeros(1, 8, 8)
    truth[:, 0] = 3  # the score that each pixel adds: its three channels
    options = {"patch": 1, "fill": torch.zeros_like, "samples": 30}
    assert compute_infidelity(linear_score, images, truth, rescale=False, **options).item() == pytest.approx(0, abs=1e-8)
    assert compute_infidelity(linear_score, images, 7 * truth, **options).item() == pytest.approx(0, abs=1e-8)
    wrong = truth.roll(1, 1)
    assert compute_infidelity(linear_score, images, wrong, **options).item() > 1
    empty = compute_infidelity(linear_score, images, torch.zeros_like(truth), **options).item()
    share, value = 0.25, 3.0  # each of eight pixels is removed with probability 1/4: E[(3 k)^2], k binomial
    assert empty == pytest.approx(value**2 * (8 * share * (1 - share) + (8 * share) ** 2), rel=0.3)


def test_infidelity_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    images, maps = torch.rand(5, 3, 10, 14) * 255, torch.rand(5, 10, 14)
    whole = compute_infidelity(linear_score, images, maps, patch=4)
    torch.testing.assert_close(whole, compute_infidelity(linear_score, images, maps, patch=4, batch_size=3))
    torch.testing.assert_close(whole[:1], compute_infidelity(linear_score, images[:1], maps[:1], patch=4))
    assert not torch.equal(whole, compute_infidelity(linear_score, images, maps, patch=4, seed=1))


def test_sensitivity_known_values():
    images = torch.full((3, 3, 4, 4), 100.0)
    constant = lambda x, target: torch.ones(len(x), 4, 4)  # noqa: E731
    assert compute_max_sensitivity(constant, images).tolist() == [0, 0, 0]
    assert compute_max_sensitivity(lambda x, target: torch.zeros(len(x), 4, 4), images).tolist() == [0, 0, 0]
    appears = compute_max_sensitivity(lambda x, target: (x != 100).any(1) * 1.0, images)  # zero without noise
    assert appears.isnan().all()
    follows = lambda x, target: x[:, 0]  # noqa: E731
    found = compute_max_sensitivity(follows, images, radius=5, samples=20)
    assert (found > 0.02).all() and (found < 0.05).all()  # noise of 5 in 100; its root mean square is 2.9
    torch.testing.assert_close(found, compute_max_sensitivity(follows, images, radius=5, samples=20, batch_size=2))  # seeded
    whole = compute_max_sensitivity(follows, images.to(torch.uint8), radius=5, samples=20)
    torch.testing.assert_close(found, whole)


def test_sensitivity_passes_each_image_its_own_class():
    targets = []

    def explainer(images, target):
        targets.append(target)
        return images[:, 0]

    images = torch.rand(3, 3, 4, 4) * 255
    compute_max_sensitivity(explainer, images, torch.tensor([4, 5, 6]), samples=1, batch_size=2)
    assert [t.tolist() for t in targets] == [[4, 5], [4, 5], [6], [6]]
    targets.clear()
    compute_max_sensitivity(explainer, images, [4, 5, 6], samples=1, batch_size=2)
    assert targets == [[4, 5], [4, 5], [6], [6]]
    targets.clear()
    compute_max_sensitivity(explainer, images, 7, samples=1)
    assert targets == [7, 7]


def test_sensitivity_keeps_noisy_images_in_range():
    ranges = []

    def explainer(images, target):
        ranges.append((images.min().item(), images.max().item()))
        return images[:, 0]

    images = torch.tensor([0.0, 255.0]).view(1, 1, 1, 2).expand(1, 3, 4, 2)
    compute_max_sensitivity(explainer, images, samples=5)
    assert ranges == [(0, 255)] * 6  # without the clamp, noise of 5 grey levels exceeds both ends
