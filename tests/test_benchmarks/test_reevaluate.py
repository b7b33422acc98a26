"""reevaluate.py on a tiny detector."""

import pytest
from benchmark_tools import module, read

from mmdet_ptq.deploy import quantized_state, save_quantized
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import tiny_coco, tiny_config, tiny_quantized

pytestmark = pytest.mark.slow  # the benchmarks are no part of the package


def test_finished_runs_are_evaluated_on_other_images(tmp_path):
    cfg, run, other = tiny_config('retinanet', tmp_path), tmp_path / 'w8a8' / 'observed', tmp_path / 'other'
    run.mkdir(parents=True)
    save_quantized(run / 'quantized.pth', quantized_state(*tiny_quantized('retinanet'), cfg.to_dict(), None))
    cfg.dump(tmp_path / 'tiny.py')
    annotations = tiny_coco(other, num_images=5, seed=3)['val']
    module('reevaluate').main(
        [
            str(tmp_path / 'tiny.py'),
            str(run),
            '--work-dir',
            str(tmp_path / 'logs'),
            '--out',
            str(tmp_path / 'out.csv'),
            '--cfg-options',
            f'test_dataloader.dataset.data_root={other}',
            f'test_evaluator.ann_file={annotations}',
        ]
    )
    lines = read(tmp_path / 'out.csv')
    assert [line['run'] for line in lines] == ['float', 'w8a8/observed']
    assert {line['images'] for line in lines} == {'5'}
    for line in lines:
        assert 0 <= float(line['AP']) <= 1


def test_runs_that_are_not_finished_are_refused(tmp_path):
    cfg = tiny_config('retinanet', tmp_path)
    cfg.load_from = None
    with pytest.raises(PTQError, match='no `load_from`'):
        module('reevaluate').reevaluate(cfg, [])
    cfg.load_from = str(tmp_path / 'float.pth')
    with pytest.raises(PTQError, match='has no quantized.pth; finish the run first'):
        module('reevaluate').reevaluate(cfg, [tmp_path])
