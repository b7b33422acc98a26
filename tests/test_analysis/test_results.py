import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdet_ptq.analysis import read_results, versions, write_results
from mmdet_ptq.doctor import processor
from mmdet_ptq.errors import PTQError


def test_round_trip(tmp_path, results):
    path = tmp_path / 'new' / 'results.json'
    write_results(path, results)
    assert read_results(path) == results
    assert read_results(path)['rows'][1]['metrics']['coco/bbox_mAP'] == 0.4


def test_schema(results):
    assert list(results) == [
        'schema',
        'config',
        'recipe',
        'seed',
        'versions',
        'date',
        'calibration',
        'coverage',
        'stages',
        'rows',
    ]
    assert results['schema'] == 1
    assert results['calibration'] == {'num_images': 3, 'image_ids': [3, 5, 8], 'skipped': ['broken.jpg']}
    assert results['coverage']['integer_mac_share'] == 1.0
    assert {'name', 'kind', 'macs', 'weight', 'activation', 'integer', 'reason'} <= set(
        results['coverage']['layers'][0]
    )
    assert set(results['rows'][0]) == {'model', 'metrics', 'size_bytes', 'bops', 'latency_ratio', 'remark', 'latency'}


def test_keys_are_written_in_the_order_of_the_schema(tmp_path, results):
    path = tmp_path / 'results.json'
    write_results(path, dict(sorted(results.items(), reverse=True), note='mine'))
    assert list(json.loads(path.read_text())) == [*results, 'note']


def test_numbers_of_numpy_and_torch_and_nan(tmp_path, results):
    results['rows'][0]['metrics'] = dict(
        a=np.float32(0.5), b=torch.tensor(2), c=math.nan, d=np.array([1, 2]), e=(1, Path('x')), f=math.inf, g=True
    )
    write_results(tmp_path / 'r.json', results)
    assert read_results(tmp_path / 'r.json')['rows'][0]['metrics'] == dict(
        a=0.5, b=2, c=None, d=[1, 2], e=[1, 'x'], f=None, g=True
    )


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, results, monkeypatch):
    path = tmp_path / 'results.json'
    write_results(path, results)

    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'replace', full)
    monkeypatch.setattr(Path, 'replace', full)
    with pytest.raises(PTQError, match='the disk is full.*--work-dir'):
        write_results(path, dict(results, seed=99))
    assert read_results(path) == results
    assert [p.name for p in tmp_path.iterdir()] == ['results.json']


def test_file_is_as_readable_as_any_other(tmp_path, results):
    write_results(tmp_path / 'r.json', results)
    (tmp_path / 'plain').write_text('')
    assert (tmp_path / 'r.json').stat().st_mode == (tmp_path / 'plain').stat().st_mode


@pytest.mark.parametrize(
    ('text', 'message'),
    [(None, 'cannot be read'), ('{', 'no valid JSON'), ('[]', 'lacks schema'), ('{"schema": 1}', 'lacks config')],
)
def test_bad_files_are_refused(tmp_path, text, message):
    path = tmp_path / 'results.json'
    if text is not None:
        path.write_text(text)
    with pytest.raises(PTQError, match=message):
        read_results(path)


def test_other_schema_is_refused(tmp_path, results):
    write_results(tmp_path / 'r.json', dict(results, schema=2))
    with pytest.raises(PTQError, match='schema 2'):
        read_results(tmp_path / 'r.json')


def test_versions():
    assert set(versions()) == {
        'mmdet_ptq',
        'torch',
        'mmengine',
        'mmcv',
        'mmdet',
        'numpy',
        'python',
        'onnx',
        'onnxruntime',
        'openvino',
        'ncnn',
        'tensorrt',
        'processor',
    }
    assert versions()['torch'] == torch.__version__
    name, integers = processor()
    told = versions()['processor']
    assert told.startswith(f'{name}, {torch.backends.cpu.get_cpu_capability()}')
    assert all(instructions in told for instructions in integers) and ('no VNNI' not in told or not integers)
