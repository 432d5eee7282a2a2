"""Copy the modules of a model without copying its weights.

    copy = make_eval_copy(model)                    # other module objects, the same parameters and buffers, in eval mode
    copy.get_submodule("layer4").register_forward_hook(hook)

Explainers run such copies. Their hooks and modes never reach the caller's model, which other threads may use meanwhile.
"""

from collections import OrderedDict
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

# class of a wrapper -> name of the module inside; OptimizedModule is what torch.compile returns
WRAPPED = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
CHECKPOINTING_FLAGS = ("grad_checkpointing", "gradient_checkpointing")  # timm, Hugging Face
_PLAIN = {bool, int, float, str, type(None), Tensor, nn.Parameter}
_OF_EVERY_MODULE = set(vars(nn.Module()))
_MAX_ENTRIES = 1000  # of a list or dictionary that is searched for modules


class Passthrough(nn.Module):
    """Stands for a wrapper: calls the wrapped module, without replicas or compiled code."""

    def __init__(self, child: str):
        super().__init__()
        self.child = child

    def forward(self, *args, **kwargs):
        return getattr(self, self.child)(*args, **kwargs)


def make_eval_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model in eval mode that shares its parameters and buffers. The model is not changed.

    The names of all layers stay. DataParallel and torch.compile are left out of the run, and so is gradient checkpointing.
    Weights made in inference mode are copied, because autograd refuses them. Raises ValueError for TorchScript.
    """
    copies: dict[nn.Module, nn.Module] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if module in copies:
            continue
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError("the model is TorchScript, whose layers cannot be read; pass the Python model that it was made from")
        wrapped = WRAPPED.get(type(module).__name__)
        copies[module] = object.__new__(type(module)) if wrapped is None else Passthrough(wrapped)
        waiting += [child for child in module._modules.values() if child is not None]
    for module, copy in copies.items():
        if not isinstance(copy, Passthrough):
            _copy_attributes(module, copy, copies)
        else:
            copy._modules[copy.child] = copies[module.get_submodule(copy.child)]
        vars(copy)["training"] = False
    return copies[model]


def rebind_function(function: Any, model: nn.Module, copy: nn.Module) -> Any:
    """Return the function with the modules of the copy in place of those of the model that it refers to."""
    return _replace_modules(function, dict(zip(model.modules(), copy.modules(), strict=True)))


def _copy_attributes(module: nn.Module, copy: nn.Module, copies: dict[nn.Module, nn.Module]) -> None:
    attributes = vars(copy)
    attributes.update(vars(module))
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        attributes[name] = OrderedDict((key, _replace_modules(hook, copies)) for key, hook in attributes[name].items())
    attributes["_modules"] = {key: child if child is None else copies[child] for key, child in module._modules.items()}
    attributes["_compiled_call_impl"] = None
    for name in ("_parameters", "_buffers"):
        if any(tensor is not None and tensor.is_inference() for tensor in attributes[name].values()):
            attributes[name] = {key: _leave_inference_mode(tensor) for key, tensor in attributes[name].items()}
    for name in attributes.keys() - _OF_EVERY_MODULE:
        value = attributes[name]
        if name in CHECKPOINTING_FLAGS:
            attributes[name] = False
        elif type(value) not in _PLAIN:
            attributes[name] = _replace_modules(value, copies)


def _leave_inference_mode(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    with torch.inference_mode(False):
        copy = tensor.detach().clone()
        return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


def _replace_modules(value: Any, copies: dict[nn.Module, nn.Module]) -> Any:
    """Replace modules by their copies in lists, dictionaries, methods, partial functions and closures."""
    if isinstance(value, nn.Module):
        return copies.get(value, value)
    if isinstance(value, MethodType):
        owner = _replace_modules(value.__self__, copies)
        return value if owner is value.__self__ else MethodType(value.__func__, owner)
    if isinstance(value, partial):
        parts = _replace_modules([value.func, value.args, value.keywords], copies)
        return partial(parts[0], *parts[1], **parts[2])
    if isinstance(value, FunctionType):
        value = getattr(value, "_torchdynamo_orig_callable", value)  # a function compiled by torch
        return _replace_in_closure(value, copies) if isinstance(value, FunctionType) else _replace_modules(value, copies)
    if type(value) in (list, tuple) and len(value) <= _MAX_ENTRIES and not all(type(entry) in _PLAIN for entry in value):
        entries = [_replace_modules(entry, copies) for entry in value]
        return value if all(new is old for new, old in zip(entries, value, strict=True)) else type(value)(entries)
    if type(value) in (dict, OrderedDict) and len(value) <= _MAX_ENTRIES:
        changed = type(value)((key, _replace_modules(entry, copies)) for key, entry in value.items())
        return value if all(changed[key] is value[key] for key in value) else changed
    return value


def _replace_in_closure(function: FunctionType, copies: dict[nn.Module, nn.Module]) -> FunctionType:
    """Return the function with the copies in place of the modules that it refers to from outside."""
    cells = function.__closure__ or ()
    contents = [cell.cell_contents for cell in cells if _is_filled(cell)]
    if not any(isinstance(content, nn.Module) and content in copies for content in contents):
        return function
    new_cells = tuple(CellType(_replace_modules(cell.cell_contents, copies)) if _is_filled(cell) else cell for cell in cells)
    copy = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, new_cells)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
