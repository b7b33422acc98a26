"""What docs/extending.md adds from outside works like what is inside: a format, a runtime, a head."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.models import RetinaHead

from mmdet_ptq.calibration import FilteredGlobalLoss
from mmdet_ptq.config import GlobalLossConfig, PTQConfig
from mmdet_ptq.deploy import (
    get_runtime,
    integer_arithmetic,
    load_quantized_state,
    open_model,
    quantized_state,
    read_quantized,
    save_quantized,
    settle_biases,
)
from mmdet_ptq.deploy.network.raw_outputs import RawOutputs
from mmdet_ptq.predictions import AlignedPredictions, align_head, predict_aligned
from mmdet_ptq.quantizers import build_observer, build_quantizer
from mmdet_ptq.registry import OBSERVERS, QUANTIZERS, RUNTIMES, runtime_names
from mmdet_ptq.testing import tiny_batch, tiny_detector, tiny_quantized
from mmdet_ptq.testing.calibrated import OBSERVE
from mmdet_ptq.wrapping import coverage_rows, quantized_weights

PAGE = Path(__file__).resolve().parents[1] / 'docs' / 'extending.md'
FORMAT = dict(type='PowerOfTwoQuantizer', symmetric=True, learn_scale=False)
SHAPE = (1, 3, 64, 64)


@pytest.fixture(autouse=True)
def extended():
    """Runs the page's registrations, and takes them back."""
    blocks = re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.DOTALL)
    for block in blocks:
        if re.search('@(QUANTIZERS|OBSERVERS|RUNTIMES)', block):
            exec(compile(block, str(PAGE), 'exec'), {'__name__': 'my_package'})
    yield
    QUANTIZERS._module_dict.pop('PowerOfTwoQuantizer')
    OBSERVERS._module_dict.pop('ShrunkObserver')
    RUNTIMES._module_dict.pop('reference')


@pytest.fixture
def quantized(extended):
    detector, structure = tiny_quantized(
        'retinanet', {**OBSERVE, 'weights': dict(bits=8, quantizer=FORMAT), 'dataflow': 'full'}
    )
    settle_biases(detector, structure)
    return detector, structure


def outputs(detector):
    image = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), integer_arithmetic(detector):
        return image.numpy(), RawOutputs(detector)(image)


def reloaded(detector, structure, path):
    save_quantized(path, quantized_state(detector, structure, {}, {}, SHAPE))
    twin = tiny_detector('retinanet', seed=3)
    load_quantized_state(twin, read_quantized(path))
    return twin


def test_the_scales_are_powers_of_two():
    weight = torch.randn(4, 9)
    quantizer = build_quantizer(dict(FORMAT, bits=8, num_channels=4, channel_axis=0))
    quantizer.fit_weight(weight)
    assert torch.equal(quantizer.scale.log2(), quantizer.scale.log2().round())
    assert torch.equal(quantizer.decode(quantizer.encode(weight)), quantizer(weight))
    again = build_quantizer(quantizer.spec())
    again.load_state_dict(quantizer.state_dict())
    assert torch.equal(again(weight), quantizer(weight))


def test_the_observer_keeps_part_of_the_range():
    observer = build_observer(dict(type='ShrunkObserver', share=0.5, num_channels=None, channel_axis=1))
    observer.update(torch.tensor([-2.0, 6.0]))
    assert observer.range(8, False) == (-1, 3)


def test_a_format_of_ones_own_survives_checkpoint_export_and_reload(quantized, tmp_path):
    detector, structure = quantized
    kinds = {type(weight.quantizer).__name__ for weight in quantized_weights(detector).values()}
    assert kinds == {'PowerOfTwoQuantizer'}
    twin = reloaded(detector, structure, tmp_path / 'quantized.pth')
    image, expected = outputs(detector)
    for ours, theirs in zip(outputs(twin)[1], expected, strict=True):
        assert torch.equal(ours, theirs)
    model = open_model(get_runtime('onnxruntime').export(twin, tmp_path, SHAPE))
    assert not model.coverage().float
    for ours, theirs in zip(model(image), expected, strict=True):
        assert np.mean(np.isclose(ours, theirs.numpy(), atol=1e-5)) > 0.99


def test_a_subclass_answers_like_its_base(quantized):
    _, structure = quantized
    assert {row.weight for row in coverage_rows(structure)} == {'8-bit affine'}
    spec = next(layer.weight for layer in structure.layers)
    for name, sentence in (('tensorrt', 'TensorRT'), ('ncnn', 'ncnn')):
        told = get_runtime(name).check_formats
        with pytest.raises(Exception, match=f'zero point, which {sentence} does not have'):
            weights = structure.from_dict({**structure.to_dict(), 'activations': {}})
            weights.layers[0].weight = {**spec, 'symmetric': False}
            told(weights)
    assert build_quantizer(spec).spec() == spec


def test_a_runtime_of_ones_own_is_exported_to_and_opened(quantized, tmp_path):
    detector, _ = quantized
    assert 'reference' in runtime_names()
    block = PTQConfig.from_dict(dict(preset='w8a8_observe', export=['reference']))
    assert block.export == ['reference'] and block.dataflow is None
    path = get_runtime('reference').export(detector, tmp_path, SHAPE)
    model = open_model(path)
    image, expected = outputs(detector)
    assert model.name == 'reference' and model.remark() == ''
    for ours, theirs in zip(model(image), expected, strict=True):
        # it adds in float what integer kernels add in integers
        assert np.mean(np.isclose(ours, theirs.numpy(), atol=1e-3)) > 0.98


def test_a_head_of_ones_own_is_paired_box_by_box():
    class OwnHead(RetinaHead):
        def _predict_by_feat_single(self, *args, **kwargs):
            """Decodes in a way of its own."""

    detector = tiny_detector('retinanet')
    detector.bbox_head.__class__ = OwnHead
    data = detector.data_preprocessor(tiny_batch(2), False)
    assert predict_aligned(detector, data['inputs'], data['data_samples']).boxes is None

    @align_head.register(OwnHead)
    def align(head, outputs, metas):
        scores = [level.permute(0, 2, 3, 1).flatten(1, 2) for level in outputs[0]]
        logits = torch.cat(scores, 1)
        boxes = logits.new_tensor([0, 0, 8, 8]).expand(*logits.shape[:2], 4) + logits[..., :1]
        return AlignedPredictions(cls_logits=logits, boxes=boxes, level_sizes=tuple(len(s[0]) for s in scores))

    found = predict_aligned(detector, data['inputs'], data['data_samples'])
    assert found.boxes.shape[-1] == 4 and found.boxes.requires_grad
    terms = FilteredGlobalLoss(GlobalLossConfig(score_thr=0.0))(found, found.detach())
    assert float(terms['loss_box']) == 0 and float(terms['kept']) > 0
