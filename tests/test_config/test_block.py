import math
from pathlib import Path

import pytest
from mmengine.config import Config, ConfigDict

from mmdet_ptq.config import PTQConfig, TensorConfig, apply_policy
from mmdet_ptq.config.presets import PRESETS
from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers import LogAffineQuantizer

PRESET_FILES = sorted((Path(__file__).parents[2] / 'configs' / '_ptq_').glob('*.py'))


@pytest.mark.parametrize(
    'block, words',
    [
        (dict(weigths={}), ['`ptq`', 'weigths', "Did you mean 'weights'"]),
        (dict(calibration=dict(num_image=4)), ['`ptq.calibration`', "Did you mean 'num_images'"]),
        (dict(weights=dict(bit=4)), ['`ptq.weights`', "Did you mean 'bits'"]),
        (dict(activations=dict(observr={})), ['`ptq.activations`', "Did you mean 'observer'"]),
        (dict(global_loss=dict(iter=4)), ['`ptq.global_loss`', "Did you mean 'iters'"]),
        (dict(head=dict(weigths={})), ['`ptq.head`', "Did you mean 'weights'"]),
        (dict(head=dict(weights=dict(bit=4))), ['`ptq.head.weights`', "Did you mean 'bits'"]),
        (dict(first=dict(last={})), ['`ptq.first`', "'last'"]),
        (dict(overrides={'neck': dict(weight={})}), ["overrides['neck']", "Did you mean 'weights'"]),
        (dict(overrides={'neck': 'affine'}), ["overrides['neck']", "'float'"]),
        (dict(preset='w8a9'), ['`ptq.preset`', "Did you mean 'w8a8"]),
        (dict(preset=['w8a8']), ['`ptq.preset`']),
        (dict(head='log_afine'), ['`ptq.head`', "Did you mean 'log_affine'"]),
        (dict(head=3), ['`ptq.head`', '3']),
        (dict(weights=8), ['`ptq.weights`', 'dict']),
        (dict(overrides=['neck']), ['`ptq.overrides`', 'dict']),
        (dict(overrides={'neck': dict(weights=4)}), ["overrides['neck']", 'dict']),
        (dict(head=dict(weights=4)), ['`ptq.head.weights`', 'dict']),
        (dict(head=dict(last=4)), ['`ptq.head.last`', 'dict']),
        (dict(head=dict(last=dict(weigths={}))), ['`ptq.head.last`', "Did you mean 'weights'"]),
        (dict(weights=dict(bits='4')), ['`ptq.weights.bits`', 'int']),
        (dict(weights=dict(bits=True)), ['`ptq.weights.bits`']),
        (dict(weights=dict(bits=1)), ['`ptq.weights.bits`', '2..8 or 16']),
        (dict(weights=dict(bits=9)), ['`ptq.weights.bits`', '2..8 or 16']),
        (dict(activations=dict(bits=32)), ['`ptq.activations.bits`', '2..8 or 16']),
        (dict(last=dict(activations=dict(bits=12))), ['`ptq.last.activations.bits`', '2..8 or 16']),
        (dict(weights=dict(float=1)), ['`ptq.weights.float`', 'bool']),
        (dict(weights=dict(quantizer='Affine')), ['`ptq.weights.quantizer`', 'dict']),
        (dict(weights=dict(observer=dict(type=None))), ['`ptq.weights.observer`', 'type']),
        (dict(calibration=dict(num_images=0)), ['`ptq.calibration.num_images`', 'positive']),
        (dict(calibration=dict(seed=0.5)), ['`ptq.calibration.seed`', 'int']),
        (dict(calibration=dict(images='a', dataset=dict(type='b'))), ['`ptq.calibration`', '`images` and `dataset`']),
        (dict(global_loss=dict(combine='xor')), ['`ptq.global_loss.combine`', 'and, or']),
        (dict(global_loss=dict(iou_thr=1.5)), ['`ptq.global_loss.iou_thr`', 'between 0 and 1']),
        (dict(global_loss=dict(holdout=1.0)), ['`ptq.global_loss.holdout`']),
        (dict(global_loss=dict(lr=-1.0)), ['`ptq.global_loss.lr`', 'positive']),
        (dict(global_loss=dict(type='Other')), ['`ptq.global_loss.type` is gone', 'FilteredGlobalLoss', 'remove it']),
        (dict(reconstruct=dict(type='Own')), ['`ptq.reconstruct.type` is gone', 'BlockReconstruction', 'remove it']),
        (dict(reconstruct=dict(warmup=0.3)), ['`ptq.reconstruct.warmup` is gone', 'always 0.2', 'remove it']),
        (dict(global_loss=dict(p=2)), ['`ptq.global_loss.p` is gone', 'always 1', 'remove it']),
        (dict(global_loss=dict(box_loss='deltas')), ['`ptq.global_loss.box_loss`', 'Known: l1, giou']),
        (dict(equalize='weights'), ['`ptq.equalize` is gone', 'remove it', '`ptq.activations.scale_migration`']),
        (dict(dataflow='spee'), ['`ptq.dataflow`', "Did you mean 'speed'"]),
        (dict(dataflow=True), ['`ptq.dataflow`', 'str | None']),
        (dict(bias_correction=True), ['`ptq.bias_correction` is gone', 'remove it', '`ptq.reconstruct`']),
        (dict(global_loss=dict(mirror=True)), ['`ptq.global_loss.mirror` is gone', '`augment=2`']),
        (dict(protect=True), ['`ptq.protect`', 'dict']),
        (dict(export=['onnxruntime', 'onnxruntime']), ['`ptq.export`', 'different runtime names']),
        (dict(export=[3]), ['`ptq.export`', 'runtime names', '[3]']),
        (dict(export=3), ['`ptq.export`', 'list']),
        (dict(weights=dict(quantizer=dict(bits=4))), ['`ptq.weights.quantizer.bits`', '`ptq.weights.bits`']),
        (dict(activations=dict(observer=dict(bits=4))), ['`ptq.activations.observer.bits`']),
        (
            dict(head=dict(activations=dict(quantizer=dict(num_channels=3)))),
            ['`ptq.head.activations.quantizer.num_channels`', 'remove it'],
        ),
        (
            dict(weights=dict(quantizer=dict(type='mmdet_ptq.AffineQuantiser'))),
            ['`ptq.weights.quantizer`', "Did you mean 'AffineQuantizer'"],
        ),
        (dict(head=dict(weights=dict(quantizer=dict(simetric=True)))), ['`ptq.head.weights.quantizer`', "'symmetric'"]),
        (
            dict(preset='w4a8', last=dict(weights=dict(bits=16, quantizer=dict(type='mmdet_ptq.LogAffineQuantizer')))),
            ['`ptq.last.weights.quantizer`', '2..8'],
        ),
        (
            dict(activations=dict(observer=dict(type='mmdet_ptq.PercentileObserver', percentile='99'))),
            ['`ptq.activations.observer`', 'above 50', "'99'"],
        ),
        (
            dict(activations=dict(quantizer=dict(type='mmdet_ptq.LogAffineQuantizer'))),
            ['`ptq.activations.quantizer`', 'a format of weights'],
        ),
        (dict(last='float_outputs'), ['`ptq.last`', 'float_outputs', 'log_affine']),
        (dict(first='float_outputs'), ['`ptq.first`']),
        (dict(head=dict(last=dict(last='float'))), ['`ptq.head.last`', "no key 'last'"]),
        (dict(global_loss=dict(lr=math.nan)), ['`ptq.global_loss.lr`', 'finite']),
        (dict(protect=dict(bops_ratio=math.inf)), ['`ptq.protect.bops_ratio`', 'finite']),
        (dict(protect=dict(size_ratio=2)), ['`ptq.protect.size_ratio`', 'at most 1']),
        (['w8a8'], ['`ptq` must be a dict']),
        (None, ['no `ptq` block', "preset='w8a8'"]),
    ],
)
def test_bad_input_is_one_sentence_that_names_the_key(block, words):
    with pytest.raises(PTQError) as error:
        PTQConfig.from_dict(block)
    message = str(error.value)
    assert '\n' not in message
    for word in words:
        assert word in message


def test_user_keys_are_merged_into_the_preset():
    cfg = PTQConfig.from_dict(dict(preset='w4a8', weights=dict(bits=3), global_loss=dict(lr=0.5)))
    assert (cfg.weights.bits, cfg.activations.bits) == (3, 8)
    assert (cfg.global_loss.lr, cfg.global_loss.iters) == (0.5, PRESETS['w4a8']['global_loss']['iters'])
    assert cfg.weights.quantizer['type'] == 'mmdet_ptq.LogAffineQuantizer'


def test_presets_are_not_changed_by_what_is_merged_into_them():
    changed = PTQConfig.from_dict(dict(preset='w4a8', weights=dict(quantizer=dict(mode='exact'))))
    assert changed.weights.quantizer['mode'] == 'exact'
    assert PTQConfig.from_dict(dict(preset='w4a8')).weights.quantizer['mode'] == 'auto'


def test_a_published_method_is_a_starting_point():
    assert PTQConfig.from_dict(dict(reconstruct='qdrop')).reconstruct.drop == 0.5
    cfg = PTQConfig.from_dict(dict(preset='w4a8', reconstruct=dict(method='brecq', iters=7))).reconstruct
    assert (cfg.granularity, cfg.fisher, cfg.iters, cfg.compensate) == ('block', 1, 7, False)
    with pytest.raises(PTQError, match=r'`ptq.reconstruct.method` .*Did you mean'):
        PTQConfig.from_dict(dict(reconstruct='qdropp'))


def test_the_papers_protocol():
    cfg = PTQConfig.from_dict(dict(preset='paper_w4a4'))
    assert cfg.last['weights']['float'] and cfg.first['weights']['bits'] == 8
    assert cfg.weights.quantizer['type'] == 'mmdet_ptq.AffineQuantizer'
    assert cfg.head['weights']['quantizer']['mode'] == 'log1p'


def test_argument_replaces_the_blocks_preset():
    cfg = PTQConfig.from_dict(dict(preset='w4a8', calibration=dict(num_images=3)), preset='w8a8_observe')
    assert (cfg.preset, cfg.weights.bits, cfg.calibration.num_images, cfg.global_loss) == ('w8a8_observe', 8, 3, None)


def test_none_switches_the_global_stage_off():
    assert PTQConfig.from_dict(dict(preset='w8a8', global_loss=None)).global_loss is None


def test_new_type_replaces_the_inherited_dict():
    observer = dict(type='mmdet_ptq.PercentileObserver', percentile=99.0)
    cfg = PTQConfig.from_dict(dict(weights=dict(quantizer=dict(narrow_range=True))))
    assert cfg.weights.quantizer == dict(type='mmdet_ptq.AffineQuantizer', narrow_range=True)
    base = TensorConfig(observer=observer)
    same = apply_policy(base, dict(observer=dict(type='mmdet_ptq.PercentileObserver')), 'ptq.head.weights')
    other = apply_policy(base, dict(observer=dict(type='mmdet_ptq.MinMaxObserver')), 'ptq.head.weights')
    assert same.observer == observer
    assert other.observer == dict(type='mmdet_ptq.MinMaxObserver')


@pytest.mark.parametrize(
    'policy, head, last',
    [
        ('float', dict(weights=dict(float=True), activations=dict(float=True)), {}),
        ('affine', dict(weights=dict(quantizer=dict(type='mmdet_ptq.AffineQuantizer'))), {}),
        ('log_affine', dict(weights=dict(quantizer=dict(type='mmdet_ptq.LogAffineQuantizer', mode='log1p'))), {}),
        ('float_outputs', None, dict(weights=dict(float=True), activations=dict(float=True))),
    ],
)
def test_named_head_policies(policy, head, last):
    cfg = PTQConfig.from_dict(dict(preset='w8a8', head=policy))
    assert head is None or cfg.head == head
    assert cfg.last == last


def test_the_outputs_of_a_head_may_have_a_named_policy():
    cfg = PTQConfig.from_dict(dict(preset='w4a4', head=dict(last='float')))
    assert cfg.last['weights']['float'] and cfg.last['activations']['float']


def test_the_scope_of_a_type_is_no_other_type():
    base = dict(type='mmdet_ptq.AffineQuantizer', symmetric=True)
    changed = apply_policy(
        TensorConfig(quantizer=base), dict(quantizer=dict(type='AffineQuantizer', learn_scale=False)), 'ptq.overrides'
    )
    assert changed.quantizer == dict(type='AffineQuantizer', symmetric=True, learn_scale=False)


def test_mmengine_dicts_and_classes_are_accepted():
    block = ConfigDict(head=dict(weights=dict(quantizer=dict(type=LogAffineQuantizer, mode='exact'))))
    cfg = PTQConfig.from_dict(block)
    assert type(cfg.head) is dict
    assert cfg.head['weights']['quantizer']['type'].endswith('LogAffineQuantizer')
    cfg = PTQConfig.from_dict(dict(weights=dict(quantizer=dict(type=LogAffineQuantizer))))
    assert cfg.weights.quantizer['type'].endswith('.LogAffineQuantizer')


@pytest.mark.parametrize('name', PRESETS)
def test_every_preset_is_valid_and_survives_a_round_trip(name):
    recipe = PTQConfig.from_dict(dict(preset=name)).to_dict()
    assert PTQConfig.from_dict(recipe).to_dict() == recipe


@pytest.mark.parametrize('path', PRESET_FILES, ids=lambda p: p.stem)
def test_preset_files_equal_the_named_presets(path):
    block = Config.fromfile(str(path))['ptq']
    assert PTQConfig.from_dict(block).to_dict() == PTQConfig.from_dict(dict(preset=path.stem)).to_dict()


def test_every_preset_has_its_file():
    if not PRESET_FILES:
        pytest.skip('configs/_ptq_ holds no presets yet')
    assert {path.stem for path in PRESET_FILES} == set(PRESETS)


@pytest.mark.parametrize(
    'block,wanted',
    [
        (dict(export=['onnxruntime', 'openvino']), {}),
        (dict(export=['tensorrt', 'onnxruntime']), dict(symmetric=True)),
        (dict(export=['ncnn']), dict(narrow_range=True, shared_zero_point=True)),
        # 4-bit codes fit ncnn's int8 with a zero point, too
        (dict(preset='w4a4', export=['ncnn']), {}),
        (dict(preset='w4a4', export=['tensorrt', 'ncnn']), dict(symmetric=True)),
        # what the block says stands, and is told of before any long work where a runtime cannot take it
        (
            dict(
                export=['ncnn'], activations=dict(quantizer=dict(type='mmdet_ptq.AffineQuantizer', narrow_range=False))
            ),
            dict(narrow_range=False, shared_zero_point=True),
        ),
        # there is no zero point to share
        (
            dict(export=['ncnn'], activations=dict(quantizer=dict(type='mmdet_ptq.AffineQuantizer', symmetric=True))),
            dict(symmetric=True, narrow_range=True),
        ),
    ],
)
def test_runtimes_get_activations_that_they_take(block, wanted):
    quantizer = PTQConfig.from_dict(block).activations.quantizer
    assert quantizer == dict(type='mmdet_ptq.AffineQuantizer', **wanted)


@pytest.mark.parametrize(
    'block, wanted',
    [
        (dict(), 'safe'),
        (dict(export=['openvino', 'ncnn']), 'safe'),
        (dict(export=['ncnn']), 'ignore'),
        (dict(export=['ncnn'], saturation='safe'), 'safe'),
    ],
)
def test_scales_keep_sums_small_for_the_kernels_that_need_it(block, wanted):
    cfg = PTQConfig.from_dict(block)
    assert cfg.saturation == cfg.weights.saturation == wanted


def test_runtimes_that_are_calibrated_alike_share_a_block():
    def groups(**block):
        return [(cfg.export, cfg.dataflow) for cfg in PTQConfig.from_dict(dict(preset='w8a8', **block)).by_runtime()]

    assert groups() == [([], None)]
    assert groups(export=['openvino', 'onnxruntime']) == [(['openvino'], None), (['onnxruntime'], 'balanced')]
    export = ['onnxruntime', 'openvino', 'tensorrt', 'ncnn']
    assert groups(export=export) == [
        (['onnxruntime'], 'balanced'),
        (['openvino'], None),
        (['tensorrt'], None),
        (['ncnn'], None),
    ]
    # what the block says holds for all
    assert groups(export=['onnxruntime', 'openvino'], dataflow='speed') == [(['onnxruntime', 'openvino'], 'speed')]
    symmetric = dict(quantizer=dict(type='mmdet_ptq.AffineQuantizer', symmetric=True, narrow_range=True))
    assert groups(export=export, activations=symmetric) == [
        (['onnxruntime'], 'balanced'),
        (export[1:3], None),
        (['ncnn'], None),
    ]
    by_hand = PTQConfig()
    assert by_hand.by_runtime() == [by_hand]


def test_a_name_of_before_is_told_with_the_one_that_replaces_it():
    old = PTQConfig.from_dict(dict(dataflow='full'))
    assert old.dataflow == 'speed' and old.deprecated() == ["`ptq.dataflow='full'` is now called 'speed'."]
    assert PTQConfig.from_dict(dict(dataflow='speed')).deprecated() == PTQConfig.from_dict({}).deprecated() == []


@pytest.mark.parametrize(
    ('key', 'kind'), [('reconstruct', 'BlockReconstruction'), ('global_loss', 'FilteredGlobalLoss')]
)
def test_a_section_may_name_the_type_that_was_its_only_one(key, kind):
    for name in (kind, f'mmdet_ptq.{kind}', f'mmdet_ptq.calibration.{kind}'):
        assert PTQConfig.from_dict({key: dict(type=name)}) == PTQConfig.from_dict({key: {}})
