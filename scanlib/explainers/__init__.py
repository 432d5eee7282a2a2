"""Explainers: how is a prediction explained?"""

from scanlib.explainers.attention import AttentionRelevance as AttentionRelevance, AttentionRollout as AttentionRollout
from scanlib.explainers.attention import AttentionWeights as AttentionWeights, LeGrad as LeGrad
from scanlib.explainers.attention import attention_relevance as attention_relevance, attention_rollout as attention_rollout
from scanlib.explainers.attention import legrad as legrad
from scanlib.explainers.base import Explainer as Explainer, normalize_map as normalize_map, resize_map as resize_map
from scanlib.explainers.base import scale_to_unit_range as scale_to_unit_range
from scanlib.explainers.cams import CAM as CAM, FEM as FEM, KPCACAM as KPCACAM, EigenCAM as EigenCAM, EigenGradCAM as EigenGradCAM
from scanlib.explainers.cams import FinerCAM as FinerCAM, GradCAM as GradCAM, GradCAMElementWise as GradCAMElementWise
from scanlib.explainers.cams import GradCAMPlusPlus as GradCAMPlusPlus, HiResCAM as HiResCAM, LayerCAM as LayerCAM
from scanlib.explainers.cams import RefineCAM as RefineCAM, SegEigenCAM as SegEigenCAM, ShapleyCAM as ShapleyCAM
from scanlib.explainers.cams import SmoothGradCAMPlusPlus as SmoothGradCAMPlusPlus, XGradCAM as XGradCAM
from scanlib.explainers.factorization import DeepFeatureFactorization as DeepFeatureFactorization
from scanlib.explainers.formulas import grad_cam as grad_cam, layer_cam as layer_cam
from scanlib.explainers.fullgrad import FullGrad as FullGrad
from scanlib.explainers.gradients import ExpectedGradients as ExpectedGradients, InputXGradient as InputXGradient
from scanlib.explainers.gradients import IntegratedGradients as IntegratedGradients, Saliency as Saliency
from scanlib.explainers.gradients import SmoothGrad as SmoothGrad
from scanlib.explainers.libra import Libra as Libra, libra as libra
from scanlib.explainers.perturbation import RISE as RISE, Occlusion as Occlusion
from scanlib.explainers.perturbation import ISCAM as ISCAM, SSCAM as SSCAM, AblationCAM as AblationCAM, ScoreCAM as ScoreCAM
from scanlib.explainers.replay import Replay as Replay
from scanlib.explainers.weighted import (
    explain_log_probability as explain_log_probability,
    weight_by_confidence as weight_by_confidence,
)
