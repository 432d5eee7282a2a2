"""Attention maps of vision transformers: which patches did the deciding token use?

With A (B, heads, T, T) the attention weights of a block, softmax over keys, and y_c the score of a class:

    rollout     J <- (I + mean_h A) / 2 @ J                     Abnar, Zuidema 2020, arXiv 2005.00928; the same for all classes
    relevance   R <- R + mean_h relu(dy_c/dA * A) @ R           Chefer, Gur, Wolf 2021, arXiv 2103.15679, Eqs. 5-6
    LeGrad      mean over blocks, heads, queries of relu(dy_c^l/dA^l)      Bousselham et al. 2024, arXiv 2404.03214

    maps = AttentionRelevance(model, preprocess=preprocess)(images, target=3)           # (N, H, W) in [0, 1]

``AttentionWeights`` computes the weights where a module does not return them, as in fused attention.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from scanlib.explainers.base import Explainer, at_least_float32, full_precision
from scanlib.hooks import FeatureTap, FeatureTaps, check_finite, differentiate
from scanlib.layers import Layout, get_logits, make_eval_copy, resolve_layer
from scanlib.structure.eval_copy import WRAPPED, Passthrough, rebind_function
from scanlib.structure.layout import USUAL_PREFIX_TOKENS
from scanlib.structure.libra import SOFTMAX, SafeFunctionMode, bind_arguments
from scanlib.structure.outputs import run_copy
from scanlib.targets import Target, compute_scores
from scanlib.training.interrupts import delay_interrupts


def attention_rollout(weights: Sequence[Tensor]) -> Tensor:
    """Multiply the attention weights (B, heads, T, T) of the blocks, first to last: (B, T, T), from patches to tokens."""
    identity = torch.eye(weights[0].shape[-1], dtype=weights[0].dtype, device=weights[0].device)
    joint = identity
    for block in weights:
        joint = (identity + block.mean(1)) / 2 @ joint  # identity: the residual connection; the rows sum to 1
    return joint


def attention_relevance(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Accumulate attention weights times the score's gradient there, (B, heads, T, T) each: (B, T, T) between tokens."""
    relevance = torch.eye(weights[0].shape[-1], dtype=weights[0].dtype, device=weights[0].device)
    for block, gradient in zip(weights, gradients, strict=True):
        relevance = relevance + (gradient * block).relu().mean(1) @ relevance
    return relevance


def legrad(gradients: Sequence[Tensor]) -> Tensor:
    """Average the positive gradients (B, heads, T, T) of each block's own score at its attention weights: (B, T)."""
    return torch.stack([gradient.relu().mean((1, 2)) for gradient in gradients]).mean(0)


class NoAttentionError(ValueError):
    """Raised for a model that does not attend over the whole image, or whose attention cannot be read."""


class AttentionWeights(SafeFunctionMode):
    """Inside ``with``, record the weights (B, heads, T, T) of every attention that runs, part of the autograd graph.

    Reads ``F.scaled_dot_product_attention`` (timm, Hugging Face), ``nn.MultiheadAttention`` (torchvision), and attention written
    with a softmax over the last axis. ``weights`` lists them in order; ``missed`` counts the ones that cannot be recorded
    (grouped queries, masked keys, dropout in training). ``lengths`` holds the lengths of the sequences that linear layers get.
    """

    def __init__(self):
        super().__init__()
        self.weights: list[Tensor] = []
        self.missed = 0
        self.lengths: set[int] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            call = bind_arguments(self._attend, args, kwargs)
            if not call["enable_gqa"] and call["dropout_p"] == 0:
                return self._attend(**call)
            self.missed += 1
        elif function is F.multi_head_attention_forward:
            call = bind_arguments(function, args, kwargs)
            self.lengths.add(call["query"].shape[0])
            if _is_plain(call):
                return self._multi_head(**call)
            self.missed += 1
        output = function(*args, **kwargs)
        if function is F.linear and output.ndim == 3:
            self.lengths.update(output.shape[:2])
        if function in SOFTMAX and output.ndim > 2 and output.shape[-1] == output.shape[-2]:
            axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
            return self._record(output) if axis in (-1, output.ndim - 1) else output
        return output

    def validate(self, inputs: Tensor, message: str) -> list[Tensor]:
        """Return ``weights``. Raises NoAttentionError(message) unless all attend over the whole of each image (N, ...)."""
        shapes = {tuple(block.shape) for block in self.weights}
        are_alike = len(shapes) == 1 and self.weights[0].ndim == 4 and len(self.weights[0]) == len(inputs)
        if (
            self.missed or not are_alike or self.weights[0].shape[-1] not in self.lengths
        ):  # a square softmax may be something else
            seen = f"attention of {', '.join(map(str, sorted(shapes)))}" if shapes else "no self-attention"
            seen += f", over {self.weights[0].shape[-1]} tokens that are not a grid of patches," if are_alike else ""
            seen += f" and {self.missed} that cannot be recorded" if self.missed else ""
            raise NoAttentionError(f"{message} (seen: {seen} for {len(inputs)} images)")
        return self.weights

    def _record(self, weights: Tensor) -> Tensor:
        self.weights.append(weights)
        if not torch.is_grad_enabled() or weights.requires_grad:
            return weights
        weights.requires_grad_()  # a frozen model: the graph begins at its first attention
        return weights.clone()  # the model may change them in place

    def _attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        """Compute softmax(Q K^T / sqrt(d)) V, (B, heads, T, d) each, and record the softmax. Signature: that of torch's."""
        logits = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
        return self._record(logits.softmax(-1)) @ value

    def _multi_head(self, query, num_heads, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, **options):
        """Run nn.MultiheadAttention on one sequence (T, B, C): project, attend, project."""
        projected = F.linear(query, in_proj_weight, in_proj_bias).unflatten(-1, (3, num_heads, -1))
        q, k, v = projected.permute(2, 1, 3, 0, 4)  # (B, heads, T, d) each
        mixed = self._attend(q, k, v, options["attn_mask"])
        output = F.linear(mixed.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
        if not options["need_weights"]:
            return output, None
        return output, self.weights[-1].mean(1) if options["average_attn_weights"] else self.weights[-1]


def _is_plain(call: dict) -> bool:
    """Return whether it is self-attention without anything that ``_multi_head`` leaves out."""
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


def _detach(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [at_least_float32(tensor.detach()) for tensor in tensors]


def _differentiate(outputs: Tensor, target: Target, weights: Sequence[Tensor], retain_graph=False) -> Sequence[Tensor]:
    found = differentiate(compute_scores(outputs, target).sum(), weights, retain_graph=retain_graph)
    return [check_finite(gradient, "the gradient at the attention weights holds") for gradient in found if gradient is not None]


def tokens_to_grid(tokens: Tensor, size: Sequence[int], message: str) -> Tensor:
    """Arrange one value per token, (N, T), as maps (N, h, w) for inputs of size (H, W). Raises NoAttentionError(message) if the
    tokens are not a grid of patches."""
    with suppress(ValueError):
        layout = Layout.infer((*tokens.shape, 1), size, is_channels_first=False)
        if layout.prefix <= USUAL_PREFIX_TOKENS:
            return tokens[:, layout.prefix :].unflatten(1, layout.grid)
    raise NoAttentionError(f"{message} (seen: attention over {tokens.shape[1]} tokens that are not a grid of patches)")


def average_head_rows(pairs: Tensor, last_gradient: Tensor) -> Tensor:
    """Average the rows of (N, T, T) whose tokens the head reads: (N, T).

    After the last attention tokens do not mix, so only tokens that the head reads (the class token, or the patches that it
    averages) have a gradient at their queries there, ``last_gradient`` (N, heads, T, T).
    """
    reads = (last_gradient != 0).any(3).any(1).to(pairs.dtype)  # (N, T)
    count = reads.sum(1, keepdim=True)
    if not count.all():
        empty = int((count == 0).sum())
        warnings.warn(f"the score of {empty} images has no gradient at the last attention, so their maps are empty", stacklevel=8)
    return (reads[:, None] @ pairs)[:, 0] / count.clamp_min(1)


def compute_relevance(weights: Sequence[Tensor], gradients: Sequence[Tensor], last_gradient: Tensor) -> Tensor:
    """Compute the relevance (N, T) of each token for the head from blocks' attention weights and gradients (N, heads, T, T)."""
    with full_precision(last_gradient):
        return average_head_rows(attention_relevance(_detach(weights), _detach(gradients)), last_gradient)


class _AttentionExplainer(Explainer):
    """Base class of the explainers that read every block's attention. See ``Explainer`` for the call.

    target_layer: the blocks to read, as a name, module, index or a list of them; None reads all. The call raises
    NoAttentionError, a ValueError, for models whose blocks do not attend over the whole image.
    """

    needs_gradient = True

    def __init__(self, model: nn.Module, target_layer=None, preprocess=None, **options):
        super().__init__(model, target_layer, preprocess, **options)
        layers = target_layer if isinstance(target_layer, (list, tuple)) else [target_layer]
        if not layers:
            raise ValueError(f"target_layer must be a block, a list of blocks, or None for all, got {target_layer!r}")
        self.blocks = [] if target_layer is None else [resolve_layer(model, layer)[0] for layer in layers]
        needed = "needs blocks that attend over the whole image, (images, heads, tokens, tokens)"
        self._message = f"{type(self).__name__} {needed}, and {type(model).__name__} has none; use SCAN or a CAM"

    def _compute_maps(self, inputs: Tensor, target: Target) -> Tensor:
        with torch.enable_grad():
            return tokens_to_grid(self._weigh_tokens(inputs, target), inputs.shape[-2:], self._message)

    def _weigh_tokens(self, inputs: Tensor, target: Target) -> Tensor:
        """Compute each token's value in the map, (N, T)."""
        raise NotImplementedError

    def _record(self, copy: nn.Module, inputs: Tensor) -> tuple[list[Tensor], list[int], Tensor, list[Tensor]]:
        """Run a copy of the model. Return the weights of all blocks, the chosen blocks' indices, logits, the chosen outputs."""
        recorder, spans, outputs = AttentionWeights(), [], []

        def start(*_):
            spans.append([len(recorder.weights)])

        def stop(module, arguments, output):
            spans[-1].append(len(recorder.weights))
            outputs.append(output[0] if isinstance(output, tuple) else output)

        for name in self.blocks:
            block = copy.get_submodule(name)
            block.register_forward_pre_hook(start)
            block.register_forward_hook(stop)
        with delay_interrupts(), self._change_gradients(), recorder:
            logits = run_copy(copy, inputs, self.output)
        weights = recorder.validate(inputs, self._message)
        counts = [last - first for first, last in spans] + [0] * (len(self.blocks) - len(spans))  # 0: it did not run
        if any(count != 1 for count in counts):
            raise ValueError(f"target_layer must be blocks that run with one attention each, got blocks with {counts} attentions")
        return weights, [first for first, _ in spans] or list(range(len(weights))), logits, outputs


class AttentionRollout(_AttentionExplainer):
    """Attention rollout (Abnar, Zuidema 2020): the product of attention and residuals. The map is the same for all classes."""

    needs_gradient = False

    def _weigh_tokens(self, inputs, target):
        weights, chosen, logits, _ = self._record(make_eval_copy(self.model), inputs)
        last_gradient = _differentiate(logits, target, weights)[-1]
        with full_precision(inputs):
            return average_head_rows(attention_rollout(_detach([weights[i] for i in chosen])), last_gradient)


class AttentionRelevance(_AttentionExplainer):
    """Generic attention explainability (Chefer, Gur, Wolf 2021): the positive part of gradient times attention, accumulated."""

    def _weigh_tokens(self, inputs, target):
        weights, chosen, logits, _ = self._record(make_eval_copy(self.model), inputs)
        gradients = _differentiate(logits, target, weights)
        return compute_relevance([weights[i] for i in chosen], [gradients[i] for i in chosen], gradients[-1])


class LeGrad(_AttentionExplainer):
    """LeGrad (Bousselham et al. 2024): how much each block's own score depends on its attention.

    A block's score y^l is the model's head applied to the mean of the block's tokens, so target_layer must be whole blocks.
    target None explains the class that the model predicts. head: function from tokens (N, T, C) to logits (N, K); None finds it
    in models of torchvision and timm.
    """

    def __init__(self, model, target_layer=None, preprocess=None, *, head: Callable[[Tensor], Tensor] | None = None, **options):
        if target_layer is None or head is None:
            blocks, _ = _find_blocks_and_head(model)
            target_layer = blocks if target_layer is None else target_layer
        super().__init__(model, target_layer, preprocess, **options)
        self.head = head

    def _weigh_tokens(self, inputs, target):
        copy = make_eval_copy(self.model)
        weights, chosen, logits, outputs = self._record(copy, inputs)
        head = _find_blocks_and_head(copy)[1] if self.head is None else rebind_function(self.head, self.model, copy)
        target = logits.argmax(1) if target is None else target
        gradients: list[Tensor] = []
        for i, tokens in zip(chosen, outputs, strict=True):
            pooled = tokens.mean(1, keepdim=True).expand_as(tokens)  # every token is the mean, so the head reads the mean
            with delay_interrupts(), self._change_gradients():
                scores = head(pooled)
            gradients += _differentiate(scores, target, [weights[i]], retain_graph=True)
        return legrad(_detach(gradients))


def _find_blocks_and_head(model: Any) -> tuple[list[nn.Module], Callable[[Tensor], Tensor]]:
    while type(model).__name__ in WRAPPED or isinstance(model, Passthrough):
        model = next(model.children())
    if isinstance(model, torchvision.models.VisionTransformer):
        return list(model.encoder.layers), lambda tokens: model.heads(model.encoder.ln(tokens)[:, 0])
    if all(hasattr(model, name) for name in ("blocks", "norm", "forward_head")):  # timm
        return list(model.blocks), lambda tokens: get_logits(model.forward_head(model.norm(tokens)))
    needed = "target_layer=[its blocks] and head=a function from tokens (N, T, C) to logits (N, K)"
    raise ValueError(f"the blocks and the head of {type(model).__name__} are not known; pass {needed}")


class RelevanceTap(FeatureTap):
    """``FeatureTap`` that also computes the relevance of each patch (Chefer, Gur, Wolf 2021, arXiv 2103.15679, Eqs. 5-6).

    The call and ``gradient_and_relevance`` raise NoAttentionError, a ValueError, for models whose attention is not over the whole
    image or cannot be read.
    """

    def __init__(self, model: nn.Module, layer: str | int | nn.Module, **options):
        super().__init__(model, layer, **options)
        self.record = "all"
        self._weights: list[Tensor] = []
        found = f"{type(model).__name__} has none that can be read; use gradient, attribution or position"
        self._message = f"mask_by 'relevance' needs attention over the whole image, and {found}"

    def __call__(self, inputs: Tensor) -> Tensor:
        self._weights = []
        with delay_interrupts(), super()._change_gradients(), AttentionWeights() as recorder:  # libra outside the recorder
            logits = FeatureTaps.__call__(self, inputs)
        self.layout = self.layouts[0]  # outside the recorder: it may run the model
        self._weights = recorder.validate(inputs, self._message)
        return logits

    def _change_gradients(self):
        return nullcontext()  # done in __call__

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self._weights = []

    @property
    def features(self) -> Tensor:
        return super().features.detach()

    def gradient_and_relevance(self, target: Target = None) -> tuple[Tensor, Tensor]:
        """Compute ``gradient`` and relevance (B, h, w), 0 or more, float32 or better. target: see ``FeatureTap.gradients``."""
        gradient, *others = self._compute_gradients([*self.captured, *self._weights], target)
        if gradient is None:
            raise self._no_gradient_error(self.name)
        at_weights = [each for each in others if each is not None]
        if not at_weights or len(at_weights) < len(others):
            raise NoAttentionError(f"{self._message} (seen: attention that does not influence the score)")
        tokens = compute_relevance(self._weights, at_weights, at_weights[-1])
        return gradient, tokens_to_grid(tokens, self.input_size, self._message)
