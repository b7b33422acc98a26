"""The calibration on a pretend accelerator: it must do what it does on the CPU, and mix no devices."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator

import mmcv._ext
import mmengine.structures.instance_data
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pretend_device import NAME, compiled, pretend_device
from torch import Tensor, nn

from mmdet_ptq.calibration import FilteredGlobalLoss, observe_activations
from mmdet_ptq.calibration.reconstruction.units import find_units
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.engine import PTQRunner, load_quantized
from mmdet_ptq.predictions import predict_aligned
from mmdet_ptq.quantizers import AffineQuantizer, LogAffineQuantizer, Quantizer, build_observer, resolve_auto
from mmdet_ptq.testing import predict, raw_outputs, tiny_batch, tiny_config, tiny_detector
from mmdet_ptq.testing.calibrated import OBSERVE
from mmdet_ptq.wrapping import prepare_detector

# torch has one accelerator in a process; `pytest -m cuda` is what a machine with a GPU runs
pytestmark = [pytest.mark.thorough, pytest.mark.skipif(torch.cuda.is_available(), reason='there is a real device')]


class _TypeOnDevice(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, Tensor) and value.device.type == NAME and value.dtype == cls.dtype


class BoolTensor(metaclass=_TypeOnDevice):
    dtype = torch.bool


class LongTensor(metaclass=_TypeOnDevice):
    dtype = torch.int64


@pytest.fixture(scope='module')
def device() -> Iterator[torch.device]:
    """The pretend device, known to mmengine's structures and usable by mmcv's compiled operators."""
    structures = mmengine.structures.instance_data
    with pytest.MonkeyPatch.context() as patch, pretend_device() as device:
        for name, more in (('BoolTypeTensor', (BoolTensor,)), ('IndexType', (BoolTensor, LongTensor))):
            known = types.SimpleNamespace(__args__=getattr(structures, name).__args__ + more)
            patch.setattr(structures, name, known)
        for name in ('nms', 'roi_align_forward', 'roi_align_backward'):
            patch.setattr(mmcv._ext, name, compiled(getattr(mmcv._ext, name)))
        # fewer steps of the search for a weight's range: an operator costs ten times as much as on the CPU
        patch.setattr('mmdet_ptq.quantizers.affine.COARSE', 6)
        patch.setattr('mmdet_ptq.quantizers.affine.FINE', 4)
        yield device


def assert_same(found: Tensor, expected: Tensor, device: torch.device) -> None:
    """On the device, with the values of the CPU."""
    assert (found.device, expected.device.type) == (device, 'cpu')
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- the device itself


@pytest.mark.parametrize(
    'mix',
    [
        lambda here, there: here + there,
        lambda here, there: there.clone().add_(here),
        lambda here, there: here @ there,
        lambda here, there: torch.cat([here, there]),
        lambda here, there: torch.stack([here.sum(), there.sum()]),
        lambda here, there: torch.where(here > 0, here, there),
        lambda here, there: here.gather(1, there.long()),
        lambda here, there: F.conv2d(here[None, None], there[None, None]),
        lambda here, there: there[here.long()],
        lambda here, there: torch.maximum(there, here.sum()),
        lambda here, there: here.masked_fill(there > 0, 0),
        lambda here, there: F.linear(here, here, there[0]),
        lambda here, there: F.mse_loss(here, there),
        lambda here, there: compiled(mmcv._ext.nms)(here, there[0], iou_threshold=0.5, offset=0),
    ],
)
def test_mixed_devices_raise_as_with_cuda(device, mix):
    with pytest.raises(RuntimeError, match='same device'):
        mix(torch.zeros(4, 4, device=device), torch.zeros(4, 4))


def test_what_cuda_takes_from_the_cpu_is_taken(device):
    here = torch.arange(6.0, device=device).view(2, 3)
    assert_same(here * torch.tensor(2.0), torch.arange(0.0, 12, 2).view(2, 3), device)
    assert_same(here[torch.tensor([1])], torch.tensor([[3.0, 4, 5]]), device)
    here[:, 0].copy_(torch.tensor([7.0, 8]))
    assert here.tolist() == [[7, 1, 2], [8, 4, 5]] and here[0, 1].item() == 1


@pytest.mark.parametrize('convert', [np.asarray, Tensor.numpy])
def test_numpy_needs_a_copy_on_the_cpu(device, convert):
    with pytest.raises(TypeError, match='to numpy'):
        convert(torch.zeros(2, device=device))


@pytest.mark.parametrize('draw', [torch.rand, torch.randn, torch.randperm])
def test_a_generator_of_the_cpu_is_refused(device, draw):
    with pytest.raises(RuntimeError, match='device type for generator'):
        draw(3, device=device, generator=torch.Generator())


def test_a_network_trains_moves_and_is_saved_as_on_the_cpu(device, tmp_path):
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    images, ours = torch.randn(2, 3, 8, 8), copy.deepcopy(net).to(device)
    for model in (net, ours):
        place = next(model.parameters()).device
        optimizer = torch.optim.Adam(model.parameters(), eps=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            F.smooth_l1_loss(model(images.to(place)), torch.ones(2, 2, device=place)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    torch.save(ours.state_dict(), tmp_path / 'net.pth')
    copied, loaded = copy.deepcopy(ours), torch.load(tmp_path / 'net.pth')
    copied.load_state_dict(net.state_dict())
    for name, expected in net.state_dict().items():
        for state in (ours.state_dict(), copied.state_dict(), loaded):
            assert_same(state[name], expected, device)


# ---------------------------------------------------------------- the parts of the calibration

QUANTIZERS = [
    AffineQuantizer(4, True, 3, 0),
    AffineQuantizer(8, False),
    LogAffineQuantizer(4, 3),
    LogAffineQuantizer(4, 3, 'exact'),
    LogAffineQuantizer(3, 3, 'shift'),
    LogAffineQuantizer(8, 3, location='median'),
]


@pytest.mark.parametrize('quantizer', QUANTIZERS, ids=lambda q: f'{type(q).__name__}-{q.spec().get("mode", q.bits)}')
def test_quantizers(device, quantizer):
    weight, importance, rounding = torch.randn(3, 4, 5, 5), torch.rand(3, 4, 5, 5), torch.rand(3, 4, 5, 5)

    def run(quantizer: Quantizer, *tensors: Tensor) -> list[Tensor]:
        weight, importance, rounding = tensors
        quantizer.fit_weight(weight, importance=importance)
        leaf, h = weight.clone().requires_grad_(), rounding.clone().requires_grad_()
        out = quantizer(leaf)
        (out * weight + quantizer(leaf, h)).sum().backward()
        codes = quantizer.encode(weight)
        quantizer.rescale(torch.tensor(0.9))
        more = (quantizer.table(), quantizer.table_scale()) if isinstance(quantizer, LogAffineQuantizer) else ()
        return [
            out.detach(),
            leaf.grad,
            h.grad,
            codes,
            quantizer.decode(codes),
            quantizer.code_position(weight),
            *more,
            *(p.grad for p in quantizer.learnable().values()),
            *quantizer.state_dict().values(),
        ]

    expected = run(copy.deepcopy(quantizer), weight, importance, rounding)
    ours = copy.deepcopy(quantizer).to(device)
    for found, value in zip(run(ours, *(t.to(device) for t in (weight, importance, rounding))), expected, strict=True):
        assert_same(found, value, device)
    with pytest.raises(RuntimeError, match='same device'):
        ours(weight)


def test_the_choice_between_formats(device):
    weight, cfg = torch.randn(3, 20) ** 3, dict(type='LogAffineQuantizer', mode='auto', num_channels=3)
    expected, found = resolve_auto(cfg, weight), resolve_auto(cfg, weight.to(device))
    assert found.spec() == expected.spec()
    for name, value in expected.state_dict().items():
        assert_same(found.state_dict()[name], value, device)


@pytest.mark.parametrize(
    'kind, channels',
    [
        ('MinMax', None),
        ('MovingAverage', 3),
        ('Percentile', None),
        ('Percentile', 3),
        ('KL', 3),
        ('MSE', None),
        ('MSE', 3),
    ],
)
def test_observers(device, kind, channels):
    first, second = torch.randn(2, 3, 64), torch.randn(2, 3, 64) * 2

    def run(*batches: Tensor) -> tuple[Tensor, ...]:
        observer = build_observer(dict(type=f'{kind}Observer', num_channels=channels))
        for batch in batches:
            observer.update(batch)
        return *observer.range(4, True), *observer.range(4, False)

    for found, expected in zip(run(first.to(device), second.to(device)), run(first, second), strict=True):
        assert_same(found, expected, device)


# ---------------------------------------------------------------- whole detectors


def test_preparing_observing_and_the_global_loss(device):
    """A two-stage detector: region proposals, compiled operators, boxes of the float detector as reference."""
    batch = tiny_batch(2, seed=1)

    def run(detector: nn.Module) -> tuple[list[Tensor], dict[str, Tensor]]:
        teacher = copy.deepcopy(detector)
        structure = prepare_detector(detector, PTQConfig.from_dict(OBSERVE), lambda: predict(detector, tiny_batch(1)))
        observe_activations(detector, [copy.deepcopy(batch)], structure)
        outputs = raw_outputs(detector)
        data = detector.data_preprocessor(copy.deepcopy(batch), False)
        with torch.no_grad():
            target = predict_aligned(teacher, data['inputs'], data['data_samples'])
        student = predict_aligned(detector, data['inputs'], data['data_samples'], reference=target)
        losses = FilteredGlobalLoss()(student, target)
        sum(value for name, value in losses.items() if 'loss' in name).backward()
        gradients = {name: p.grad for name, p in detector.named_parameters() if p.grad is not None}
        return outputs + list(losses.values()), gradients

    expected, expected_gradients = run(tiny_detector('faster_rcnn'))
    found, gradients = run(tiny_detector('faster_rcnn').to(device))
    assert gradients.keys() == expected_gradients.keys() and len(gradients) > 30
    for ours, value in (
        *zip(found, expected, strict=True),
        *((gradients[name], value) for name, value in expected_gradients.items()),
    ):
        assert_same(ours, value, device)


STAGES = {
    'ptq.calibration': dict(num_images=4, batch_size=2),
    'ptq.weights': dict(bits=3),
    'ptq.head': 'log_affine',
    'ptq.activations': OBSERVE['activations'],
    'ptq.protect': dict(images=2, max_tensors=1, candidates=['8bit']),
    'ptq.reconstruct': dict(iters=4, skip_below=0, rounding='adaround', fisher=0.5, drop=0.5, input_drop=0.5),
    'ptq.global_loss.iters': 2,
    'ptq.global_loss.weight_lr': 1e-2,
}


@pytest.fixture(scope='module')
def finished(device, tmp_path_factory) -> dict[str, PTQRunner]:
    """Runs of all stages up to the integer checkpoint: on the CPU and on the device."""
    return {
        name: run_stages(tmp_path_factory.mktemp(name), place)
        for name, place in (('cpu', torch.device('cpu')), ('device', device))
    }


def run_stages(folder, place: torch.device, resume: bool = False) -> PTQRunner:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mmengine.runner.runner.get_device', lambda: str(place))
        # seconds for each of the others, and for each scale
        patch.setattr('mmdet_ptq.calibration.reconstruction.method.find_units', lambda *args: find_units(*args)[:2])
        patch.setattr('mmdet_ptq.calibration.reconstruction.closed_form.SCALE_FACTORS', (1.0, 0.9))
        torch.manual_seed(0)
        cfg = tiny_config('retinanet', folder)
        cfg.merge_from_dict({**STAGES, 'resume': resume, 'visualizer.name': str(folder)})
        runner = PTQRunner.from_cfg(cfg)
        assert next(runner.model.parameters()).device == place
        runner.calibrate()
    print(runner.stages.seconds)
    return runner


def assert_same_detector(found: nn.Module, expected: nn.Module, device: torch.device) -> None:
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert_same(found.state_dict()[name], value, device)


def test_all_stages_of_a_run(device, finished):
    assert {'prepare', 'observe', 'protect', 'reconstruct', 'global'} <= finished['device'].stages.seconds.keys()
    assert [u['outcome'] for u in finished['device'].units] == [u['outcome'] for u in finished['cpu'].units]
    assert_same_detector(finished['device'].detector, finished['cpu'].detector, device)


def test_a_resumed_run_takes_its_stages_back_to_the_device(device, finished):
    folder = finished['device'].work_dir
    again = run_stages(folder.removesuffix('/work_dir'), device, resume=True)
    assert_same_detector(again.detector, finished['cpu'].detector, device)


def test_an_integer_checkpoint_goes_from_device_to_device(device, finished):
    paths = {name: f'{runner.work_dir}/quantized.pth' for name, runner in finished.items()}
    moved = load_quantized(paths['cpu'], device=device)
    assert_same_detector(moved, load_quantized(paths['device']), device)
    expected, found = predict(load_quantized(paths['device']), tiny_batch(1)), predict(moved, tiny_batch(1))
    assert_same(found[0].pred_instances.bboxes, expected[0].pred_instances.bboxes, device)
