import pytest
import torch

from scanlib.metrics import compute_adcc, compute_arcc, compute_checkerboard, compute_coherency, compute_complexity
from scanlib.metrics.quality import compute_correlation


def test_known_values():
    maps = torch.stack([torch.zeros(4, 4), torch.ones(4, 4), torch.eye(4)]).double()
    assert compute_complexity(maps).tolist() == [0, 1, 0.25]
    a = torch.tensor([[[1.0, 2], [3, 4]]] * 3)
    b = torch.tensor([[[2.0, 4], [6, 8]], [[4.0, 3], [2, 1]], [[5.0, 5], [5, 5]]])
    assert compute_correlation(a, b).tolist() == pytest.approx([1, -1, 0])
    assert compute_correlation(torch.full((1, 7, 7), 0.1), torch.full((1, 7, 7), 0.3)).tolist() == [0]
    one, half = torch.ones(1), torch.full((1,), 0.5)
    assert compute_arcc(half, one, half).item() == pytest.approx(3 / (1 / 1 + 1 / 0.5 + 1 / 1))
    assert compute_adcc(half, one, 100 * half).item() == pytest.approx(3 / (1 + 2 + 2))
    assert compute_arcc(half, one, -half).item() == pytest.approx(0, abs=1e-6)


def test_coherency_of_known_maps():
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 255
    maps = images[:, 0] / 255
    assert compute_coherency(lambda x, target: maps, images, maps).tolist() == pytest.approx([1, 1])
    assert compute_coherency(lambda x, target: -maps, images, maps).tolist() == pytest.approx([0, 0], abs=1e-6)
    with pytest.warns(UserWarning, match="resized"):
        assert compute_coherency(lambda x, target: maps[:, ::2, ::2], images, maps).shape == (2,)
    squared = compute_coherency(lambda x, target: x[:, 0], images, maps)  # of the dimmed image: the square of the map
    torch.testing.assert_close(squared, (compute_correlation(maps**2, maps) + 1) / 2)


def test_correlation_and_complexity_agree_with_grad_cam():
    theirs = pytest.importorskip("pytorch_grad_cam.metrics.arcc")
    a, b = torch.rand(3, 8, 8), torch.rand(3, 8, 8)
    torch.testing.assert_close(compute_correlation(a, b), torch.from_numpy(theirs.batch_pearson_coherency(a.numpy(), b.numpy())))
    torch.testing.assert_close(compute_complexity(a), torch.from_numpy(theirs.Complexity()(a.numpy())))


def test_checkerboard_of_known_patterns():
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    board, stripes, wide = (x + y) % 2, x % 2, x // 2 % 2
    ramp = torch.nn.functional.interpolate(torch.rand(1, 1, 4, 4, dtype=torch.float64), size=(16, 16), mode="bilinear")[0, 0]
    maps = torch.stack([board, stripes, wide, torch.ones(16, 16), ramp]).double()
    assert compute_checkerboard(maps).tolist()[:4] == pytest.approx([1, 1, 0, 0])
    assert compute_checkerboard(maps, 4).tolist()[:4] == pytest.approx([1, 1, 1, 0])
    assert compute_checkerboard(maps)[4] < 0.02
    half = (board.double() - 0.5) + 0.5 * torch.cos(x * 2 * torch.pi / 16) * 2**0.5  # equal variances: half of each
    assert float(compute_checkerboard(half[None])) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="period must .* divide both sides of the 16 x 16 maps, got 3"):
        compute_checkerboard(maps, 3)
    with pytest.raises(ValueError, match="period must be at least 2 .*, got 0"):
        compute_checkerboard(maps, 0)
    assert compute_checkerboard(board[None] > 0).tolist() == [1]
