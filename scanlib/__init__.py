"""scanlib: learn to see what a vision model saw.

Images go in, a frozen classifier is tapped at one layer, and an explainer turns its features into a heat map.
"""

from scanlib.data import PhotoFolder as PhotoFolder, Signs as Signs, read_image as read_image
from scanlib.decoders import ConvolutionalDecoder as ConvolutionalDecoder, ResidualModule as ResidualModule
from scanlib.decoders import TransformerBlock as TransformerBlock, TransformerDecoder as TransformerDecoder
from scanlib.explainers import CAM as CAM, FEM as FEM, ISCAM as ISCAM, KPCACAM as KPCACAM, RISE as RISE, SSCAM as SSCAM
from scanlib.explainers import AblationCAM as AblationCAM, AttentionRelevance as AttentionRelevance
from scanlib.explainers import AttentionRollout as AttentionRollout, DeepFeatureFactorization as DeepFeatureFactorization
from scanlib.explainers import ExpectedGradients as ExpectedGradients, InputXGradient as InputXGradient
from scanlib.explainers import IntegratedGradients as IntegratedGradients, Libra as Libra, Saliency as Saliency
from scanlib.explainers import Occlusion as Occlusion, SmoothGrad as SmoothGrad, libra as libra
from scanlib.explainers import EigenCAM as EigenCAM, EigenGradCAM as EigenGradCAM, FinerCAM as FinerCAM, FullGrad as FullGrad
from scanlib.explainers import GradCAM as GradCAM, GradCAMElementWise as GradCAMElementWise, GradCAMPlusPlus as GradCAMPlusPlus
from scanlib.explainers import HiResCAM as HiResCAM, LayerCAM as LayerCAM, LeGrad as LeGrad, RefineCAM as RefineCAM
from scanlib.explainers import ScoreCAM as ScoreCAM, SegEigenCAM as SegEigenCAM, ShapleyCAM as ShapleyCAM
from scanlib.explainers import SmoothGradCAMPlusPlus as SmoothGradCAMPlusPlus, XGradCAM as XGradCAM, grad_cam as grad_cam
from scanlib.explainers import layer_cam as layer_cam
from scanlib.hooks import FeatureTap as FeatureTap, FeatureTaps as FeatureTaps
from scanlib.layers import Layout as Layout, resolve_layer as resolve_layer
from scanlib.loss import ConfidentMAE as ConfidentMAE, NonConfidentMAE as NonConfidentMAE
from scanlib.loss import SelfConfidenceLoss as SelfConfidenceLoss, compute_confidence as compute_confidence
from scanlib.metrics import Comparison as Comparison, compare as compare
from scanlib.models import SmallResNet as SmallResNet, build_small_vit as build_small_vit, load_classifier as load_classifier
from scanlib.scan import SCAN as SCAN
from scanlib.scouter import Scouter as Scouter, XSlotAttention as XSlotAttention, compute_scouter_loss as compute_scouter_loss
from scanlib.scouter import load_scouter as load_scouter
from scanlib.trainer import Trainer as Trainer

__version__ = "0.1.0"
