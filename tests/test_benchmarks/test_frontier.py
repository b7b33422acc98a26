"""frontier.py on a tiny detector: lines of every model, and those of other detectors are kept."""

from pathlib import Path

import pytest
from benchmark_tools import module, read

from mmdet_ptq.errors import PTQError

pytestmark = pytest.mark.slow  # the benchmarks are no part of the package


@pytest.fixture
def frontier(config, monkeypatch):
    found = module('frontier')
    monkeypatch.setattr(found, 'config_of', lambda name, zoo: Path(config) if name == 'tiny' else None)
    monkeypatch.setattr(found, 'options_of', lambda config, part: [])
    return found


def arguments(tmp_path, *more):
    options = dict(out=tmp_path / 'out.csv', images=4, rounds=2, threads=1, runtimes='onnxruntime')
    options['work-dir'] = tmp_path / 'work'
    return [text for key, value in options.items() for text in (f'--{key}', str(value))] + list(more)


def test_every_dataflow_and_the_peer_have_a_line_beside_float(frontier, tmp_path, capsys):
    pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
    frontier.write_csv(tmp_path / 'out.csv', [dict(detector='tiny'), dict(detector='other')], frontier.FIELDS)
    frontier.main(arguments(tmp_path, '--detectors', 'tiny'))
    other, *lines = read(tmp_path / 'out.csv')
    assert other['detector'] == 'other' and {line['detector'] for line in lines} == {'tiny'}
    assert [line['model'] for line in lines] == ['float', 'quantize_static', 'balanced', 'accuracy', 'speed']
    by_name = {line['model']: line for line in lines}
    assert by_name['float']['ratio'] == '1.0' and by_name['quantize_static']['peer_ratio'] == '1.0'
    for line in lines[1:]:
        assert float(line['fastest_ms']) <= float(line['median_ms'])
        assert float(line['ratio']) == pytest.approx(
            float(by_name['float']['fastest_ms']) / float(line['fastest_ms']), rel=0.1, abs=0.01
        )
        assert float(line['calibration_cpu_seconds']) > 0
        assert float(line['drop_points']) == pytest.approx(
            100 * (float(by_name['float']['AP']) - float(line['AP'])), abs=0.06
        )
        assert line['integer_convolutions'] == line['convolutions'] != '0'
        assert '--detectors tiny' in line['command'] and str(tmp_path) not in line['command']
    rows = capsys.readouterr().out.strip().splitlines()[-5:]
    assert [row.split(' | ')[2] for row in rows] == list(by_name)
    points, ratio = -float(lines[1]['drop_points']) or 0.0, float(lines[1]['ratio'])
    assert rows[1].endswith(f'{points:+.1f} | {ratio:.2f} (1.00) |')
    # times alone are measured again
    frontier.main(arguments(tmp_path, '--detectors', 'tiny', '--resume'))
    again = read(tmp_path / 'out.csv')[1:]
    same = [name for name in frontier.FIELDS if not name.endswith(('ms', 'ratio')) and name != 'load']
    assert [[line[name] for name in same] for line in again] == [[line[name] for name in same] for line in lines]


def test_a_peer_that_is_missing_is_a_line_that_says_so(frontier, tmp_path, monkeypatch):
    pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")

    def missing(*args):
        raise PTQError('the package is not installed')

    monkeypatch.setattr(frontier, 'PEERS', dict(onnxruntime=('quantize_static', missing)))
    monkeypatch.setattr(frontier, 'DATAFLOWS', dict(onnxruntime=('speed',)))
    frontier.main(arguments(tmp_path, '--detectors', 'tiny', '--no-evaluation'))
    lines = read(tmp_path / 'out.csv')
    assert [(line['model'], line['note']) for line in lines] == [
        ('float', ''),
        ('speed', ''),
        ('quantize_static', 'skipped: the package is not installed'),
    ]
    assert not any(line['AP'] or line['peer_ratio'] for line in lines)


def test_an_unknown_detector_is_refused(frontier, tmp_path):
    with pytest.raises(PTQError, match="no config of 'large'"):
        frontier.main(arguments(tmp_path, '--detectors', 'large'))
