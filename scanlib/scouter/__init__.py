"""SCOUTER: a classifier that explains itself."""

from scanlib.scouter.model import Scouter as Scouter
from scanlib.scouter.recipes import PRESETS as PRESETS, Recipe as Recipe, load_scouter as load_scouter
from scanlib.scouter.recipes import train_recipe as train_recipe
from scanlib.scouter.slot_attention import XSlotAttention as XSlotAttention, encode_positions as encode_positions
from scanlib.scouter.training import compute_scouter_loss as compute_scouter_loss
