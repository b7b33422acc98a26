"""runtimes.py on a tiny detector."""

import pytest
from benchmark_tools import module

pytestmark = pytest.mark.slow  # the benchmarks are no part of the package


def test_sizes_are_of_all_files_of_a_model(tmp_path, monkeypatch):
    runtimes = module('runtimes')
    for folder in ('openvino', 'openvino/float'):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'model.bin').write_bytes(bytes(100 if 'float' in folder else 25))
        (tmp_path / folder / 'model.xml').write_bytes(bytes(20 if 'float' in folder else 35))
    rows = [
        dict(model=name, metrics={'coco/bbox_mAP': ap}, size_bytes=size, latency_ratio=None)
        for name, ap, size in (('float', 0.5, 110), ('openvino', 0.49, 60))
    ]
    results = dict(
        rows=rows,
        runtimes=dict(openvino=dict(integer=['a'], float=[])),
        recipe=dict(dataflow=None),
        calibration=dict(num_images=3),
        seed=0,
        date='2026-01-01T00:00',
        versions={},
    )
    monkeypatch.setattr(runtimes, 'run_ptq', lambda *args: (['python', 'ptq.py', '--preset', 'w8a8'], results))
    _, line = runtimes.lines_of(tmp_path / 'config.py', 'w8a8', tmp_path, [], [])
    assert (line['bytes'], line['float_bytes'], line['bytes_ratio']) == (60, 120, 0.5)
    assert line['difference_points'] == -1.0
