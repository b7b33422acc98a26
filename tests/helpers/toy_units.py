"""A toy of two convolutions and a head in few bits, on its way through reconstruction, unit by unit."""

from __future__ import annotations

import torch
from mmdet.structures import DetDataSample
from torch import nn

from mmdet_ptq.calibration import observe_activations
from mmdet_ptq.calibration.reconstruction.activation_store import ActivationStore
from mmdet_ptq.calibration.reconstruction.streams import FLOAT, QUANTIZED, Streams
from mmdet_ptq.calibration.reconstruction.unit_data import UnitData
from mmdet_ptq.calibration.reconstruction.units import find_units
from mmdet_ptq.config import PTQConfig, ReconstructConfig
from mmdet_ptq.predictions import predict_aligned
from mmdet_ptq.testing.calibrated import OBSERVE
from mmdet_ptq.wrapping import prepare_detector, quantization_mode

LOW_BIT = {**OBSERVE, 'weights': dict(bits=3), 'activations': dict(OBSERVE['activations'], bits=4)}


class Toy(nn.Module):
    """Stem, a convolution that is called once or, as a shared one, on two maps, and a head."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.middle = nn.Conv2d(6, 5, 3, padding=1)
        self.bbox_head = nn.Conv2d(5, 4, 1)
        self.twice = twice

    def data_preprocessor(self, batch, training):
        return batch

    def forward(self, inputs, data_samples=None, mode='tensor'):
        x = self.stem(inputs).relu()
        y = self.middle(x).relu()
        if self.twice:
            y = torch.cat([y.flatten(2), self.middle(x[..., ::2, ::2]).relu().flatten(2)], 2)[..., None]
        return self.bbox_head(y)


def batch(number: int, seed: int, size: tuple[int, int] = (6, 8)) -> dict:
    """Images of one size, as a data preprocessor returns them."""
    generator = torch.Generator().manual_seed(seed)
    samples = [DetDataSample(metainfo=dict(img_shape=size, scale_factor=(1.0, 1.0))) for _ in range(number)]
    return dict(inputs=torch.randn(number, 3, *size, generator=generator), data_samples=samples)


class Units:
    """The toy, quantized, with batches inside it.

    Args:
        folder: For what does not fit in memory: nothing.
        batches: The batches. Defaults to three of two images.
        twice: Whether the middle runs twice. Defaults to False.
        fisher: Whether outputs are weighed. Defaults to False.
        block: The ``ptq`` block. Defaults to few bits.
    """

    def __init__(self, folder, batches=None, twice=False, fisher=False, block=LOW_BIT) -> None:
        torch.manual_seed(0)
        self.detector = Toy(twice).eval()
        self.batches = [batch(2, seed) for seed in (1, 2, 3)] if batches is None else batches
        first = self.batches[0]
        cfg = PTQConfig.from_dict(block)
        self.structure = prepare_detector(self.detector, cfg, lambda: self.detector(first['inputs'][:1]))
        observe_activations(self.detector, self.batches, self.structure)
        self.detector.requires_grad_(False)
        image = first['inputs'][:1].clone().requires_grad_()
        with quantization_mode(self.detector, FLOAT):
            found = find_units(
                self.detector, lambda: predict_aligned(self.detector, image, first['data_samples'][:1]), 'layer'
            )
        self.units = {unit.name: unit for unit in found}
        self.streams = Streams(self.detector, found, ActivationStore(2**30, folder))
        for each in self.batches:
            self.streams.add(each, False, fisher)

    def data(self, name: str, train=None, held_out=(), **cfg) -> UnitData:
        """A unit with its inputs; the units before it are as they are."""
        samples = [(b, i) for b, each in enumerate(self.batches) for i in range(len(each['data_samples']))]
        unit = self.units[name]
        float_inputs = self.streams.collect(unit, FLOAT)
        inputs = self.streams.collect(unit, QUANTIZED)
        cfg = ReconstructConfig(**{'fisher': 0, 'skip_below': 0, **cfg})
        return UnitData(
            self.streams, unit, inputs, float_inputs, cfg, samples if train is None else train, list(held_out)
        )
