"""What the pictures show: bars, boxes, points and titles, read from the figures and from the files."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from mmdet_ptq.analysis import pictures
from mmdet_ptq.analysis.detected.detections import DetectionPair, Detections
from mmdet_ptq.analysis.drift import LayerError, ScoreDrift
from mmdet_ptq.analysis.weight_grids import WeightGrid


@pytest.fixture
def drawn(monkeypatch):
    """Pictures as figures, before they become files; those are drawn all the same."""
    write = pictures.file_of
    monkeypatch.setattr(pictures, 'DPI', 30)

    def keep(figure: Figure, kind: str = 'png') -> Figure:
        with Image.open(io.BytesIO(write(figure, kind))) as picture:
            assert picture.format == kind.upper() and min(picture.size) > 10
        return figure

    monkeypatch.setattr(pictures, 'file_of', keep)


def detections(*entries: tuple) -> Detections:
    """Of (box, score, label)."""
    boxes = np.array([box for box, _, _ in entries], np.float32).reshape(-1, 4)
    scores, labels = (np.array([entry[i] for entry in entries], kind) for i, kind in ((1, np.float32), (2, np.int64)))
    return Detections(boxes, scores, labels)


def pair(before: Detections, after: Detections, size=(40, 80)) -> DetectionPair:
    return DetectionPair(np.full((*size, 3), 128, np.uint8), before, after)


CAT, DOG = (5, 20, 25, 38), (40, 12, 70, 30)
NONE = detections()


def grid(layer='a', weights=(-0.5, 0.0, 0.5), levels=(-1.0, 0.0, 1.0), step=1) -> WeightGrid:
    return WeightGrid(layer, '2-bit affine', 12.4, np.array(weights, np.float32), np.array(levels, np.float32), step)


# ------------------------------------------------------------------ detections


def test_detections_are_drawn_where_they_are_and_dashed_without_a_partner(drawn):
    before = detections((CAT, 0.9, 0), (DOG, 0.8, 1), ((0, 0, 4, 4), 0.29, 0))
    after = detections(((6, 20, 26, 38), 0.7, 0), (DOG, 0.6, 5))
    figure = pictures.detections_picture(
        pair(before, after), ['cat', 'dog'], {0: '#112233', 1: '#445566', 5: '#778899'}
    )
    left, right = figure.axes
    assert left.get_title(loc='left') == 'float: 2 objects, 1 without a partner'
    assert right.get_title(loc='left') == 'quantized: 2 objects, 1 without a partner'
    boxes = [[patch.get_bbox().extents.tolist() for patch in ax.patches] for ax in (left, right)]
    assert boxes == [[[*CAT], [*DOG]], [[6, 20, 26, 38], [*DOG]]]
    assert [text.get_text() for text in left.texts] == ['cat 0.90', 'dog 0.80']
    # names are too few for the last class
    assert [text.get_text() for text in right.texts] == ['cat 0.70', 'class 5 0.60']
    assert [to_hex(patch.get_edgecolor()) for patch in right.patches] == ['#112233', '#778899']
    assert [
        [patch.get_linestyle() == '-' or patch.get_linestyle() == 'solid' for patch in ax.patches]
        for ax in (left, right)
    ] == [[True, False], [True, False]]


def test_text_of_a_box_at_the_border_stays_in_the_picture(drawn):
    """Above the box where there is room; inside it where there is none."""
    found = detections(((-3, -2, 20, 30), 0.9, 0), ((10, 20, 30, 38), 0.8, 0))
    figure = pictures.detections_picture(pair(found, NONE), ['cat'], {0: '#112233'})
    top, below = figure.axes[0].texts
    assert top.get_va() == 'top' and below.get_va() == 'bottom'
    x, y = top.get_position()
    assert x == 0 and y >= min(figure.axes[0].get_ylim())
    assert below.get_position() == (10, 20)


@pytest.mark.parametrize('size', [(1, 1), (300, 10), (8, 400)])
def test_images_of_any_shape_are_drawn_without_detections(drawn, size):
    figure = pictures.detections_picture(pair(NONE, NONE, size), [], {})
    assert [ax.get_title(loc='left') for ax in figure.axes] == ['float: 0 objects', 'quantized: 0 objects']
    assert figure.get_figheight() <= 9.4


def test_colours_are_of_the_seen_classes_most_common_first_and_repeat_after_eight():
    box = (0, 0, 9, 9)
    first = pair(
        detections(*((box, 0.9, label) for label in (7, 7, 7, 2, 2))), detections((box, 0.29, 9), (box, 0.3, 4))
    )
    assert pictures.class_colours([first]) == dict(zip((7, 2, 4), pictures.PALETTE, strict=False))
    many = pair(detections(*((box, 0.5, label) for label in range(10))), NONE)
    colours = pictures.class_colours([many])
    assert list(colours) == list(range(10)) and colours[8] == colours[0] and colours[9] == colours[1]
    assert len(set(colours.values())) == 8
    assert pictures.class_colours([]) == {}


@pytest.mark.parametrize(
    'before, after, told',
    [
        ([(CAT, 0.9, 0)], [(CAT, 0.5, 0)], "finds 1 of the float detector's 1 object again and 0 others (score 0.3"),
        (
            [(CAT, 0.9, 0), (DOG, 0.9, 1)],
            [(CAT, 0.5, 1)],
            "finds 0 of the float detector's 2 objects again and 1 other ",
        ),
        ([], [(CAT, 0.9, 0), (DOG, 0.9, 0)], "finds 0 of the float detector's 0 objects again and 2 others"),
        ([(CAT, 0.29, 0)], [(CAT, 0.1, 0)], 'Neither detector sees an object with a score of 0.3 or more.'),
    ],
)
def test_the_finding_counts_partners(before, after, told):
    # an image without anything changes nothing
    pairs = [pair(detections(*before), detections(*after)), pair(NONE, NONE)]
    assert told in pictures.detections_finding(pairs)


# ------------------------------------------------------------------ weights


@pytest.mark.parametrize('count, shape', [(1, (1, 1)), (2, (1, 2)), (3, (1, 3)), (5, (2, 3))])
def test_weights_have_a_panel_each_and_no_empty_one(drawn, count, shape):
    figure = pictures.weights_picture([grid(f'layer{i}') for i in range(count)])
    assert len(figure.axes) == shape[0] * shape[1]
    assert [ax.get_title(loc='left').partition('\n')[0] for ax in figure.axes if ax.axison] == [
        f'layer{i}' for i in range(count)
    ]


def test_a_histogram_holds_all_weights_and_the_levels(drawn):
    weights = np.concatenate([np.full(30, -0.25), np.full(60, 0.25), np.full(10, 50.0)])
    figure = pictures.weights_picture([grid(weights=weights, levels=(-1, 0, 1.0), step=4)])
    (ax,) = figure.axes
    assert ax.get_title(loc='left') == 'a\n2-bit affine: 12 dB, 1 value in 4'
    assert ax.get_xlim() == (-3, 3)  # what lies farther outside is counted at the border
    values, edges, _ = ax.patches[0].get_data()
    shares = {float(edges[i + 1]): float(values[i]) for i in values.argsort()[-3:]}
    assert sorted(shares.values()) == pytest.approx([0.1, 0.3, 0.6])
    assert shares[3.0] == pytest.approx(0.1)
    assert [segment[0, 0] for segment in ax.collections[0].get_segments()] == [-1, 0, 1]


def test_weights_that_are_all_zero_or_one_are_drawn(drawn):
    figure = pictures.weights_picture([grid(weights=np.zeros(5), levels=(0.0,)), grid(weights=np.ones(1))])
    assert all(ax.get_xlim() == (-1.05, 1.05) for ax in figure.axes)


# ------------------------------------------------------------------ layers and scores


def errors(*decibels: float) -> list[LayerError]:
    return [LayerError(f'part{i % 2}.layer{i}', f'part{i % 2}', value, None) for i, value in enumerate(decibels)]


def test_the_three_noisiest_layers_are_numbered_in_picture_and_sentence(drawn):
    found = errors(20.0, -5.0, math.inf, 3.04, 30.0, 12.0)
    assert pictures.errors_finding(found) == (
        'Noisiest: (1) part1.layer1, -5.0 dB; (2) part1.layer3, 3.0 dB; (3) part1.layer5, 12.0 dB.'
    )
    (ax,) = pictures.errors_picture(found).axes
    # what did not change stands as high as the best of the others
    assert [bar.get_height() for bar in ax.patches] == [20, -5, 30, 3.04, 30, 12]
    assert {text.get_text(): text.xy for text in ax.texts} == {'1': (1, 0), '2': (3, 3.04), '3': (5, 12)}
    colours = [to_hex(bar.get_facecolor()) for bar in ax.patches]
    assert colours[0] == colours[2] == colours[4] != colours[1] == colours[3] == colours[5]
    low, high = ax.get_ylim()
    assert low == -5 and high > 30


@pytest.mark.parametrize('decibels, heights', [([math.inf], [60]), ([math.inf, math.inf], [60, 60]), ([-3.0], [-3])])
def test_few_layers_and_perfect_ones(drawn, decibels, heights):
    (ax,) = pictures.errors_picture(errors(*decibels)).axes
    assert [bar.get_height() for bar in ax.patches] == heights and len(ax.texts) == len(heights)
    assert pictures.errors_finding(errors(*decibels)).count('dB') == len(heights)


def test_drift_is_told_in_numbers(drawn):
    drift = ScoreDrift(torch.tensor([0.2, 0.8, 0.5]), torch.tensor([0.3, 0.6, 0.5]), torch.tensor([1.0, 0.9, 0.4]))
    scores, overlap = pictures.drift_picture(drift).axes
    assert scores.get_title(loc='left') == '3 boxes: confidence moves by 0.100 (signed: -0.033)'
    points = scores.collections[0].get_offsets()
    np.testing.assert_allclose(points, [[0.2, 0.3], [0.8, 0.6], [0.5, 0.5]], atol=1e-6)
    assert overlap.get_title(loc='left') == '67 % of the boxes keep an IoU of 0.9 or more'
    shares = overlap.patches[0].get_data().values
    assert shares.sum() == pytest.approx(100) and shares.max() == pytest.approx(100 / 3)


def test_heads_without_boxes_have_scores_alone(drawn):
    drift = ScoreDrift(torch.tensor([0.25]), torch.tensor([0.75]))
    (scores,) = pictures.drift_picture(drift).axes
    assert scores.get_title(loc='left') == '1 box: confidence moves by 0.500 (signed: +0.500)'


# ------------------------------------------------------------------ names and files


@pytest.mark.parametrize(
    'name, length, short',
    [
        ('a.b.c', 5, 'a.b.c'),
        ('aa.bb.cc', 7, '… bb.cc'),
        ('aa.bb.cc', 6, '… cc'),
        ('backbone.layer2.0.conv', 16, '… layer2.0.conv'),
        ('backbone', 6, '… bone'),
        ('a.backbone', 9, '… ackbone'),
        ('', 3, ''),
    ],
)
def test_names_lose_their_first_components(name, length, short):
    assert pictures.shorten(name, length) == short and len(short) <= length


@pytest.mark.parametrize('kind', ['png', 'jpeg'])
def test_files_are_as_large_as_the_figure(kind):
    figure = Figure(figsize=(2, 1))
    figure.subplots().set_axis_off()
    figure.text(0, 0, '.')
    figure.text(1, 1, '.')
    with Image.open(io.BytesIO(pictures.file_of(figure, kind))) as picture:
        assert picture.format == kind.upper()
        assert picture.width == pytest.approx(2 * pictures.DPI, rel=0.15)
