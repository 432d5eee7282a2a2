import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision import models

from scanlib import SmallResNet
from scanlib.layers import eval_mode
from scanlib.models.freezing import FrozenStages, list_stages

NORM = ("running_mean", "running_var", "num_batches_tracked")


def tiny_vit():
    return torchvision.models.VisionTransformer(
        32, 8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, dropout=0.1, num_classes=5
    )


def tiny_densenet():
    return torchvision.models.DenseNet(4, (2, 2, 2), 8, num_classes=5)


def trained(frozen, steps=3):
    """The state before and after a few steps on noise, as anyone writes them; every parameter is given to the optimizer."""
    before = copy.deepcopy(frozen.model.state_dict())
    optimizer = torch.optim.AdamW(frozen.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(frozen(torch.rand(4, 3, 32, 32)), torch.arange(4)).backward()
        optimizer.step()
    after = frozen.model.state_dict()
    return {name for name in before if torch.equal(before[name], after[name])}, set(before)


# --- stages ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", ["layer1", "layer2", "layer3", "layer4"]),
        ("vgg11", [f"features.{i}" for i in (0, 3, 6, 8, 11, 13, 16, 18)]),
        ("vgg11_bn", [f"features.{i}" for i in (0, 1, 4, 5, 8, 9, 11, 12, 15, 16, 18, 19, 22, 23, 25, 26)]),
        ("mobilenet_v3_small", [f"features.{i}" for i in range(13)]),
        ("densenet121", [f"features.denseblock{i}" for i in range(1, 5)]),
        ("vit_b_16", [f"encoder.layers.encoder_layer_{i}" for i in range(12)]),
        ("googlenet", [f"inception{i}" for i in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")]),
        ("inception_v3", [f"Mixed_{i}" for i in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")]),
    ],
)
def test_stages_of_torchvision(name, expected):
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):  # names need no numbers
        model = models.get_model(name, weights=None, **options)
    assert list_stages(model) == expected


def test_stages_of_small_models():
    assert list_stages(SmallResNet()) == ["layer1", "layer2", "layer3", "layer4"]
    assert list_stages(tiny_vit()) == [f"encoder.layers.encoder_layer_{i}" for i in range(3)]
    assert list_stages(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))) == ["0", "2"]
    assert list_stages(nn.Linear(3, 2)) == []


def test_stages_of_timm():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("resnest26d")
    assert list_stages(model) == ["layer1", "layer2", "layer3", "layer4"]


# --- Frozen ---


@pytest.mark.parametrize(
    ("make", "count", "front"),
    [
        (lambda: models.resnet18(num_classes=5), 2, ("conv1", "bn1", "layer1", "layer2")),
        (lambda: models.resnet18(num_classes=5), 4, ("conv1", "bn1", "layer")),
        (SmallResNet, 1, ("stem", "layer1")),
        (lambda: models.mobilenet_v3_small(num_classes=5), 2, ("features.0.", "features.1.")),
        (
            tiny_densenet,
            2,
            ("features.conv0", "features.norm0", "features.denseblock1", "features.transition1", "features.denseblock2"),
        ),
        (
            tiny_vit,
            2,
            (
                "class_token",
                "conv_proj",
                "encoder.pos_embedding",
                "encoder.layers.encoder_layer_0",
                "encoder.layers.encoder_layer_1",
            ),
        ),
    ],
    ids=["resnet18", "resnet18-all", "signs_cnn", "mobilenet", "densenet", "vit"],
)
def test_frozen_parts_stay_bit_equal_and_the_others_move(make, count, front):
    torch.manual_seed(0)
    frozen = FrozenStages(make(), count).train()
    same, names = trained(frozen)
    assert same == {name for name in names if name.startswith(front)}
    for name, parameter in frozen.model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad) == name.startswith(front), name


def test_a_frozen_resnest_stays_bit_equal():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    frozen = FrozenStages(timm.create_model("resnest26d", num_classes=5), 2).train()
    same, names = trained(frozen, steps=2)
    front = {name for name in names if name.startswith(("conv1", "bn1", "layer1", "layer2"))}
    assert same == front and any(name.endswith(NORM) for name in front)


def test_the_features_of_frozen_stages_do_not_change():
    torch.manual_seed(0)
    frozen, images = FrozenStages(tiny_densenet(), 2).train(), torch.rand(2, 3, 32, 32)

    def features():
        kept = []
        handle = frozen.model.features.denseblock2.register_forward_hook(lambda module, inputs, output: kept.append(output))
        with torch.no_grad():
            frozen(images)
        handle.remove()
        return kept[0]

    before = features()
    trained(frozen)
    assert torch.equal(before, features())


def test_zero_freezes_nothing():
    torch.manual_seed(0)
    frozen = FrozenStages(SmallResNet()).train()
    assert all(module.training for module in frozen.modules())
    assert trained(frozen)[0] == set()


def test_frozen_as_soon_as_it_is_made():
    """Nothing moves even if nobody calls train(): models are made in train mode."""
    torch.manual_seed(0)
    same, names = trained(FrozenStages(SmallResNet(), 1))
    assert same == {name for name in names if name.startswith(("stem", "layer1"))}


def test_train_and_eval():
    frozen = FrozenStages(SmallResNet(), 2)
    model = frozen.model
    front = [module for part in (model.stem, model.layer1, model.layer2) for module in part.modules()]
    rest = [module for part in (model.layer3, model.layer4, model.head) for module in part.modules()]
    for _ in range(2):
        assert frozen.train() is frozen and frozen.training
        assert not any(module.training for module in front) and all(module.training for module in [*rest, model])
        assert frozen.eval() is frozen
        assert not any(module.training for module in frozen.modules())
    nn.Sequential(frozen).train()  # as a part of another
    assert all(module.training for module in rest) and not any(module.training for module in front)
    copied = copy.deepcopy(frozen).train().model
    assert copied.layer3.training and not copied.layer2.training and model.layer3.training


def test_evaluating_leaves_the_modes_as_they_were():
    frozen = FrozenStages(SmallResNet(), 2).train()
    modes = [module.training for module in frozen.modules()]
    with eval_mode(frozen):
        assert not any(module.training for module in frozen.modules())
    assert [module.training for module in frozen.modules()] == modes


class Odd(nn.Module):
    """A head written down first, and dropout by function."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.block1, self.block2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.head(F.dropout(self.block2(self.block1(x)).mean((2, 3)), 0.5, self.training))


def test_what_is_around_trained_parts_keeps_its_mode():
    frozen = FrozenStages(Odd(), 1)
    assert [name for name, p in frozen.model.named_parameters() if not p.requires_grad] == ["block1.weight", "block1.bias"]
    x = torch.rand(8, 3, 8, 8)
    frozen.train()
    assert not torch.equal(frozen(x), frozen(x))
    frozen.eval()
    assert torch.equal(frozen(x), frozen(x))


@pytest.mark.parametrize("count", [-1, 5])
def test_more_stages_than_there_are(count):
    with pytest.raises(
        ValueError, match=f"freeze {count} is out of range: the backbone has 4 stages, layer1, layer2, layer3, layer4"
    ):
        FrozenStages(SmallResNet(), count)


@pytest.mark.parametrize("make", [SmallResNet, tiny_vit, tiny_densenet])
def test_outputs_are_the_plain_models(make):
    torch.manual_seed(0)
    model = make()
    x = torch.rand(4, 3, 32, 32)
    for count in (0, 2):
        frozen = FrozenStages(copy.deepcopy(model), count)
        with torch.no_grad():
            assert torch.equal(frozen.eval()(x), model.eval()(x))
    plain, frozen = copy.deepcopy(model).train(), FrozenStages(copy.deepcopy(model)).train()
    torch.manual_seed(1)
    expected = plain(x)
    torch.manual_seed(1)
    assert torch.equal(frozen(x), expected)
