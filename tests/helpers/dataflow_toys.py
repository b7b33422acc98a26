"""A detector of one's own between two convolutions and a head, and what the dataflow tests ask of a structure."""

import torch
from torch import nn

from mmdet_ptq.calibration import observe_activations
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.testing.calibrated import OBSERVE
from mmdet_ptq.wrapping import prepare_detector

FULL = {**OBSERVE, 'dataflow': 'full'}


def same(a, b):
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def outputs_of(structure):
    return {layer.name: layer.outputs for layer in structure.layers}


def inputs_of(structure):
    return {layer.name: layer.inputs for layer in structure.layers}


def sites_in(structure, module):
    return {
        (site['function'], site['index']): site['activation']
        for site in structure.sites
        if site['module'] == module and site['activation']
    }


# ------------------------------------------------------------------ a detector of one's own


class Toy(nn.Module):
    """A backbone given as a function between two convolutions and an output layer."""

    def __init__(self, between, **layers) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.other = nn.Conv2d(3, 4, 3, padding=1)
        self.between = between
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.bbox_head = nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyConv2d(2, 3, padding=1))
        self.data_preprocessor = lambda batch, training: batch
        self(torch.zeros(1, 3, 8, 8))

    def forward(self, inputs, data_samples=None, mode='predict'):
        return self.bbox_head(self.between(self, self.stem(inputs), self.other(inputs)))


def toy(between, ptq=None, **layers):
    torch.manual_seed(0)
    detector = Toy(between, **layers).eval()
    image = torch.randn(2, 3, 8, 8)
    structure = prepare_detector(detector, PTQConfig.from_dict({**FULL, **(ptq or {})}), lambda: detector(image))
    observe_activations(detector, [dict(inputs=image)], structure)
    return detector, structure, image


READ = 'bbox_head/0'  # the quantizer of what the head reads
OUT = 'bbox_head/1:out'  # and of what it puts out
