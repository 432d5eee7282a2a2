"""scanlib: learn to see what a vision model saw.

Images go in, a frozen classifier is tapped at one layer, an explainer turns what flowed there into a heat map.
"""

from scanlib.attention import AttentionRelevance, AttentionRollout, LeGrad
from scanlib.cams import grad_cam, layer_cam
from scanlib.data import PhotoFolder, Signs, read_image
from scanlib.decoders import ConvolutionalDecoder, ResidualModule, TransformerBlock, TransformerDecoder
from scanlib.hooks import FeatureTap, Layout, resolve_layer
from scanlib.loss import ConfidentMAE, NonConfidentMAE, SelfConfidenceLoss, self_confidence
from scanlib.models import SmallResNet, load_target, small_vit
from scanlib.scan import SCAN
from scanlib.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "SCAN",
    "AttentionRelevance",
    "AttentionRollout",
    "ConfidentMAE",
    "ConvolutionalDecoder",
    "FeatureTap",
    "Layout",
    "LeGrad",
    "NonConfidentMAE",
    "PhotoFolder",
    "ResidualModule",
    "SelfConfidenceLoss",
    "Signs",
    "SmallResNet",
    "Trainer",
    "TransformerBlock",
    "TransformerDecoder",
    "grad_cam",
    "layer_cam",
    "load_target",
    "read_image",
    "resolve_layer",
    "self_confidence",
    "small_vit",
]
