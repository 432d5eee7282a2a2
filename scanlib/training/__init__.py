"""Training support: how does training survive?"""

from scanlib.training.checkpoint import load_checkpoint as load_checkpoint, save_checkpoint as save_checkpoint
from scanlib.training.feature_cache import FeatureCache as FeatureCache
