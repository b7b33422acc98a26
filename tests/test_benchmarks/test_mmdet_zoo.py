"""The sweep over mmdet's own architectures: what it counts, what it tells, and one of them through all of it."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import mmdet_zoo
import pytest
import torch
import zoo_architectures
import zoo_trial
from mmengine.config import Config
from processes import set_up

LINE = dict.fromkeys(mmdet_zoo.FIELDS, '') | dict(
    config='retinanet/retinanet_r18_fpn_1x_coco.py',
    configs='30',
    integer_mac_share='1.0',
    onnxruntime_state='equal',
    onnxruntime_layers='78 of 78',
    onnxruntime_codes='0.999',
    openvino_state='equal',
    openvino_layers='77 of 78',
    date='2026-01-01',
)


def test_the_page_counts_configs_and_names_what_does_not_hold():
    differs = LINE | dict(
        config='a/b.py', configs='3', openvino_state='differs', openvino_codes='', openvino_decibel='3'
    )
    refused = LINE | dict(config='c/d.py', configs='2', onnxruntime_state='refused', onnxruntime_reason='no | form')
    broken = LINE | dict(config='e/f.py', configs='1', predicts='RuntimeError: no kernel')
    wanted = [LINE, dict(config='i/j.py', configs='4')]
    text = mmdet_zoo.page([LINE, differs, refused, broken], [dict(config='g/h.py', reason='ImportError: x')], wanted)
    assert '1 architectures (4 configs) were not tried yet' in text
    assert '| quantize | 3 of 3 | 35 of 35 |' in text
    assert '| compute in ONNX Runtime what was simulated | 2 of 3 | 33 of 35 |' in text
    assert '| all of this | 1 of 3 | 30 of 35 |' in text
    assert '| `a/b` | 3 | openvino: unknown of the codes, outputs to 3 dB |' in text
    assert '| `c/d` | 2 | no / form |' in text
    assert '| `retinanet/retinanet_r18_fpn_1x_coco` | 30 | 100.0% | 78 of 78 | 77 of 78 |' in text
    assert text.index('## Not tried') < text.index('RuntimeError: no kernel') < text.index('`g/h`')


def test_the_page_tells_where_outputs_are_equal_from_the_same_codes_alone():
    noisy = LINE | dict(
        config='a/b.py',
        configs='3',
        onnxruntime_state='differs',
        onnxruntime_codes='1.0',
        onnxruntime_decibel='18.3',
        onnxruntime_followed='90',
        onnxruntime_itself='20.1',
    )
    text = mmdet_zoo.page([LINE, noisy], [], [])
    assert '| compute in ONNX Runtime what was simulated | 1 of 2 | 30 of 33 |' in text
    assert '| `a/b` | 3 | 18.3 dB | 90 dB | 20.1 dB |' in text
    assert 'from the same codes |' not in mmdet_zoo.page([LINE], [], [])


def test_noise_is_that_of_the_worst_output():
    signal = torch.tensor([[0.0, 2.0]])
    assert zoo_trial._worst_noise([signal], [signal], False) == 200
    assert zoo_trial._worst_noise([signal, signal], [signal + 0.1, signal], False) == pytest.approx(20)
    assert zoo_trial._worst_noise([signal], [signal.flip(1)], True) == 200


def test_last_bits_of_normalisations_change_and_nothing_else():
    norm, x = torch.nn.LayerNorm(64), torch.randn(8, 64)
    before = norm(x)
    with zoo_trial.other_last_bits(norm):
        changed = norm(x)
    assert torch.equal(norm(x), before) and not torch.equal(changed, before)
    torch.testing.assert_close(changed, before, rtol=3e-7, atol=0)


def test_what_is_there_is_not_tried_again(monkeypatch):
    found = [dict(config=c, configs=n, million='1') for c, n in (('a.py', '1'), ('b.py', '5'), ('c.py', '3'))]
    monkeypatch.setattr(mmdet_zoo, 'architectures', lambda: found)
    known = {'b.py': LINE | dict(config='b.py'), 'c.py': LINE | dict(config='c.py', reloaded='predicts otherwise')}

    def chosen(**args):
        args = dict(only=[], failed=False) | args
        return [a['config'] for a in mmdet_zoo.worth_trying(type('Args', (), args), known)]

    assert chosen() == ['a.py']
    assert chosen(failed=True) == ['c.py', 'a.py']
    assert chosen(only=['b']) == ['b.py']


def test_messages_are_without_folders():
    assert zoo_architectures.without_folders("no file '/home/me/x/model.xml' in 3/4 of them") == (
        "no file 'model.xml' in 3/4 of them"
    )


def test_models_are_reduced():
    model = dict(
        depth=50, encoder=dict(num_layers=6), test_cfg=dict(rpn=dict(nms_pre=1000, max_per_img=1000)), depths=[2, 6]
    )
    zoo_trial.reduced(model)
    assert model == dict(
        depth=50, encoder=dict(num_layers=2), test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=20)), depths=[2, 2]
    )


def test_the_narrowest_that_predicts_is_tried():
    narrow = Config(dict(model=zoo_architectures.zoo_config('retinanet/retinanet_r18_fpn_1x_coco.py')['model']))
    config, detector, size = zoo_trial.smallest(narrow)
    assert size == zoo_trial.SIZES[0]
    assert (detector.backbone.conv1.out_channels, detector.bbox_head.feat_channels) == (16, 64)
    # nothing tells this backbone to be narrower
    model = zoo_architectures.zoo_config('regnet/retinanet_regnetx-800MF_fpn_1x_coco.py')['model']
    config, detector, _ = zoo_trial.smallest(Config(dict(model=model)))
    assert 'base_channels' not in config.model.backbone and detector.bbox_head.feat_channels == 64


def test_configs_that_build_alike_are_one_architecture(monkeypatch):
    names = ['retinanet/retinanet_r18_fpn_1x_coco.py', 'retinanet/retinanet_r18_fpn_1xb8-1x_coco.py']
    folder = zoo_architectures.config_folder()
    monkeypatch.setattr(type(folder), 'rglob', lambda self, pattern: [self / name for name in names])
    (found,), failed = zoo_architectures.find_architectures(lambda said: None)
    assert (found.configs, found.config, failed) == (2, names[0], {}) and 'RetinaHead' in found.key


@pytest.fixture(scope='module')
def elsewhere():
    """A process for all of them: a trial changes mmdet's classes."""
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), set_up) as pool:
        yield pool


@pytest.mark.parametrize(
    'name, runtime',
    [
        ('rpn/rpn_r50-caffe-c4_1x_coco.py', 'openvino'),
        ('centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco.py', 'onnxruntime'),
        ('fsaf/fsaf_r50_fpn_1x_coco.py', 'openvino'),
        ('gfl/gfl_r101-dconv-c3-c5_fpn_ms-2x_coco.py', 'openvino'),
        ('pisa/retinanet-r50_fpn_pisa_1x_coco.py', 'onnxruntime'),
        ('autoassign/autoassign_r50-caffe_fpn_1x_coco.py', 'onnxruntime'),
        ('sabl/sabl-retinanet_r50_fpn_1x_coco.py', 'openvino'),
        ('libra_rcnn/libra-fast-rcnn_r50_fpn_1x_coco.py', 'onnxruntime'),
        ('dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py', 'openvino'),
        ('ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py', 'onnxruntime'),
        ('yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py', 'openvino'),
        ('detr/detr_r18_8xb2-500e_coco.py', 'openvino'),
    ],
)
def test_an_architecture_goes_through_all_of_it(name, runtime, elsewhere, tmp_path):
    pytest.importorskip('openvino', reason="needs pip install 'mmdet-ptq[openvino]'")
    found = elsewhere.submit(zoo_trial.trial, name, tmp_path, [runtime]).result()
    told = {key: found.get(key) for key in ('predicts', 'quantized', 'reloaded', 'global_loss', f'{runtime}_reason')}
    assert set(told.values()) == {''}, told
    assert found['integer_mac_share'] > 0.9 and found[f'{runtime}_state'] == 'equal'
