"""scanlib: learn to see what a vision model saw.

Images go in, a frozen classifier is tapped at one layer, an explainer turns what flowed there into a heat map.
"""

from scanlib.attention import AttentionRelevance, AttentionRollout, LeGrad
from scanlib.cams import (
    CAM,
    FEM,
    KPCACAM,
    EigenCAM,
    EigenGradCAM,
    FinerCAM,
    GradCAM,
    GradCAMElementWise,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    RefineCAM,
    SegEigenCAM,
    ShapleyCAM,
    SmoothGradCAMPlusPlus,
    XGradCAM,
)
from scanlib.comparison import Comparison, compare
from scanlib.data import PhotoFolder, Signs, read_image
from scanlib.decoders import ConvolutionalDecoder, ResidualModule, TransformerBlock, TransformerDecoder
from scanlib.factorization import DeepFeatureFactorization
from scanlib.formulas import grad_cam, layer_cam
from scanlib.fullgrad import FullGrad
from scanlib.hooks import FeatureTap, FeatureTaps
from scanlib.layers import Layout, resolve_layer
from scanlib.loss import ConfidentMAE, NonConfidentMAE, SelfConfidenceLoss, self_confidence
from scanlib.models import SmallResNet, load_target, small_vit
from scanlib.perturbation import ISCAM, SSCAM, AblationCAM, ScoreCAM
from scanlib.scan import SCAN
from scanlib.scouter import Scouter
from scanlib.scouter_recipes import load_scouter
from scanlib.scouter_training import scouter_loss
from scanlib.slot_attention import XSlotAttention
from scanlib.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "CAM",
    "FEM",
    "ISCAM",
    "KPCACAM",
    "SCAN",
    "SSCAM",
    "AblationCAM",
    "AttentionRelevance",
    "AttentionRollout",
    "Comparison",
    "ConfidentMAE",
    "ConvolutionalDecoder",
    "DeepFeatureFactorization",
    "EigenCAM",
    "EigenGradCAM",
    "FeatureTap",
    "FeatureTaps",
    "FinerCAM",
    "FullGrad",
    "GradCAM",
    "GradCAMElementWise",
    "GradCAMPlusPlus",
    "HiResCAM",
    "LayerCAM",
    "Layout",
    "LeGrad",
    "NonConfidentMAE",
    "PhotoFolder",
    "RefineCAM",
    "ResidualModule",
    "ScoreCAM",
    "Scouter",
    "SegEigenCAM",
    "SelfConfidenceLoss",
    "ShapleyCAM",
    "Signs",
    "SmallResNet",
    "SmoothGradCAMPlusPlus",
    "Trainer",
    "TransformerBlock",
    "TransformerDecoder",
    "XGradCAM",
    "XSlotAttention",
    "compare",
    "grad_cam",
    "layer_cam",
    "load_scouter",
    "load_target",
    "read_image",
    "resolve_layer",
    "scouter_loss",
    "self_confidence",
    "small_vit",
]
