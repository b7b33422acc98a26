"""The tables of results: which lines of the ablation they take, and how they show them."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / 'benchmarks'


@pytest.fixture
def tables():
    return importlib.import_module('tables')


def row(detector, recipe, ap, processor='A', seed=0, images=32, seconds=7):
    return dict(
        detector=detector,
        recipe=recipe,
        quantized_AP=str(ap),
        processor=processor,
        seed=str(seed),
        calibration_images=str(images),
        calibration_seconds=str(seconds),
    )


ROWS = [
    row('x', 'w4a4 rounding', 0.1),
    row('x', 'w4a4 qdrop (300 iterations)', 0.2),
    row('y', 'w4a8 ours', 0.5),
    row('y', 'w4a8 ours (100 steps)', 0.4),
    row('x', 'w4a4 ours', 0.25),
    row('x', 'w4a4 ours', 0.3),
    row('x', 'w4a4 ours', 0.9, 'B'),
    row('x', 'w4a4 ours', 0.8, seed=1),
    row('x', 'w4a4 rounding', 0.15, images=8),
    row('x', 'w8a8 qdrop (100 iterations)', 0.6),
]
ROUNDED, QDROP, OURS = (
    'rounded to the nearest, uniform grids',
    'QDrop, 300 iterations a block',
    '**ours**, the preset: the same, filtered',
)


def test_the_last_line_of_a_cell_counts(tables):
    lines = tables.table(ROWS, ['x', 'y'], ['w4a8', 'w4a4'], 'A').splitlines()
    assert lines[0] == '| | x W4A8 | x W4A4 | y W4A8 | y W4A4 |'
    # shortened runs, other processors and other seeds do not
    assert lines[2:] == [
        f'| {ROUNDED} |  | 0.150 |  |  |',
        f'| {QDROP} |  | 0.200 |  |  |',
        f'| {OURS} |  | 0.300 | 0.500 |  |',
    ]


@pytest.mark.parametrize(
    ('choice', 'expected'),
    [
        (dict(seed=1), {OURS: ['', '0.800']}),
        (dict(images=8), {ROUNDED: ['', '0.150']}),
        (
            dict(images=32, processor='A', steps=True, seconds=True),
            {ROUNDED: ['', '0.100 (7)'], QDROP: ['', '0.200 (7)'], OURS: ['0.400 (7)', '0.300 (7)']},
        ),
    ],
)
def test_lines_are_chosen(tables, choice, expected):
    both = [
        tables.table(ROWS, [detector], [width], **choice).splitlines()[2:]
        for detector, width in (('y', 'w4a8'), ('x', 'w4a4'))
    ]
    found = [dict(line.strip('| ').split(' | ') for line in lines) for lines in both]
    assert {label: [column.get(label, '') for column in found] for label in {**found[1], **found[0]}} == expected


def test_iterations_are_those_of_the_columns(tables):
    for bits, counts in ((['w4a4'], '300'), (['w8a8'], '100'), (['w4a4', 'w8a8'], '100 or 300')):
        assert f'| QDrop, {counts} iterations a block |' in tables.table(ROWS, ['x'], bits)


def test_the_command_prints_the_table(tables, tmp_path, capsys):
    path = tmp_path / 'ablation.csv'
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    tables.main([str(path), '--detectors', 'x', '--bits', 'w4a4', '--seed', '1', '--seconds'])
    assert capsys.readouterr().out.splitlines() == ['| | W4A4 |', '|---|---:|', f'| {OURS} | 0.800 (7) |']
