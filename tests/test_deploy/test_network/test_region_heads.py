"""Networks between mmdet's own pooling and the heads (GRoIE), and behind the masks (PointRend)."""

from __future__ import annotations

import architectures
import numpy as np
import pytest
import torch
from mmdet.models.roi_heads.roi_extractors import GenericRoIExtractor

from mmdet_ptq.deploy import get_runtime, open_model, settle_biases, with_runtime
from mmdet_ptq.deploy.integers.arithmetic import integer_arithmetic
from mmdet_ptq.deploy.network.parts import Part, parts_of, region_inputs
from mmdet_ptq.deploy.network.raw_outputs import RawOutputs
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import predict, tiny_batch, tiny_detector, tiny_quantized
from mmdet_ptq.testing.calibrated import OBSERVE
from mmdet_ptq.wrapping.state import only_read_tensors

pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
pytest.importorskip('onnxscript', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
GIVEN = dict(onnxruntime=integer_arithmetic, openvino=only_read_tensors)
EXTRACTORS = ['roi_head.bbox_roi_extractor', 'roi_head.mask_roi_extractor']
POINTS = ['roi_head.point_head', 'roi_head.point_head#1']


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    architectures.register(monkeypatch)


@torch.no_grad()
def check_in_a_runtime(runtime, kind, wanted, tmp_path):
    """Exports a detector; the networks wanted and its predictions are the simulation's, with integers in them."""
    pytest.importorskip(runtime)
    detector, structure = tiny_quantized(kind, dict(OBSERVE, dataflow='balanced'))
    settle_biases(detector, structure)
    image = detector.data_preprocessor(tiny_batch(1, seed=3), False)['inputs']
    model = open_model(get_runtime(runtime).export(detector, tmp_path, tuple(image.shape)), threads=1)
    assert set(wanted) <= set(model.parts)
    integer = model.whole_coverage().integer
    assert all(any(name.startswith(part.partition('#')[0]) for name in integer) for part in wanted)
    batch = tiny_batch(2, seed=4)
    with GIVEN[runtime](detector):
        for part in [part for part in parts_of(detector, image) if part.name in wanted]:
            found = model.parts[part.name](*(x.numpy() for x in part.inputs))
            for ours, theirs in zip(RawOutputs(detector, part)(*part.inputs), found, strict=True):
                # a code on a boundary may fall to either side
                assert np.abs(ours.numpy() - theirs).mean() <= 0.01 * ours.std()
        expected = predict(detector, batch)
    around = with_runtime(tiny_detector(kind, seed=5), model)
    for ours, theirs in zip(expected, predict(around, batch), strict=True):
        ours, theirs = ours.pred_instances, theirs.pred_instances
        if runtime == 'openvino':  # of the network before these, single codes fall to the other side: regions move
            assert len(theirs) > 0 and theirs.masks.any()
            continue
        assert len(ours) == len(theirs) > 0
        torch.testing.assert_close(theirs.scores, ours.scores, atol=2e-2, rtol=0)
        assert (ours.masks == theirs.masks).float().mean() > 0.95
    return around


@pytest.mark.thorough
@pytest.mark.parametrize('runtime', ['onnxruntime', 'openvino'])
def test_the_layers_of_an_extractor_are_a_network_behind_the_pooling(runtime, tmp_path):
    around = check_in_a_runtime(runtime, 'groie', EXTRACTORS, tmp_path)
    around.test_cfg.rpn.min_bbox_size = 10**4
    assert all(len(sample.pred_instances) == 0 for sample in predict(around, tiny_batch(2)))


@torch.no_grad()
def test_an_extractor_reads_what_was_pooled_of_each_level():
    detector = tiny_detector('groie')
    image = detector.data_preprocessor(tiny_batch(1, seed=3), False)['inputs']
    extractor, seen = detector.roi_head.bbox_roi_extractor, []
    extractor.register_forward_hook(lambda module, args, output: seen.append(output))
    part = next(part for part in parts_of(detector, image) if part.name == EXTRACTORS[0])
    assert len(part.inputs) == 2 and part.any_number and part.inputs[0].shape[1:] == (16, 5, 5)
    torch.testing.assert_close(part.run(detector, *part.inputs), seen[0], rtol=0, atol=0)
    # a factor by which regions grow is mmdet's own, too
    rois, factor = torch.tensor([[0, 4.0, 4.0, 30.0, 40.0]]), dict(roi_scale_factor=1.5)
    features = detector.extract_feat(image)[:2]
    part = Part(EXTRACTORS[0], *region_inputs(extractor, (features, rois), factor))
    assert part.constants == [1.5]
    torch.testing.assert_close(part.run(detector, *part.inputs), extractor(features, rois, **factor), rtol=0, atol=0)


def test_an_extractor_of_its_own_kind_is_refused():
    class Own(GenericRoIExtractor):
        def forward(self, feats, rois, roi_scale_factor=None):
            return super().forward(feats, rois, roi_scale_factor)

    detector = tiny_detector('groie')
    detector.roi_head.bbox_roi_extractor.__class__ = Own
    with pytest.raises(PTQError, match=r'roi_head\.bbox_roi_extractor reads regions in a way of its own'):
        parts_of(detector, torch.zeros(1, 3, 64, 64))


@pytest.mark.thorough
@pytest.mark.parametrize('runtime', ['onnxruntime', 'openvino'])
def test_every_step_that_refines_masks_by_points_is_a_network(runtime, tmp_path):
    check_in_a_runtime(runtime, 'point_rend', POINTS, tmp_path)
