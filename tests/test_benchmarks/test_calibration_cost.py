"""What a calibration costs, on the smallest of the detectors."""

import csv
import importlib

import pytest

pytestmark = pytest.mark.slow  # the benchmarks are no part of the package


def test_time_and_memory_of_a_calibration_are_told_and_taken_again(tmp_path):
    cost, out = importlib.import_module('calibration_cost'), tmp_path / 'cost.csv'
    for images in ('2', '3'):
        cost.main(['--only', 'ssdlite', '--images', images, '--threads', '1', '--out', str(out)])
    with out.open(newline='') as file:
        (line,) = csv.DictReader(file)
    assert tuple(line) == cost.FIELDS and all(line.values()) and line['images'] == '3'
    assert float(line['calibration_seconds_per_image']) > float(line['float_seconds_per_image'])
    assert float(line['calibration_peak_gib']) >= float(line['float_peak_gib'])
