"""The benchmarks of processors without VNNI, on a tiny detector."""

import csv
import importlib

import pytest

pytestmark = pytest.mark.slow  # the benchmarks are no part of the package


@pytest.fixture
def module():
    """Benchmarks are scripts beside the package: they import each other by their own names."""
    return importlib.import_module


def read(path):
    with path.open(encoding='utf-8') as file:
        return list(csv.DictReader(file))


def test_the_cost_of_the_bound_is_measured(module, config, tmp_path):
    bound, out = module('bound'), tmp_path / 'bound.csv'
    bound.main([str(config), '--draws', '2', '--out', str(out), '--work-dir', str(tmp_path / 'work')])
    (line,) = read(out)
    assert tuple(line) == bound.FIELDS and all(line[name] for name in bound.FIELDS)
    aps = {name: [float(ap) for ap in line[f'{name}_APs'].split()] for name in bound.SETTINGS}
    assert all(len(values) == 2 for values in aps.values())
    means = {name: sum(values) / 2 for name, values in aps.items()}
    assert float(line['difference_points']) == pytest.approx(100 * (means['safe'] - means['ignore']), abs=0.11)
    assert 0 < float(line['wider_channels']) < 1 and float(line['safe_dB']) > 10


def test_models_are_measured_on_other_processors(module, config, tmp_path):
    processors, out = module('processors'), tmp_path / 'processors.csv'
    if processors.cannot_emulate():
        pytest.skip(processors.cannot_emulate())
    processors.main(
        [str(config), '--processors', 'avx2', '--images', '4', '--out', str(out), '--work-dir', str(tmp_path / 'work')]
    )
    lines = read(out)
    assert {(line['saturation'], line['runtime'], line['without_vnni']) for line in lines} == {
        (saturation, runtime, processor)
        for saturation in ('safe', 'ignore')
        for runtime in processors.RUNTIMES
        for processor in ('', 'avx2')
    }
    for line in lines:
        assert (line['marked'] == 'True') >= (line['without_vnni'] == 'avx2' and line['saturation'] == 'ignore')
        if line['saturation'] == 'safe' and line['runtime'] == 'onnxruntime':
            assert float(line['identical_codes']) > 0.999 and line['AP'] == line['simulated_AP']
