"""Trackers hold a detector: they are told how to quantize it, and track with it as it detects."""

from __future__ import annotations

import copy

import pytest
import torch
from mmdet.models.mot import ByteTrack
from mmdet.structures import TrackDataSample
from torch import nn

from mmdet_ptq import PTQError, cli
from mmdet_ptq.engine.float_checkpoint import load_float_checkpoint
from mmdet_ptq.testing import predict, tiny_batch, tiny_config, tiny_detector, tiny_model_cfg, tiny_quantized
from mmdet_ptq.testing.calibrated import OBSERVE

SPEED = {**OBSERVE, 'dataflow': 'speed'}


class Follower(nn.Module):
    """Takes every object for a new one."""

    def track(self, data_sample, **kwargs):
        return data_sample.pred_instances


@pytest.mark.parametrize('kind', ['ByteTrack', 'QDTrack', 'mmdet.MaskTrackRCNN', 'DeepSORT', 'OCSORT', 'StrongSORT'])
def test_a_tracker_is_told_what_to_quantize_instead(kind, tmp_path, capsys):
    cfg = tiny_config('yolox', tmp_path)
    # before it is built: that needs packages that quantization does not
    cfg.model = dict(type=kind, detector=cfg.model, tracker=dict(type='ByteTracker'))
    cfg.dump(tmp_path / 'tracker.py')
    with pytest.raises(SystemExit) as end:
        cli.ptq([str(tmp_path / 'tracker.py')])
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.count('\n') == 1 and 'Traceback' not in told
    assert f'{kind.split(".")[-1]} follows objects' in told and 'tracker.detector = load_quantized' in told


def test_the_checkpoint_of_a_tracker_fits_its_detector(tmp_path):
    tracker = ByteTrack(detector=tiny_model_cfg('yolox'))
    tracker.detector.load_state_dict(tiny_detector('yolox', 3).state_dict())
    torch.save(dict(state_dict=tracker.state_dict()), tmp_path / 'tracker.pth')
    detector = tiny_detector('yolox')
    load_float_checkpoint(detector, str(tmp_path / 'tracker.pth'))
    expected = tracker.detector.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in detector.state_dict().items())
    with pytest.raises(PTQError, match='does not fit the model'):
        load_float_checkpoint(tiny_detector('ssd'), str(tmp_path / 'tracker.pth'))


@pytest.mark.parametrize('kind', ['yolox', 'faster_rcnn'])
def test_a_tracker_finds_what_its_quantized_detector_finds(kind):
    detector, _ = tiny_quantized(kind, SPEED)
    expected = predict(detector, tiny_batch(1))[0].pred_instances
    tracker = ByteTrack()
    tracker.detector, tracker.tracker = copy.deepcopy(detector), Follower()
    data = detector.data_preprocessor(tiny_batch(1), False)
    # two frames of a video, which are one image twice
    frames = torch.stack([data['inputs']] * 2, 1)
    video = TrackDataSample(video_data_samples=[copy.deepcopy(data['data_samples'][0]) for _ in range(2)])
    with torch.no_grad():
        tracked = tracker(frames, [video], mode='predict')[0]
    assert len(expected)
    for frame in range(2):
        found = tracked[frame].pred_track_instances
        assert torch.equal(found.scores, expected.scores) and torch.equal(found.bboxes, expected.bboxes)


def test_a_part_that_is_called_by_itself_is_refused_where_it_would_compute_otherwise():
    data = tiny_detector('retinanet').data_preprocessor(tiny_batch(1), False)
    detector, _ = tiny_quantized('retinanet', SPEED)
    with pytest.raises(PTQError, match='was called by itself.*`ptq.dataflow`'):
        detector.extract_feat(data['inputs'])
    # layer inputs alone are known wherever a layer is called
    detector, _ = tiny_quantized('retinanet', {**SPEED, 'dataflow': None})
    whole = detector(data['inputs'], mode='tensor')
    by_parts = detector.bbox_head(detector.extract_feat(data['inputs']))
    assert all(torch.equal(a, b) for x, y in zip(whole, by_parts, strict=True) for a, b in zip(x, y, strict=True))
