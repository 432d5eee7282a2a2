import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision import models

from scanlib import SmallResNet
from scanlib.models.freezing import FrozenStages, list_stages
from scanlib.models.small import Normalize

NORM = ("running_mean", "running_var", "num_batches_tracked")


def tiny_vit():
    return torchvision.models.VisionTransformer(
        32, 8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, dropout=0.1, num_classes=5
    )


def tiny_densenet():
    return torchvision.models.DenseNet(4, (2, 2, 2), 8, num_classes=5)


def train_on_noise(frozen, steps=3):
    """Train all parameters for a few steps. Return the names of the state that did not change, and all names."""
    before = copy.deepcopy(frozen.model.state_dict())
    optimizer = torch.optim.AdamW(frozen.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(frozen(torch.rand(4, 3, 32, 32)), torch.arange(4)).backward()
        optimizer.step()
    after = frozen.model.state_dict()
    return {name for name in before if torch.equal(before[name], after[name])}, set(before)


# --- list_stages ---


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
def test_list_stages_of_torchvision_models(name, expected):
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        model = models.get_model(name, weights=None, **options)
    assert list_stages(model) == expected


def test_list_stages_of_small_models():
    assert list_stages(SmallResNet()) == ["layer1", "layer2", "layer3", "layer4"]
    assert list_stages(tiny_vit()) == [f"encoder.layers.encoder_layer_{i}" for i in range(3)]
    assert list_stages(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))) == ["0", "2"]
    assert list_stages(nn.Linear(3, 2)) == []


def test_list_stages_of_a_timm_model():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("resnest26d")
    assert list_stages(model) == ["layer1", "layer2", "layer3", "layer4"]


# --- FrozenStages ---


@pytest.mark.parametrize(
    ("build", "count", "front"),
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
def test_only_the_stages_behind_the_frozen_ones_are_trained(build, count, front):
    torch.manual_seed(0)
    frozen = FrozenStages(build(), count).train()
    same, names = train_on_noise(frozen)
    assert same == {name for name in names if name.startswith(front)}
    for name, parameter in frozen.model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad) == name.startswith(front), name


def test_frozen_stages_of_a_timm_model_are_unchanged():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    frozen = FrozenStages(timm.create_model("resnest26d", num_classes=5), 2).train()
    same, names = train_on_noise(frozen, steps=2)
    front = {name for name in names if name.startswith(("conv1", "bn1", "layer1", "layer2"))}
    assert same == front and any(name.endswith(NORM) for name in front)


def test_features_of_frozen_stages_are_unchanged():
    torch.manual_seed(0)
    frozen, images = FrozenStages(tiny_densenet(), 2).train(), torch.rand(2, 3, 32, 32)

    def compute_features():
        outputs = []
        handle = frozen.model.features.denseblock2.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        with torch.no_grad():
            frozen(images)
        handle.remove()
        return outputs[0]

    before = compute_features()
    train_on_noise(frozen)
    assert torch.equal(before, compute_features())


def test_count_zero_freezes_nothing():
    torch.manual_seed(0)
    frozen = FrozenStages(SmallResNet()).train()
    assert all(module.training for module in frozen.modules())
    assert train_on_noise(frozen)[0] == set()


def test_stages_are_frozen_without_a_call_of_train():
    """A new module is in train mode."""
    torch.manual_seed(0)
    same, names = train_on_noise(FrozenStages(SmallResNet(), 1))
    assert same == {name for name in names if name.startswith(("stem", "layer1"))}


def test_train_and_eval_set_the_mode_of_the_other_modules():
    frozen = FrozenStages(SmallResNet(), 2)
    model = frozen.model
    front = [module for part in (model.stem, model.layer1, model.layer2) for module in part.modules()]
    rest = [module for part in (model.layer3, model.layer4, model.head) for module in part.modules()]
    for _ in range(2):
        assert frozen.train() is frozen and frozen.training
        assert not any(module.training for module in front) and all(module.training for module in [*rest, model])
        assert frozen.eval() is frozen
        assert not any(module.training for module in frozen.modules())
    nn.Sequential(frozen).train()  # as a child of another module
    assert all(module.training for module in rest) and not any(module.training for module in front)
    copied = copy.deepcopy(frozen).train().model
    assert copied.layer3.training and not copied.layer2.training and model.layer3.training


class HeadFirstNet(nn.Module):
    """Its head is the first child, and its forward applies dropout."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.block1, self.block2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.head(F.dropout(self.block2(self.block1(x)).mean((2, 3)), 0.5, self.training))


def test_modules_that_contain_trained_ones_keep_their_mode():
    frozen = FrozenStages(HeadFirstNet(), 1)
    assert [name for name, p in frozen.model.named_parameters() if not p.requires_grad] == ["block1.weight", "block1.bias"]
    x = torch.rand(8, 3, 8, 8)
    frozen.train()
    assert not torch.equal(frozen(x), frozen(x))
    frozen.eval()
    assert torch.equal(frozen(x), frozen(x))


@pytest.mark.parametrize("count", [-1, 5])
def test_frozen_stages_raises_for_a_count_out_of_range(count):
    message = rf"number of frozen stages must be in 0\.\.4, got {count}; stages: layer1, layer2, layer3, layer4"
    with pytest.raises(ValueError, match=message):
        FrozenStages(SmallResNet(), count)


@pytest.mark.parametrize("build", [SmallResNet, tiny_vit, tiny_densenet])
def test_outputs_equal_those_of_the_model(build):
    torch.manual_seed(0)
    model = build()
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


def test_preprocess_is_an_attribute_that_forward_does_not_apply():
    frozen, images = FrozenStages(SmallResNet(), 1, Normalize()).eval(), torch.rand(2, 3, 64, 64) * 255
    assert torch.equal(frozen(images), frozen.model(images)) and frozen.preprocess(images).max() <= 2
    assert torch.equal(FrozenStages(SmallResNet()).preprocess(images), images)
