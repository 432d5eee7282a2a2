"""Tap a layer of a vision transformer and read attention relevance from the same run.

with RelevanceTap(model, "encoder.layers.encoder_layer_1") as tap:
    logits = tap(inputs)                                        # (B, 3, H, W), preprocessed -> (B, K)
    gradient, relevance = tap.gradient_and_relevance(target=3)  # as the layer's output; (B, h, w)

``FeatureTap`` records what lies behind its layer only. Here every block's attention is kept, and the graph from the first on, of
a model that is not frozen from its first weight on.
"""

from torch import Tensor

from scanlib.attention import AttentionWeights, NoAttention, attention_relevance, patches_of, read_by_head
from scanlib.explainer import exact
from scanlib.hooks import FeatureTap
from scanlib.targets import Target


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
            raise NoAttention(
                f"the score of {type(self.model).__name__} has no gradient at all of its attention; take SCAN or a CAM"
            )
        at_weights = [exact(each) for each in at_weights]
        pairs = attention_relevance([exact(block.detach()) for block in self._weights], at_weights)
        return gradient, patches_of(read_by_head(pairs, at_weights[-1]), self._inputs, self.model)
