"""Attention maps of vision transformers: which patches did the deciding token draw on?

With A (B, heads, T, T) the attention weights of a block, softmax over keys, and s_c the score of a class:

    rollout     J <- (I + mean_h A) / 2 @ J                     Abnar, Zuidema 2020, arXiv 2005.00928; knows no class
    relevance   R <- R + mean_h relu(ds_c/dA * A) @ R           Chefer, Gur, Wolf 2021, arXiv 2103.15679, Eqs. 5-6
    LeGrad      mean over blocks, heads, queries of relu(ds_c^l/dA^l)      Bousselham et al. 2024, arXiv 2404.03214

    maps = AttentionRelevance(model, preprocess=preprocess)(images, target=3)           # (N, H, W) in [0, 1]

The weights are computed where a module does not return them: ``AttentionWeights`` sees fused attention too.
"""

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from scanlib.explainers.base import Explainer, at_least_float32
from scanlib.hooks import FeatureTap
from scanlib.layers import USUAL_PREFIX_TOKENS, Layout, get_logits, resolve_layer
from scanlib.targets import Target, compute_scores

# --- the formulas ---


def attention_rollout(weights: Sequence[Tensor]) -> Tensor:
    """Attention weights (B, heads, T, T) of each block, first to last -> (B, T, T): what each token drew from each patch."""
    identity = torch.eye(weights[0].shape[-1], dtype=weights[0].dtype, device=weights[0].device)
    joint = identity
    for block in weights:
        joint = (identity + block.mean(1)) / 2 @ joint  # the half: the residual connection; rows of both sum to one
    return joint


def attention_relevance(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Weights, and the score's gradient there, (B, heads, T, T) each -> relevance of each token for each, (B, T, T)."""
    relevance = torch.eye(weights[0].shape[-1], dtype=weights[0].dtype, device=weights[0].device)
    for block, gradient in zip(weights, gradients, strict=True):
        relevance = relevance + (gradient * block).relu().mean(1) @ relevance
    return relevance


def legrad(gradients: Sequence[Tensor]) -> Tensor:
    """Of each block's own score, the gradient at its attention weights, (B, heads, T, T) each -> (B, T)."""
    return torch.stack([gradient.relu().mean((1, 2)) for gradient in gradients]).mean(0)


# --- recording ---

_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


class NoAttentionError(ValueError):
    """The model does not attend over the whole picture, or its attention can not be read."""


class AttentionWeights(TorchFunctionMode):
    """Inside ``with``, note the weights of every attention that runs, (B, heads, T, T), part of the autograd graph.

    Catches ``F.scaled_dot_product_attention`` (timm, Hugging Face), ``nn.MultiheadAttention`` (torchvision), and attention
    written out with a softmax. ``weights`` lists them in order; ``missed`` counts those that could not be taken down (grouped
    queries, hidden keys, dropout while training).
    """

    def __init__(self):
        super().__init__()
        self.weights: list[Tensor] = []
        self.missed = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            call = _call(_scaled_dot_product_attention, args, kwargs)
            if not call["enable_gqa"] and call["dropout_p"] == 0:
                return self._attend(**call)
            self.missed += 1
        elif function is F.multi_head_attention_forward:
            call = _call(function, args, kwargs)
            if _is_plain(call):
                return self._multi_head(**call)
            self.missed += 1
        output = function(*args, **kwargs)
        if function in _SOFTMAX and output.ndim > 2 and output.shape[-1] == output.shape[-2]:
            return self._note(output)
        return output

    def checked(self, inputs: Tensor, model: nn.Module) -> list[Tensor]:
        """``weights``, if they are of a model that attends over the whole of each picture (N, ...) in every block.

        Raises NoAttention if not.
        """
        shapes = {tuple(block.shape) for block in self.weights}
        if self.missed or len(shapes) != 1 or self.weights[0].ndim != 4 or len(self.weights[0]) != len(inputs):
            seen = f"attention of {', '.join(map(str, sorted(shapes)))}" if shapes else "no self-attention"
            seen += f" and {self.missed} that could not be taken down" if self.missed else ""
            raise NoAttentionError(
                f"{type(model).__name__} shows {seen} for {len(inputs)} images; these maps need blocks that attend over the "
                "whole picture, (images, heads, tokens, tokens); take SCAN or a CAM for this model"
            )
        return self.weights

    def _note(self, weights: Tensor) -> Tensor:
        self.weights.append(weights)
        if not torch.is_grad_enabled() or weights.requires_grad:
            return weights
        weights.requires_grad_()  # a frozen model: the graph begins at its first attention
        return weights.clone()  # the model may go on in place

    def _attend(self, query, key, value, attn_mask=None, is_causal=False, scale=None, **_):
        """softmax(Q K^T / sqrt(d)) V with the weights noted; (B, heads, T, d) each."""
        logits = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
        return self._note(logits.softmax(-1)) @ value

    def _multi_head(self, query, num_heads, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, **options):
        """nn.MultiheadAttention on one sequence (T, B, C): project, attend, project."""
        projected = F.linear(query, in_proj_weight, in_proj_bias).unflatten(-1, (3, num_heads, -1))
        q, k, v = projected.permute(2, 1, 3, 0, 4)  # (B, heads, T, d) each
        mixed = self._attend(q, k, v, options["attn_mask"])
        output = F.linear(mixed.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
        if not options["need_weights"]:
            return output, None
        return output, self.weights[-1].mean(1) if options["average_attn_weights"] else self.weights[-1]


def _scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """The signature of torch's, which is built in and does not tell it."""


def _call(function, args, kwargs) -> dict:
    call = inspect.signature(function).bind(*args, **kwargs)
    call.apply_defaults()
    return call.arguments


def _is_plain(call: dict) -> bool:
    """Self-attention without anything that ``_multi_head`` leaves out."""
    mask = call["attn_mask"]
    return (
        call["query"] is call["key"] is call["value"]
        and call["query"].ndim == 3
        and call["in_proj_weight"] is not None
        and call["bias_k"] is None
        and call["key_padding_mask"] is None
        and not call["add_zero_attn"]
        and not (call["training"] and call["dropout_p"])
        and (mask is None or (mask.ndim == 2 and mask.is_floating_point()))
    )


# --- the explainers ---


class _AttentionExplainer(Explainer):
    """Explainers that read a recording of every block's attention; ``Explainer`` tells the call.

    Args:
        model: a vision transformer whose blocks attend over all patches; put in eval mode for the call, and back.
        target_layer: the blocks to read, as a name, module, index or a list of them; None reads all.
        preprocess: what turns images in [0, 255] into the model's input; None passes them on as they are.
    """

    def __init__(self, model: nn.Module, target_layer=None, preprocess: Callable[[Tensor], Tensor] | None = None):
        super().__init__(model, target_layer, preprocess)
        layers = target_layer if isinstance(target_layer, (list, tuple)) else [target_layer]
        if not layers:
            raise ValueError(f"target_layer {target_layer!r} is empty; give a block, a list of them, or None for all")
        self.blocks = None if target_layer is None else [resolve_layer(model, layer)[1] for layer in layers]

    def _maps(self, inputs: Tensor, target: Target) -> Tensor:
        """Raises NoAttention for models whose attention is not over the whole picture."""
        with torch.enable_grad():
            return tokens_to_grid(self._tokens(inputs, target), inputs, self.model)

    def _tokens(self, inputs: Tensor, target: Target) -> Tensor:
        """Inputs -> what each token weighs, (N, T)."""
        raise NotImplementedError

    def _recorded(self, inputs: Tensor) -> "_Recording":
        """Run the model and take its attention down."""
        recorder, spans, outputs, handles = AttentionWeights(), [], [], []

        def start(*_):
            spans.append([len(recorder.weights)])

        def stop(module, arguments, output):
            spans[-1].append(len(recorder.weights))
            outputs.append(output[0] if isinstance(output, tuple) else output)

        try:
            for block in self.blocks or ():
                handles += [block.register_forward_pre_hook(start), block.register_forward_hook(stop)]
            with recorder:
                logits = get_logits(self.model(inputs))
        finally:
            for handle in handles:
                handle.remove()
        weights = recorder.checked(inputs, self.model)
        counts = [last - first for first, last in spans] + [0] * (len(self.blocks or ()) - len(spans))  # 0: it did not run
        if any(count != 1 for count in counts):
            raise ValueError(f"blocks in target_layer run {counts} attentions; give blocks that run, with one attention each")
        return _Recording(weights, [weights[first] for first, _ in spans] or weights, logits, outputs)


@dataclass(frozen=True)
class _Recording:
    """Attention weights (N, heads, T, T) of all blocks and of the chosen ones, the logits, the chosen blocks' outputs."""

    weights: list[Tensor]
    chosen: list[Tensor]
    logits: Tensor
    outputs: list[Tensor]

    def gradients(self, target: Target) -> list[Tensor]:
        """The score's gradient at each of all blocks' weights."""
        return list(map(_detached, torch.autograd.grad(compute_scores(self.logits, target).sum(), self.weights)))


def _detached(x: Tensor) -> Tensor:
    return at_least_float32(x.detach())


def tokens_to_grid(tokens: Tensor, inputs: Tensor, model: nn.Module) -> Tensor:
    """What each token weighs, (N, T) -> (N, h, w), for inputs (N, 3, H, W). Raises NoAttention if they are no grid of patches."""
    layout = Layout.infer((*tokens.shape, 1), tuple(inputs.shape[-2:]))
    if layout.prefix > USUAL_PREFIX_TOKENS:
        raise NoAttentionError(
            f"{type(model).__name__} attends over {tokens.shape[1]} things, no grid of patches; take SCAN or a CAM"
        )
    return tokens[:, layout.prefix :].unflatten(1, layout.grid)


def average_head_rows(pairs: Tensor, last_gradient: Tensor) -> Tensor:
    """Rows of (N, T, T) that the head reads, averaged: (N, T).

    Behind the model's last attention tokens no longer mix, so exactly the tokens that the head reads (the class token, or the
    patches that it averages) have a gradient at their queries there.
    """
    reads = (last_gradient != 0).any(3).any(1).to(pairs.dtype)  # (N, T)
    count = reads.sum(1, keepdim=True)
    if not count.all():
        empty = int((count == 0).sum())
        warnings.warn(f"the score of {empty} images has no gradient at the last attention, so their maps are empty", stacklevel=5)
    return (reads[:, None] @ pairs)[:, 0] / count.clamp_min(1)


class AttentionRollout(_AttentionExplainer):
    """Attention rollout (Abnar, Zuidema 2020): attention and residuals multiplied through. The target makes no difference."""

    def _tokens(self, inputs: Tensor, target: Target) -> Tensor:
        seen = self._recorded(inputs)
        return average_head_rows(attention_rollout(list(map(_detached, seen.chosen))), seen.gradients(target)[-1])


class AttentionRelevance(_AttentionExplainer):
    """Generic attention explainability (Chefer, Gur, Wolf 2021): gradient times attention, positive part, accumulated."""

    def _tokens(self, inputs: Tensor, target: Target) -> Tensor:
        seen = self._recorded(inputs)
        gradients = seen.gradients(target)
        at = {id(block): gradient for block, gradient in zip(seen.weights, gradients, strict=True)}
        relevance = attention_relevance(list(map(_detached, seen.chosen)), [at[id(block)] for block in seen.chosen])
        return average_head_rows(relevance, gradients[-1])


class LeGrad(_AttentionExplainer):
    """LeGrad (Bousselham et al. 2024): how each block's own score answers to its attention.

    A block's score s^l is what the model's head makes of the mean of its tokens, so target_layer takes whole blocks. target None
    takes the class that the model predicts. head: tokens (N, T, C) -> logits (N, K); None finds torchvision's and timm's.
    """

    def __init__(self, model, target_layer=None, preprocess=None, *, head: Callable[[Tensor], Tensor] | None = None):
        if target_layer is None or head is None:
            blocks, own_head = _blocks_and_head(model)
            target_layer, head = blocks if target_layer is None else target_layer, head or own_head
        super().__init__(model, target_layer, preprocess)
        self.head = head

    def _tokens(self, inputs: Tensor, target: Target) -> Tensor:
        seen = self._recorded(inputs)
        target = seen.logits.argmax(1) if target is None else target
        gradients = []
        for block, tokens in zip(seen.chosen, seen.outputs, strict=True):
            pooled = tokens.mean(1, keepdim=True).expand_as(tokens)  # whichever token the head reads, it reads the mean
            gradients += torch.autograd.grad(compute_scores(self.head(pooled), target).sum(), block, retain_graph=True)
        return legrad(list(map(_detached, gradients)))


def _blocks_and_head(model: nn.Module) -> tuple[list[nn.Module], Callable[[Tensor], Tensor]]:
    if isinstance(model, torchvision.models.VisionTransformer):
        return list(model.encoder.layers), lambda tokens: model.heads(model.encoder.ln(tokens)[:, 0])
    if all(hasattr(model, name) for name in ("blocks", "norm", "forward_head")):  # timm
        return list(model.blocks), lambda tokens: get_logits(model.forward_head(model.norm(tokens)))
    raise ValueError(
        f"the blocks and the head of {type(model).__name__} are not known; "
        "pass target_layer=[its blocks] and head=a function from tokens (N, T, C) to logits (N, K)"
    )


class RelevanceTap(FeatureTap):
    """``FeatureTap``, and what the deciding token draws from each patch (Chefer, Gur, Wolf 2021, arXiv 2103.15679, Eqs. 5-6).

    Raises NoAttention, a ValueError, for a model whose attention is not over the whole picture, or can not be read.
    """

    def __init__(self, model, layer):
        super().__init__(model, layer)
        self.graph, self._weights, self._inputs = "whole", [], None

    def __call__(self, inputs: Tensor) -> Tensor:
        self._weights = []
        with AttentionWeights() as recorder:
            logits = super().__call__(inputs)
        self._weights, self._inputs = recorder.checked(inputs, self.model), inputs
        return logits

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self._weights, self._inputs = [], None

    @property
    def features(self) -> Tensor:
        return super().features.detach()

    def gradient_and_relevance(self, target: Target = None) -> tuple[Tensor, Tensor]:
        """``gradient``, and relevance (B, h, w), not negative, float32 or better. target: as for ``FeatureTaps.gradients``."""
        gradient, *at_weights = self._gradients([*self.captured, *self._weights], target)
        if gradient is None:
            raise self._unread(self.name)
        if not at_weights or any(each is None for each in at_weights):
            raise NoAttentionError(
                f"the score of {type(self.model).__name__} has no gradient at all of its attention; take SCAN or a CAM"
            )
        at_weights = [at_least_float32(each) for each in at_weights]
        pairs = attention_relevance([at_least_float32(block.detach()) for block in self._weights], at_weights)
        return gradient, tokens_to_grid(average_head_rows(pairs, at_weights[-1]), self._inputs, self.model)
