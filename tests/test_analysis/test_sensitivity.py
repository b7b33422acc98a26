import io
import json

import pytest
from mmengine.config import Config
from PIL import Image
from rich.console import Console

from mmdet_ptq.analysis.sensitivity import config_lines, print_sensitivity, write_sensitivity
from mmdet_ptq.analysis.sensitivity_plot import finding, sensitivity_picture
from mmdet_ptq.calibration.protection.damage import Damage
from mmdet_ptq.calibration.protection.protect import Choice, Protection
from mmdet_ptq.calibration.protection.sensitivity import GroupSensitivity, Sensitivities, TensorSensitivity
from mmdet_ptq.config import PTQConfig

OVERRIDES = {
    'backbone.conv': dict(activations=dict(depthwise_per_channel=True)),
    'head.reg': dict(weights=dict(bits=8)),
}


@pytest.fixture
def sensitivities():
    tensors = [
        TensorSensitivity(
            'activation', 'backbone/conv', ('backbone.conv',), 'backbone', None, False, 8, Damage(0.8, 0.25, 0.5, 0.03)
        ),
        TensorSensitivity('weight', 'head.reg', ('head.reg',), 'box branch', 1, True, 4, Damage(0.1, 0.02, None, 0.01)),
        TensorSensitivity('activation', 'head/reg#1', ('head.reg',), 'box branch', 1, True, 8, Damage(0.0)),
    ]
    groups = [GroupSensitivity('backbone', 1, Damage(0.8, 0.25, 0.5)), GroupSensitivity('level 1', 2, Damage(0.1))]
    return Sensitivities(16, Damage(0.9, 0.3, 0.6), groups, tensors)


@pytest.fixture
def protection():
    choice = Choice(
        'input of backbone.conv',
        'activation',
        ('backbone.conv',),
        '8-bit affine',
        '8-bit per channel',
        0.8,
        0.01,
        128,
        0,
        0,
    )
    return Protection(OVERRIDES, [choice], Damage(0.9), Damage(0.1), 1000, 2000)


def test_tables_name_tensors_parts_and_figures(sensitivities, protection):
    console = Console(file=io.StringIO(), width=200)
    print_sensitivity(sensitivities, protection, console)
    text = console.file.getvalue()
    for words in (
        'input of backbone.conv',
        'weight of head.reg',
        'input of head.reg (call 1)',
        'level 1',
        '25.0 %',
        '8-bit per channel',
        '+128 B',
        'everything',
        '(16 calibration images)',
    ):
        assert words in ' '.join(text.split()), words
    assert config_lines(OVERRIDES) in text


def test_without_overrides_it_says_so(sensitivities):
    console = Console(file=io.StringIO(), width=200)
    print_sensitivity(sensitivities, Protection({}, [], Damage(0.9), Damage(0.9), 1, 1), console)
    assert 'needs no overrides' in console.file.getvalue() and 'Paste' not in console.file.getvalue()


def test_the_lines_to_paste_belong_into_the_block(tmp_path):
    path = tmp_path / 'pasted.py'
    overrides = {**OVERRIDES, 'neck.conv': dict(activations=dict(bits=16))}
    path.write_text(f'ptq = dict(\n    preset="w4a8",\n{config_lines(overrides)}\n)')
    block = PTQConfig.from_dict(Config.fromfile(path).ptq)
    assert block.overrides == overrides and block.weights.bits == 4
    told = [line for line in config_lines(overrides).splitlines() if 'in float' in line]
    assert len(told) == 1 and 'neck.conv' in told[0] and told[0].endswith('# runtimes compute this layer in float')


@pytest.mark.parametrize('terminal, width', [(True, 80), (True, 200), (False, 80)])
def test_no_name_is_broken(sensitivities, protection, terminal, width):
    layer = 'backbone.layer2.0.linear_convolution.depthwise_convolution.conv'
    sensitivities.tensors[0].layers = (layer,)
    protection.choices[0].tensor = f'input of {layer}'
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    print_sensitivity(sensitivities, protection, console)
    text = console.file.getvalue()
    assert text.count(f'input of {layer}') == 2 and text.count('box branch') == 2
    assert '…' not in text and '25.0 %' in text
    shown = text.partition('Paste')[0].splitlines()
    # a terminal that is wide enough shows tables, one that is not no line that it would have to break itself
    assert max(map(len, shown)) <= width or not terminal
    assert any('┃ part' in line for line in shown)
    assert ('score change 50.0 %' in text) == (terminal and width == 80)


def test_files_are_written(sensitivities, protection, tmp_path):
    write_sensitivity(tmp_path, sensitivities, protection)
    written = json.loads((tmp_path / 'sensitivity.json').read_text())
    assert written['schema'] == 1 and written['tensors'][0]['layers'] == ['backbone.conv']
    assert written['protection']['overrides'] == OVERRIDES
    with Image.open(tmp_path / 'sensitivity.png') as picture:
        assert min(picture.size) > 300


def test_the_picture_grows_with_its_rows_and_names_the_worst(sensitivities):
    heights = []
    for count in (1, 3):
        with Image.open(io.BytesIO(sensitivity_picture(sensitivities, top=count))) as picture:
            heights.append(picture.height)
    assert heights[1] > heights[0] + 40
    assert finding(sensitivities) == 'Most sensitive: input of backbone.conv, loss 0.8 of 0.9 with everything quantized'
