"""How quantization parameters are found."""
from .bias_correction import BiasCorrection, correct_biases
from .branches import score_layers
from .data import CalibrationDataset, LoadedSamples, check_no_overlap, source_datasets
from .global_loss import FilteredGlobalLoss
from .observe import observe_activations
from .protect import Protection, protect_detector, with_overrides
from .reconstruction import BlockReconstruction
from .sensitivity import Sensitivities, measure_sensitivity

__all__ = ['BiasCorrection', 'BlockReconstruction', 'CalibrationDataset', 'FilteredGlobalLoss', 'LoadedSamples',
           'Protection', 'Sensitivities', 'check_no_overlap', 'correct_biases', 'measure_sensitivity',
           'observe_activations', 'protect_detector', 'score_layers', 'source_datasets', 'with_overrides']
