"""Explainers: how is a prediction explained?"""

from scanlib.explainers.attention import (
    AttentionRelevance as AttentionRelevance,
    AttentionRollout as AttentionRollout,
    AttentionWeights as AttentionWeights,
    LeGrad as LeGrad,
    attention_relevance as attention_relevance,
    attention_rollout as attention_rollout,
    legrad as legrad,
)
from scanlib.explainers.base import (
    Explainer as Explainer,
    normalize_map as normalize_map,
    resize_map as resize_map,
    scale_to_unit_range as scale_to_unit_range,
)
from scanlib.explainers.cams import (
    CAM as CAM,
    FEM as FEM,
    KPCACAM as KPCACAM,
    EigenCAM as EigenCAM,
    EigenGradCAM as EigenGradCAM,
    FinerCAM as FinerCAM,
    GradCAM as GradCAM,
    GradCAMElementWise as GradCAMElementWise,
    GradCAMPlusPlus as GradCAMPlusPlus,
    HiResCAM as HiResCAM,
    LayerCAM as LayerCAM,
    RefineCAM as RefineCAM,
    SegEigenCAM as SegEigenCAM,
    ShapleyCAM as ShapleyCAM,
    SmoothGradCAMPlusPlus as SmoothGradCAMPlusPlus,
    XGradCAM as XGradCAM,
)
from scanlib.explainers.factorization import DeepFeatureFactorization as DeepFeatureFactorization
from scanlib.explainers.formulas import grad_cam as grad_cam, layer_cam as layer_cam
from scanlib.explainers.fullgrad import FullGrad as FullGrad
from scanlib.explainers.perturbation import ISCAM as ISCAM, SSCAM as SSCAM, AblationCAM as AblationCAM, ScoreCAM as ScoreCAM
from scanlib.explainers.replay import Replay as Replay
from scanlib.explainers.weighted import weight_by_confidence as weight_by_confidence
