"""Training support: checkpoints, random state, encoding of batches, feature cache, decoder files, several processes."""

from scanlib.training.checkpoint import load_checkpoint as load_checkpoint, save_checkpoint as save_checkpoint
from scanlib.training.feature_cache import FeatureCache as FeatureCache
