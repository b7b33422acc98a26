"""How quantization parameters are found."""
from .data import CalibrationDataset, LoadedSamples, check_no_overlap, source_datasets
from .global_loss import FilteredGlobalLoss
from .observe import observe_activations

__all__ = ['CalibrationDataset', 'FilteredGlobalLoss', 'LoadedSamples', 'check_no_overlap', 'observe_activations',
           'source_datasets']
