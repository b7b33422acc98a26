import architectures
import pytest

from mmdet_ptq.calibration.protection.head_branches import BOX, CLASS, OTHER, QUALITY, SHARED, find_places
from mmdet_ptq.predictions import two_stage
from mmdet_ptq.testing import tiny_batch, tiny_quantized


@pytest.mark.parametrize(
    'kind, expected',
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
        ),
        (
            'yolox',
            {
                ('backbone.stem.conv.conv', 0): ('backbone', None, False),
                ('bbox_head.multi_level_reg_convs.0.0.depthwise_conv.conv', 0): (BOX, 0, False),
                ('bbox_head.multi_level_conv_obj.1', 0): (QUALITY, 1, True),
            },
        ),
        (
            'faster_rcnn',
            {
                ('rpn_head.rpn_conv', 1): (f'rpn_head {SHARED}', 1, False),
                ('rpn_head.rpn_cls', 0): (f'rpn_head {CLASS}', 0, True),
                ('roi_head.bbox_head.shared_fcs.0', 0): (f'roi_head {SHARED}', None, False),
                ('roi_head.bbox_head.fc_reg', 0): (f'roi_head {BOX}', None, True),
            },
        ),
    ],
)
def test_places_follow_from_what_depends_on_what(kind, expected):
    detector, structure = tiny_quantized(kind)
    places = find_places(detector, structure, tiny_batch(1))
    found = {call: (places[call].part, places[call].level, places[call].output) for call in expected}
    assert found == expected
    assert set(places) == {(layer.name, call) for layer in structure.layers for call in range(len(layer.inputs))}
    assert detector.ptq.mode == 'quantize'
    assert not any(p.grad is not None for p in detector.parameters())


def test_layers_of_a_head_without_adapter_are_other_ones(monkeypatch):
    architectures.register(monkeypatch)
    monkeypatch.setattr(two_stage, 'roi_problem', lambda roi_head: 'it is not known')
    detector, structure = tiny_quantized('cascade_rcnn')
    places = find_places(detector, structure, tiny_batch(1))
    last = {f'roi_head.bbox_head.{stage}.fc_{kind}' for stage in range(2) for kind in ('cls', 'reg')}
    assert {name for (name, _), place in places.items() if place.part.endswith(OTHER) and place.output} == last
    assert places['rpn_head.rpn_cls', 0].part == f'rpn_head {CLASS}'
