from __future__ import annotations

import copy
import json

import pytest
import torch

from mmdet_ptq import PTQError, load_quantized, quantize
from mmdet_ptq.analysis.verdict import running_program
from mmdet_ptq.testing import tiny_batch, tiny_config, tiny_detector
from mmdet_ptq.wrapping import quantized_weights
from mmdet_ptq.wrapping.state import is_quantized


@pytest.fixture(scope='module')
def model():
    return tiny_detector('retinanet')


@pytest.fixture(scope='module')
def quantized(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp('api')
    before = {key: value.clone() for key, value in model.state_dict().items()}
    block = dict(global_loss=dict(iters=2, batch_size=2, holdout=0))
    detector = quantize(model, [tiny_batch(2, 0), tiny_batch(2, 1)], ptq=block, work_dir=str(folder))
    return detector, before, folder


def test_quantize_leaves_the_given_model_untouched(model, quantized):
    _, before, _ = quantized
    assert not is_quantized(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_quantize_returns_a_detector_close_to_the_float_one(model, quantized):
    detector = quantized[0]
    assert is_quantized(detector)
    data = model.data_preprocessor(tiny_batch(2, 2), False)
    with torch.no_grad():
        outputs = [m(data['inputs'], mode='tensor')[0][0] for m in (model, detector)]
    error = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
    assert 0 < error < 0.1


def test_quantize_keeps_its_files_only_when_asked(quantized):
    assert (quantized[2] / 'quantized.pth').is_file()


@pytest.mark.thorough
def test_quantize_names_what_a_runtime_leaves_in_float(model, tmp_path, capsys):
    pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
    other = copy.deepcopy(model)
    convolution = other.neck.fpn_convs[0].conv
    convolution.padding_mode, convolution._reversed_padding_repeated_twice = 'reflect', [1] * 4
    quantize(other, [tiny_batch(2, 0)], 'w8a8_observe', ptq=dict(export=['onnxruntime']), work_dir=str(tmp_path))
    told = capsys.readouterr().out + ''.join(path.read_text() for path in tmp_path.rglob('*.log'))
    assert (
        'onnxruntime: neck.fpn_convs.0.conv stays float' in told and '31 of 32 convolutions compute in integers' in told
    )


def test_quantize_writes_the_models_it_is_asked_for(model, tmp_path, capsys):
    pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
    from mmdet_ptq.deploy import open_model

    detector = quantize(
        model, [tiny_batch(2, 0)], preset='w8a8_observe', ptq=dict(export=['onnxruntime']), work_dir=str(tmp_path)
    )
    runtime = open_model(tmp_path / 'onnxruntime' / 'model.onnx')
    image = model.data_preprocessor(tiny_batch(1, 3), False)['inputs']
    with torch.no_grad():
        simulated = detector(image, mode='tensor')[0][0]
    answer = torch.from_numpy(runtime(image.numpy())[0])
    assert answer.shape == simulated.shape and (answer - simulated).norm() < 0.05 * simulated.norm()
    assert not runtime.coverage().float
    tiny_config('retinanet', tmp_path).dump(tmp_path / 'tiny.py')
    # the program that a run shows in its last lines
    image = str(next((tmp_path / 'val').iterdir()))
    program = running_program(tmp_path / 'onnxruntime' / 'model.onnx', True, str(tmp_path / 'tiny.py'), image)
    exec('\n'.join(program), {})
    assert 'bboxes' in capsys.readouterr().out


def test_the_preset_without_training_makes_up_for_rounding_errors(model):
    weights = []
    for rounding in ('compensated', 'nearest', None):
        ptq = {} if rounding is None else dict(rounding=rounding)
        found = quantize(model, [tiny_batch(2, 0)], 'w8a8_observe', ptq=ptq)
        weights.append({name: found.get_submodule(name).weight for name in quantized_weights(found)})
    assert all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    differ = [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]
    assert len(differ) > len(weights[0]) / 2


def test_models_without_a_place_are_refused(model):
    with pytest.raises(PTQError, match='give `quantize` one'):
        quantize(model, [tiny_batch()], ptq=dict(export=['onnxruntime']))


def test_an_empty_loader_is_refused(model):
    with pytest.raises(PTQError, match='empty'):
        quantize(model, [])


def test_an_unknown_preset_is_refused(model):
    with pytest.raises(PTQError, match="Did you mean 'w8a8'"):
        quantize(model, [tiny_batch()], preset='w8a')


def test_a_checkpoint_without_config_asks_for_one(quantized):
    with pytest.raises(PTQError, match='give `config`'):
        load_quantized(quantized[2] / 'quantized.pth')


def test_ground_truth_needs_annotations_in_the_loader(model):
    with pytest.raises(PTQError, match='annotated calibration images'):
        quantize(model, [tiny_batch()], ptq=dict(global_loss=dict(target='ground_truth', iters=1, holdout=0)))


def test_quantize_with_an_evaluator_leaves_what_a_run_leaves(model, tmp_path):
    cfg = tiny_config('retinanet', tmp_path / 'data')
    evaluation = dict(test_dataloader=cfg.test_dataloader, test_evaluator=cfg.test_evaluator)
    folder = tmp_path / 'work_dir'
    detector = quantize(model, [tiny_batch(2, 0)], preset='w8a8_observe', work_dir=str(folder), **evaluation)
    results = json.loads((folder / 'results.json').read_text())
    assert [row['model'] for row in results['rows']] == ['float', 'simulated']
    assert all('coco/bbox_mAP' in row['metrics'] for row in results['rows'])
    assert results['comparison']['model'] == 'simulated'
    assert '<h2>Results</h2>' in (folder / 'report.html').read_text()
    stored = load_quantized(folder / 'quantized.pth', cfg)
    image = model.data_preprocessor(tiny_batch(1, 3), False)['inputs']
    with torch.no_grad():
        assert torch.equal(detector(image, mode='tensor')[0][0], stored(image, mode='tensor')[0][0])


@pytest.mark.parametrize(
    ('given', 'told'),
    [
        (dict(test_evaluator=dict(type='CocoMetric'), work_dir='x'), 'give both'),
        (dict(test_evaluator=object(), test_dataloader={}, work_dir='x'), 'as configs have them'),
        (dict(test_evaluator={}, test_dataloader={}), 'results and report go into `work_dir`'),
    ],
)
def test_half_an_evaluation_is_refused_at_once(model, given, told):
    with pytest.raises(PTQError, match=told):
        quantize(model, iter(lambda: pytest.fail('it read images'), None), **given)
