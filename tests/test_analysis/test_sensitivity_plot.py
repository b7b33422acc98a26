"""Bars of sensitivities are as long as losses, the worst on top, and their figures stand beside them."""

from __future__ import annotations

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from mmdet_ptq.analysis import pictures, sensitivity_plot
from mmdet_ptq.analysis.sensitivity_plot import finding, sensitivity_picture
from mmdet_ptq.calibration.protection.damage import Damage
from mmdet_ptq.calibration.protection.sensitivity import GroupSensitivity, Sensitivities, TensorSensitivity


def tensor(layer: str, loss: float, kind: str = 'activation', part: str = 'backbone', **damage) -> TensorSensitivity:
    return TensorSensitivity(kind, layer.replace('.', '/'), (layer,), part, None, False, 8, Damage(loss, **damage))


@pytest.fixture
def found() -> Sensitivities:
    tensors = [
        tensor('backbone.a', 0.8, iou_loss=0.25, score_change=0.5),
        tensor('neck.b', 0.2, 'weight', 'neck'),
        tensor('backbone.c', 0.0004, 'weight', iou_loss=0.0012),
        tensor('head.d', 0.0, part='class branch'),
    ]
    groups = [GroupSensitivity('backbone', 2, Damage(0.81)), GroupSensitivity('level 1', 1, Damage(0.0))]
    return Sensitivities(16, Damage(0.9, 0.3, 0.6), groups, tensors)


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures, before they become files."""
    figures, write = [], pictures.file_of
    monkeypatch.setattr(pictures, 'DPI', 20)
    monkeypatch.setattr(
        sensitivity_plot, 'file_of', lambda figure, *args: (figures.append(figure), write(figure, *args))[1]
    )
    return figures


def labels(axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def rows(axes) -> list[list[str]]:
    """The figures beside the bars, row by row, in the order of the columns."""
    places: dict[float, list] = {}
    for text in axes.texts:
        if text.get_text() not in ('loss', '1 - IoU', 'scores'):
            x, y = text.get_position()
            places.setdefault(y, []).append((x, text.get_text()))
    return [[text for _, text in sorted(places[y])] for y in sorted(places)]


def test_bars_are_losses_on_one_scale_the_first_on_top(found, drawn):
    assert sensitivity_picture(found).startswith(b'\x89PNG')
    above, below = drawn[0].axes
    assert labels(above) == ['everything', 'backbone', 'level 1']
    assert [bar.get_width() for bar in above.patches] == [0.9, 0.81, 0.0]
    assert labels(below) == ['input of backbone.a', 'weight of neck.b', 'weight of backbone.c', 'input of head.d']
    assert [bar.get_width() for bar in below.patches] == [0.8, 0.2, 0.0004, 0.0]
    assert above.get_xlim() == below.get_xlim()
    for axes in (above, below):
        bottom, top = axes.get_ylim()
        assert bottom > top
    assert '16 calibration images' in below.get_xlabel()


def test_figures_stand_beside_their_bars(found, drawn):
    sensitivity_picture(found)
    above, below = drawn[0].axes
    assert rows(above) == [['0.9', '30.0 %', '60.0 %'], ['0.81', '-', '-'], ['0', '-', '-']]
    assert rows(below) == [['0.8', '25.0 %', '50.0 %'], ['0.2', '-', '-'], ['< 0.001', '0.1 %', '-'], ['0', '-', '-']]


def test_weights_are_hatched_and_parts_have_one_colour_above_and_below(found, drawn):
    sensitivity_picture(found)
    above, below = drawn[0].axes
    assert [bool(bar.get_hatch()) for bar in below.patches] == [False, True, True, False]
    colours = [to_hex(bar.get_facecolor()) for bar in below.patches]
    assert colours[0] == colours[2] and len(set(colours)) == 3
    everything, backbone, level = (to_hex(bar.get_facecolor()) for bar in above.patches)
    assert backbone == colours[0] and everything == level and everything not in colours
    (legend,) = drawn[0].legends
    told = {
        text.get_text(): to_hex(h.get_facecolor()) for text, h in zip(legend.texts, legend.legend_handles, strict=True)
    }
    assert {part: told[part] for part in ('backbone', 'neck')} == {'backbone': colours[0], 'neck': colours[1]}
    assert {'activation', 'weight'} <= told.keys()


def test_colours_of_parts_stay_where_fewer_tensors_are_shown(found, drawn):
    sensitivity_picture(found)
    sensitivity_picture(found, top=1)
    few = drawn[1].axes[1]
    assert 'The 1 most sensitive of 4 tensors' in few.get_title(loc='left') + few.get_title()
    assert len(few.patches) == 1
    assert few.patches[0].get_facecolor() == drawn[0].axes[1].patches[0].get_facecolor()
    # a part of which nothing is shown is not explained
    shown = {text.get_text() for text in drawn[1].legends[0].texts}
    assert shown == {'backbone', 'activation', 'weight'}


def test_a_long_name_keeps_its_end(found, drawn):
    name = '.'.join(['backbone', *(f'stage{i}' for i in range(12)), 'conv'])
    found.tensors[0] = tensor(name, 0.8)
    sensitivity_picture(found)
    told = labels(drawn[0].axes[1])[0]
    assert told.startswith('input of … stage') and told.endswith('.stage11.conv') and len(told) < len(name)
    assert drawn[0].get_suptitle().startswith(f'Most sensitive: {told}, loss 0.8')


@pytest.mark.parametrize(
    'loss, total, told',
    [
        (0.0, 0.0, 'Quantization leaves the detections unchanged'),
        (0.0, 0.5, 'Quantization leaves the detections unchanged'),
        (0.25, 0.0, 'Most sensitive: input of head.d, loss 0.25'),
        (1234.5, 20000.0, 'Most sensitive: input of head.d, loss 1.23e+03 of 2e+04 with everything quantized'),
    ],
)
def test_the_finding(loss, total, told):
    assert finding(Sensitivities(4, Damage(total), [], [tensor('head.d', loss)])) == told


def test_one_tensor_and_no_group(drawn):
    sensitivity_picture(Sensitivities(1, Damage(0.0), [], [tensor('head.d', 0.0)]))
    above, below = drawn[0].axes
    assert labels(above) == ['everything'] and labels(below) == ['input of head.d']
