"""Classifiers to explain."""

from scanlib.models.backbones import build_classifier as build_classifier, replace_head as replace_head
from scanlib.models.freezing import FrozenStages as FrozenStages, list_stages as list_stages
from scanlib.models.small import Normalize as Normalize, SmallResNet as SmallResNet, build_small_vit as build_small_vit
from scanlib.models.zoo import CHECKPOINTS as CHECKPOINTS, Classifier as Classifier, load_classifier as load_classifier
