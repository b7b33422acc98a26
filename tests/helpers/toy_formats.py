"""A toy with a depthwise convolution and a tensor that two layers read, for formats that are exchanged."""

from __future__ import annotations

import copy

import torch
from mmdet.structures import DetDataSample
from torch import nn

from mmdet_ptq.calibration import observe_activations
from mmdet_ptq.calibration.protection.sensitivity import TensorSet, tensor_sets
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.testing.calibrated import OBSERVE
from mmdet_ptq.wrapping import Structure, prepare_detector


class Toy(nn.Module):
    """Stem, depthwise convolution, two layers that read its output, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.one, self.two = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 3, padding=1)
        self.bbox_head = nn.Conv2d(6, 5, 1)

    def data_preprocessor(self, batch, training):
        return batch

    def forward(self, inputs, data_samples=None, mode='predict'):
        x = self.depthwise(self.stem(inputs).relu()).relu()
        return self.bbox_head((self.one(x) + self.two(x)).relu())


def image_batches() -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    meta = dict(img_shape=(8, 8), scale_factor=(1.0, 1.0))
    return [
        dict(
            inputs=torch.randn(2, 3, 8, 8, generator=generator),
            data_samples=[DetDataSample(metainfo=meta) for _ in range(2)],
        )
        for _ in range(2)
    ]


def float_toy() -> Toy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Toy().eval()


def run_one(detector: nn.Module) -> None:
    detector(image_batches()[0]['inputs'][:1])


def config(**changes) -> PTQConfig:
    """8 bits, weights of least error, activations from end to end, one scale where a depthwise layer reads; changed."""
    activations = {**OBSERVE['activations'], 'depthwise_per_channel': False, **changes.pop('activations', {})}
    return PTQConfig.from_dict({**OBSERVE, 'weights': {}, 'activations': activations, **changes})


def prepared(cfg: PTQConfig) -> tuple[Toy, Structure]:
    detector = float_toy()
    structure = prepare_detector(detector, cfg, lambda: run_one(detector))
    observe_activations(detector, image_batches(), structure)
    return detector, structure


def tensor_set(structure: Structure, kind: str, layer: str) -> TensorSet:
    return next(tensors for tensors in tensor_sets(structure) if tensors.kind == kind and layer in tensors.layers)


def copies(made: tuple[Toy, Structure]) -> tuple[Toy, Structure]:
    """Both, to be changed."""
    return copy.deepcopy(made)


def outputs(detector: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return detector(image_batches()[1]['inputs'])
