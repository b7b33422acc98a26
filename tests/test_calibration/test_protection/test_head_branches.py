import architectures
import pytest

from mmdet_ptq.calibration.protection import head_branches as branches
from mmdet_ptq.calibration.protection.head_branches import (
    BOX,
    CLASS,
    OTHER,
    QUALITY,
    SHARED,
    Place,
    find_places,
    score_layers,
)
from mmdet_ptq.testing import tiny_batch, tiny_quantized


@pytest.mark.parametrize(
    'kind, expected, scores',
    [
        (
            'retinanet',
            {
                ('backbone.layer1.0.conv1', 0): ('backbone', None, False),
                ('neck.fpn_convs.1.conv', 0): ('neck', 1, False),
                ('bbox_head.cls_convs.0.conv', 2): (CLASS, 2, False),
                ('bbox_head.retina_cls', 0): (CLASS, 0, True),
                ('bbox_head.retina_reg', 1): (BOX, 1, True),
            },
            ['bbox_head.retina_cls'],
        ),
        (
            'yolox',
            {
                ('backbone.stem.conv.conv', 0): ('backbone', None, False),
                ('bbox_head.multi_level_reg_convs.0.0.depthwise_conv.conv', 0): (BOX, 0, False),
                ('bbox_head.multi_level_conv_obj.1', 0): (QUALITY, 1, True),
            },
            [f'bbox_head.multi_level_conv_{kind}.{level}' for kind in ('cls', 'obj') for level in range(2)],
        ),
        (
            'faster_rcnn',
            {
                ('rpn_head.rpn_conv', 1): (f'rpn_head {SHARED}', 1, False),
                ('rpn_head.rpn_cls', 0): (f'rpn_head {CLASS}', 0, True),
                ('roi_head.bbox_head.shared_fcs.0', 0): (f'roi_head {SHARED}', None, False),
                ('roi_head.bbox_head.fc_reg', 0): (f'roi_head {BOX}', None, True),
            },
            ['rpn_head.rpn_cls', 'roi_head.bbox_head.fc_cls'],
        ),
    ],
)
def test_places_follow_from_what_depends_on_what(kind, expected, scores):
    detector, structure = tiny_quantized(kind)
    places = find_places(detector, structure, tiny_batch(1))
    found = {call: (places[call].part, places[call].level, places[call].output) for call in expected}
    assert found == expected
    assert sorted(score_layers(detector, structure, tiny_batch(1))) == sorted(scores)
    assert set(places) == {(layer.name, call) for layer in structure.layers for call in range(len(layer.inputs))}
    assert detector.ptq.mode == 'quantize'
    assert not any(p.grad is not None for p in detector.parameters())


def test_last_layers_that_may_write_scores_are_named(monkeypatch):
    architectures.register(monkeypatch)
    lines = []
    monkeypatch.setattr(branches, 'print_log', lambda text, *_: lines.append(text))
    detector, structure = tiny_quantized('cascade_rcnn')
    # the RoI head has no adapter, so what its layers write is not told
    unknown = [f'roi_head.bbox_head.{stage}.fc_{kind}' for stage in range(2) for kind in ('cls', 'reg')]
    assert score_layers(detector, structure, tiny_batch(1)) == ['rpn_head.rpn_cls', *unknown]
    assert lines == [
        'whether these layers write class scores is not known, so their biases are not corrected: ' + ', '.join(unknown)
    ]


def test_one_call_that_is_known_tells_what_a_layer_writes(monkeypatch):
    detector, structure = tiny_quantized('retinanet')
    places = {
        ('bbox_head.reg', 0): Place(OTHER, None, True),
        ('bbox_head.reg', 1): Place(BOX, 0, True),
        ('bbox_head.cls', 0): Place(OTHER, None, True),
        ('bbox_head.cls', 1): Place(CLASS, 0, True),
        ('bbox_head.conv', 0): Place(SHARED),
        ('neck.conv', 0): Place('neck', None, True),
    }
    monkeypatch.setattr(branches, 'find_places', lambda *_: places)
    assert score_layers(detector, structure, tiny_batch(1)) == ['bbox_head.cls']
