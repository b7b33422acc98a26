"""How quantization parameters are found."""

from mmdet_ptq.calibration.fisher import WEIGHED_IMAGES, weigh_tensors
from mmdet_ptq.calibration.global_loss import FilteredGlobalLoss
from mmdet_ptq.calibration.images import CalibrationDataset, LoadedSamples, check_no_overlap, source_datasets
from mmdet_ptq.calibration.observe import observe_activations
from mmdet_ptq.calibration.protection.protect import Protection, protect_detector
from mmdet_ptq.calibration.protection.sensitivity import Sensitivities, measure_sensitivity
from mmdet_ptq.calibration.reconstruction.compensated import JUDGES, ROUNDING_IMAGES, compensate_rounding
from mmdet_ptq.calibration.reconstruction.method import BlockReconstruction

__all__ = [
    'JUDGES',
    'ROUNDING_IMAGES',
    'WEIGHED_IMAGES',
    'BlockReconstruction',
    'CalibrationDataset',
    'FilteredGlobalLoss',
    'LoadedSamples',
    'Protection',
    'Sensitivities',
    'check_no_overlap',
    'compensate_rounding',
    'measure_sensitivity',
    'observe_activations',
    'protect_detector',
    'source_datasets',
    'weigh_tensors',
]
