"""Metrics for heat maps: can the map be trusted?

All metrics are batched, run on the maps' device and return one value per image.
"""

from scanlib.metrics.baselines import make_centre_maps as make_centre_maps, make_random_maps as make_random_maps
from scanlib.metrics.class_specificity import compute_asked_denser as compute_asked_denser
from scanlib.metrics.class_specificity import compute_class_correlation as compute_class_correlation
from scanlib.metrics.class_specificity import compute_density as compute_density, draw_absent_classes as draw_absent_classes
from scanlib.metrics.compare import METRICS as METRICS, compare as compare, evaluate_maps as evaluate_maps
from scanlib.metrics.localisation import compute_energy_inside as compute_energy_inside, compute_iou as compute_iou
from scanlib.metrics.localisation import compute_peak_inside as compute_peak_inside, make_box_masks as make_box_masks
from scanlib.metrics.localisation import rank_pixels as rank_pixels
from scanlib.metrics.quality import compute_adcc as compute_adcc, compute_arcc as compute_arcc
from scanlib.metrics.quality import compute_checkerboard as compute_checkerboard, compute_coherency as compute_coherency
from scanlib.metrics.quality import compute_complexity as compute_complexity, compute_correlation as compute_correlation
from scanlib.metrics.removal import ScoreFunction as ScoreFunction, build_class_score as build_class_score
from scanlib.metrics.removal import compute_auc as compute_auc, compute_drop as compute_drop, compute_increase as compute_increase
from scanlib.metrics.removal import compute_removal_curves as compute_removal_curves, compute_win as compute_win
from scanlib.metrics.removal import fill_black as fill_black, fill_blur as fill_blur, fill_mean as fill_mean
from scanlib.metrics.removal import order_patches_greedily as order_patches_greedily
from scanlib.metrics.removal import rank_locations as rank_locations, score_dimmed_images as score_dimmed_images
from scanlib.metrics.road import compute_road as compute_road, fill_imputed as fill_imputed, impute as impute
from scanlib.metrics.sanity import compute_rank_correlation as compute_rank_correlation, compute_ssim as compute_ssim
from scanlib.metrics.sanity import iterate_randomised_models as iterate_randomised_models
from scanlib.metrics.sanity import list_parameter_groups as list_parameter_groups, randomise_parameters as randomise_parameters
from scanlib.metrics.stability import compute_infidelity as compute_infidelity, compute_max_sensitivity as compute_max_sensitivity
from scanlib.metrics.table import Comparison as Comparison
