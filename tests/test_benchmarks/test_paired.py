"""paired.py on detections that were written by hand."""

import pytest
import torch
from benchmark_tools import module, read
from mmdet.registry import DATASETS
from mmengine.registry import init_default_scope

from mmdet_ptq.files import save_tensors

pytestmark = pytest.mark.slow  # the benchmarks are no part of the package


@pytest.fixture
def folders(tmp_path):
    """Work directories of two detectors, two seeds each: all is found, and every fourth image's objects are not."""
    init_default_scope('mmdet')
    config = f"""
test_dataloader = dict(dataset=dict(
    type='mmdet_ptq.EmbeddedDataset', data_root={str(tmp_path / 'data') + '/'!r}, num_images=dict(train=1, val=48),
    ann_file='annotations/instances_val.json', data_prefix=dict(img='val/'), test_mode=True,
    pipeline=[dict(type='LoadImageFromFile')]))
"""
    namespace = {}
    exec(config, namespace)
    dataset = DATASETS.build(namespace['test_dataloader']['dataset'])
    found = {}
    for name in ('all', 'all1', 'some', 'some1'):
        folder = tmp_path / name
        folder.mkdir()
        (folder / 'tiny.py').write_text(config)
        ids, boxes, labels = [], [], []
        for index in range(len(dataset)):
            info = dataset.get_data_info(index)
            kept = info['instances'] if name.startswith('all') or index % 4 else []
            ids.append(info['img_id'])
            boxes.append(torch.tensor([entry['bbox'] for entry in kept], dtype=torch.float32).view(-1, 4))
            labels.append(torch.tensor([entry['bbox_label'] for entry in kept], dtype=torch.int64))
        state = dict(ids=ids, counts=torch.tensor([len(b) for b in boxes]), boxes=torch.cat(boxes))
        state.update(labels=torch.cat(labels), scores=torch.full((len(state['boxes']),), 0.9))
        (folder / 'detections').mkdir()
        save_tensors(folder / 'detections' / 'simulated.pth', state)
        found[name] = folder
    return found


def test_a_detector_that_loses_objects_is_told_from_one_that_loses_none(folders, capsys):
    paired = module('paired')
    before, after = ([str(folders[n]) for n in names] for names in (('all', 'all1'), ('some', 'some1')))
    paired.main(['--before', *before, '--after', *after, '--resamples', '100'])
    told = capsys.readouterr().out.splitlines()[-1]
    points, low, high = (float(told.replace(',', '').split()[place]) for place in (0, 5, 7))
    assert low < points < high < 0 and told.endswith('2 seeds, 48 images')


def test_the_ablation_writes_its_pairs(folders, tmp_path):
    runs = {
        ('tiny', 'w4a4', name): [folders[key], folders[f'{key}1']] for name, key in (('ours', 'all'), ('x', 'some'))
    }
    module('ablation').compare_pairs(runs, 'ours', 2, tmp_path / 'pairs.csv')
    (line,) = read(tmp_path / 'pairs.csv')
    assert line['recipe'] == 'x' and line['against'] == 'ours' and line['images'] == '48'
    assert float(line['low']) < float(line['points']) < float(line['high']) < 0
