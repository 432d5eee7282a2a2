"""LibraGrad: gradients of a model that is made linear in its input, so that input times gradient adds up to the score.

A transformer's gradient counts both factors of a product, and a LayerNorm's denominator cancels what its input contributes.
Inside ``libra`` the forward pass stays as it is, and these are constants of the backward pass, written [ ]:

    attention       [softmax(Q K^T / sqrt(d))] V
    norms           (x - mean) / [sqrt(var + eps)]
    activations     x [f(x) / x], for GELU: x [Phi(x)], for SiLU: x [sigmoid(x)]
    gates           x [sigmoid(u)]
    products        a b of two features, as in SwiGLU: both factors count half

Then sum(x dy/dx) + sum over biases(b dy/db) = y (Mehri, Baghshah, Pilehvar 2025, arXiv 2411.16760).

    with libra(model):
        logits = model(inputs)
    (gradient,) = torch.autograd.grad(logits[:, 3].sum(), inputs)
"""

import inspect
import warnings
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
GATES = (torch.sigmoid, Tensor.sigmoid, F.hardsigmoid, torch.rsqrt, Tensor.rsqrt, torch.sqrt, Tensor.sqrt)
SLOPES = {F.gelu: 0.5, F.silu: 0.5, F.hardswish: 0.5, F.mish: 0.6, F.elu: 1.0, torch.tanh: 1.0, Tensor.tanh: 1.0}  # f'(0)
QUOTIENTS = (torch.div, Tensor.div, Tensor.__truediv__, torch.true_divide, Tensor.true_divide)
MATRIX_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, torch.multiply, Tensor.multiply, *MATRIX_PRODUCTS)
IN_PLACE = (F.silu, F.hardswish, F.mish, F.elu)  # functions with this option
UNREACHED = (torch.exp, Tensor.exp, torch.log, Tensor.log, F.softplus, torch.sin, Tensor.sin, torch.cos, Tensor.cos)


class SafeFunctionMode(TorchFunctionMode):
    """A function mode that leaves torch's stack of modes as it was, also after an exception inside torch's own handling."""

    _depth = 0  # of the stack outside the ``with``

    def __enter__(self):
        self._depth = torch._C._len_torch_function_stack()
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        while torch._C._len_torch_function_stack() > self._depth:
            torch._C._pop_torch_function_stack()


_get_signature = lru_cache(maxsize=100)(inspect.signature)


def bind_arguments(function: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Return the arguments of a call by name, defaults included."""
    call = _get_signature(function).bind(*args, **kwargs)
    call.apply_defaults()
    return call.arguments


class _Substitute(torch.autograd.Function):
    """Return a value whose gradient is that of a surrogate."""

    @staticmethod
    def forward(ctx, surrogate: Tensor, value: list[Tensor]) -> Tensor:
        return value[0].detach()  # a tensor in a list may be changed in place later, an argument may not

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class libra(SafeFunctionMode):
    """Make the gradient of everything that runs inside ``with`` the gradient of LibraGrad. Applies to the current thread.

    The outputs stay the same bit for bit; those of ``nn.MultiheadAttention`` to 1e-6 of their size. Functions and modules are
    reached: softmax attention (fused or written out), layer, group and RMS norms, GELU, SiLU, Hardswish, Mish, ELU, tanh,
    sigmoid gates, and products of two features. A model of other parts, such as exp or softplus, is not linear: leaving the
    ``with`` warns and names them. Gradients may be taken after it.

    Args:
        model: the module that runs inside. TorchScript modules and custom kernels cannot be reached.

    Raises TypeError for a TorchScript module.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        scripted = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
        if scripted:
            raise TypeError(
                f"model must be eager: libra cannot reach inside TorchScript, got {scripted[0] or type(model).__name__!r}"
            )
        self.unreached: set[str] = set()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        if self.unreached and exception[:1] in ((), (None,)):
            names = ", ".join(sorted(self.unreached))
            warnings.warn(f"libra cannot reach {names}: input times gradient will not add up to the score", stacklevel=2)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        if function is F.scaled_dot_product_attention:
            call = bind_arguments(_attend, args, kwargs)
            return function(**{**call, "query": call["query"].detach(), "key": call["key"].detach()})
        if function is F.multi_head_attention_forward:
            return function(**_fix_attention(bind_arguments(function, args, kwargs)))
        if function in (F.layer_norm, F.group_norm, getattr(F, "rms_norm", None)):
            return _linearize_norm(function, bind_arguments(function, args, kwargs))
        if not args or not isinstance(args[0], Tensor):
            return function(*args, **kwargs)
        first, *others = args
        if function in SLOPES and first.requires_grad:
            return _linearize_activation(function, first, others, kwargs)
        if function in SOFTMAX and first.ndim > 2:
            return function(first.detach(), *others, **kwargs)
        if function in GATES and first.ndim > 1 and first.requires_grad and not first.is_leaf:
            return function(first.detach(), *others, **kwargs)
        if function in QUOTIENTS and others and isinstance(others[0], Tensor) and others[0].requires_grad:
            return function(first, others[0] if others[0].is_leaf else others[0].detach(), *others[1:], **kwargs)
        output = function(*args, **kwargs)
        is_attention = function in MATRIX_PRODUCTS and first.shape[-1] == first.shape[-2]  # in the graph if it is recorded
        if function in PRODUCTS and not is_attention and _are_features(args):
            return _Substitute.apply(output / 2, [output])
        if function in UNREACHED and first.ndim > 2 and first.requires_grad and not first.is_leaf:
            self.unreached.add(function.__name__)
        return output


def _attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Name the arguments of ``F.scaled_dot_product_attention``, which has no signature."""


def _fix_attention(call: dict[str, Any]) -> dict[str, Any]:
    """Cut queries and keys off the graph in the arguments of nn.MultiheadAttention's function."""
    call["query"], call["key"] = call["query"].detach(), call["key"].detach()
    if (bias := call["in_proj_bias"]) is not None:
        width = len(bias) // 3
        call["in_proj_bias"] = torch.cat([bias[: 2 * width].detach(), bias[2 * width :]])
    if call["bias_k"] is not None:
        call["bias_k"] = call["bias_k"].detach()
    return call


def _linearize_norm(function: Any, call: dict[str, Any]) -> Tensor:
    """Run a layer, group or RMS norm with a constant denominator."""
    value, x = function(**call), call["input"]
    if not value.requires_grad:
        return value
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    weight, bias = call["weight"], call.get("bias")
    if function is F.group_norm:
        grouped = x.unflatten(1, (call["num_groups"], -1))
        axes = tuple(range(2, grouped.ndim))
        shape = [1, -1] + [1] * (x.ndim - 2)
        weight, bias = (None if each is None else each.view(shape) for each in (weight, bias))
    else:
        grouped, axes = x, tuple(range(-len(call["normalized_shape"]), 0))
    eps = torch.finfo(x.dtype).eps if call["eps"] is None else call["eps"]
    centred = grouped if "normalized_shape" in call and "bias" not in call else grouped - grouped.mean(axes, keepdim=True)
    surrogate = centred * (centred.detach().square().mean(axes, keepdim=True) + eps).rsqrt()
    surrogate = surrogate.reshape(x.shape)
    surrogate = surrogate if weight is None else surrogate * weight
    surrogate = surrogate if bias is None else surrogate + bias
    return _Substitute.apply(surrogate.to(value.dtype), [value])


def _linearize_activation(function: Any, x: Tensor, others: list, kwargs: dict) -> Tensor:
    """Compute f(x) as x times the constant f(x) / x."""
    with torch.no_grad():
        value = function(x.detach().clone(), *others, **kwargs)
        gate = torch.where(x == 0, SLOPES[function], value / x)
    output = _Substitute.apply(x * gate, [value])
    in_place = function in IN_PLACE and bind_arguments(function, (x, *others), kwargs)["inplace"]
    return x.copy_(output) if in_place else output


def _are_features(args: tuple) -> bool:
    """Return whether both factors depend on the images: parts of the graph, with the same first axis."""
    if len(args) < 2 or not all(isinstance(each, Tensor) and each.requires_grad and not each.is_leaf for each in args[:2]):
        return False
    first, second = args[:2]
    return first.ndim > 1 and first.ndim == second.ndim and len(first) == len(second)
