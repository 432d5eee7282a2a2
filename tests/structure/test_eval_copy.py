import copy
from collections import OrderedDict
from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations

from scanlib import GradCAM
from scanlib.structure.eval_copy import make_eval_copy, rebind_function


class References(nn.Module):
    """Refers to its modules in every way that Python has."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Dropout(0.5)
        self.listed, self.keyed = [self.a, [self.b]], OrderedDict(drop=(self.c,))
        self.method, self.bound = self.b.forward, partial(self.c.forward)
        self.closure = lambda x: self.b(x)

    def forward(self, x):
        x = self.keyed["drop"][0](self.listed[0](x))
        return self.closure(self.method(self.listed[1][0](self.bound(x)))).mean((2, 3))


def build_wrapped_forward():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5))
    model.forward = partial(lambda inner, x: inner[1](inner[0](x)).mean((2, 3)), model)
    return model


def build_parametrized():
    conv = parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    return nn.Sequential(conv, parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4))


def build_compiled_inside():
    return nn.Sequential(torch.compile(nn.Conv2d(3, 4, 3), backend="eager"), nn.Dropout(0.5))


BUILDERS = [References, build_wrapped_forward, build_parametrized, build_compiled_inside]
BUILDERS += [lambda: torch.fx.symbolic_trace(torchvision.models.resnet18(num_classes=3))]
BUILDERS += [lambda: nn.DataParallel(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5)))]


@pytest.mark.parametrize("build", BUILDERS)
def test_copy_computes_what_the_model_computes_in_eval_mode(build):
    torch.manual_seed(0)
    model, x = build().train(), torch.rand(2, 3, 16, 16)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    copied = make_eval_copy(model)
    expected = copy.deepcopy(model).eval()(x)
    torch.testing.assert_close(copied(x), expected)
    assert all(module.training for module in model.modules() if module.training) and model.training
    assert [name for name, _ in copied.named_modules()] == [name for name, _ in model.named_modules()]
    assert all(a is b for a, b in zip(copied.parameters(), model.parameters(), strict=True))
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_hooks_on_the_copy_stay_there_and_those_of_the_model_run():
    model, seen, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), [], torch.rand(1, 3, 8, 8)
    model[0].register_forward_hook(lambda *_: seen.append("own"))
    copied = make_eval_copy(model)
    copied[0].register_forward_hook(lambda *_: seen.append("copy"))
    copied[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    model(x)
    assert seen == ["own"]
    copied(x)
    assert seen == ["own", "before", "own", "copy"]


def test_attributes_that_forward_sets_stay_on_the_copy():
    class Remembers(nn.Module):
        def forward(self, x):
            self.last = x
            return x

    model = Remembers()
    make_eval_copy(model)(torch.rand(1))
    assert not hasattr(model, "last")


def test_weights_of_inference_mode_become_normal_ones():
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    copied = make_eval_copy(model)
    assert not any(tensor.is_inference() for tensor in (*copied.parameters(), *copied.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), model.parameters(), strict=True))
    assert next(iter(model.parameters())).is_inference()


def test_checkpointing_is_off_in_the_copy():
    model = nn.Sequential(nn.Linear(2, 2))
    model.grad_checkpointing = model[0].gradient_checkpointing = True
    copied = make_eval_copy(model)
    assert not copied.grad_checkpointing and not copied[0].gradient_checkpointing and model.grad_checkpointing


def test_torchscript_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for scripted in (torch.jit.script(net), torch.jit.trace(net, torch.rand(1, 3, 8, 8))):
        with pytest.raises(ValueError, match="the model is TorchScript, .*; pass the Python model"):
            GradCAM(scripted, "0")(torch.rand(1, 3, 8, 8))


def test_functions_are_bound_to_the_copy():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    copied = make_eval_copy(model)
    x = torch.rand(50, 2)
    head = rebind_function(lambda x: model[1](x), model, copied)
    assert torch.equal(head(x), x) and rebind_function(torch.relu, model, copied) is torch.relu
