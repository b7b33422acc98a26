"""The bounds of each section's values, and what follows from several of them."""

from dataclasses import fields

import pytest

from mmdet_ptq.config import CalibrationConfig, GlobalLossConfig, ProtectConfig, ReconstructConfig, TensorConfig
from mmdet_ptq.config.sections import BITS, CANDIDATES, ActivationConfig
from mmdet_ptq.errors import PTQError


@pytest.mark.parametrize(
    'section', [CalibrationConfig, TensorConfig, ActivationConfig, ProtectConfig, GlobalLossConfig, ReconstructConfig]
)
def test_a_section_is_valid_without_a_word_and_shares_nothing_with_another(section):
    first, second = section(), section()
    first.check('key')
    for field in fields(section):
        value = getattr(first, field.name)
        assert value is not getattr(second, field.name) or not isinstance(value, dict | list), field.name


@pytest.mark.parametrize(
    'section',
    [
        *(TensorConfig(bits=bits) for bits in BITS),
        TensorConfig(scale_migration=1),
        ProtectConfig(size_ratio=1, bops_ratio=1.0, min_share=0, max_float_macs=1, candidates=[CANDIDATES[-1]]),
        GlobalLossConfig(score_thr=0, iou_thr=1, holdout=0, cls_weight=0, max_boxes=1, bias_lr=0, grid_lr=0),
        ReconstructConfig(fisher=0, drop=0.99, holdout=0, cache_gib=0, iters=0, skip_below=0),
        ReconstructConfig(fisher=1),
    ],
)
def test_the_ends_of_a_range_belong_to_it(section):
    section.check('key')


@pytest.mark.parametrize(
    ('section', 'told'),
    [
        (TensorConfig(scale_migration=1.01), r'`ptq\.x\.scale_migration` must lie between 0 and 1, got 1\.01'),
        (ProtectConfig(min_share=-0.1), r'`ptq\.x\.min_share` must lie between 0 and 1'),
        (ProtectConfig(max_float_macs=1.5), r'`ptq\.x\.max_float_macs` must lie between 0 and 1'),
        (ProtectConfig(max_loss=0), r'`ptq\.x\.max_loss` must be positive, got 0'),
        (ProtectConfig(size_bytes=1, size_ratio=0.5), '`ptq.x` names both `size_bytes` and `size_ratio`'),
        (ProtectConfig(candidates=['range', '8bits']), r"`ptq\.x\.candidates` is '8bits'.* Did you mean '8bit'"),
        (GlobalLossConfig(score_thr=-0.1), r'`ptq\.x\.score_thr` must lie between 0 and 1'),
        (GlobalLossConfig(mask_weight=-1), r'`ptq\.x\.mask_weight` must not be negative, got -1; 0 leaves it out'),
        (GlobalLossConfig(max_boxes=0), r'`ptq\.x\.max_boxes` must be None or a whole number of at least 1, got 0'),
        (GlobalLossConfig(grid_lr=-1e-3), r'`ptq\.x\.grid_lr` must not be negative, got -0\.001; 0 leaves them'),
        (GlobalLossConfig(target='labels'), r"`ptq\.x\.target` is 'labels'.* Known: float, ground_truth"),
        (ReconstructConfig(fisher=1.1), r'`ptq\.x\.fisher` must lie between 0 and 1, got 1\.1'),
        (ReconstructConfig(input_drop=1), r'`ptq\.x\.input_drop` must lie in \[0, 1\), got 1'),
        (ReconstructConfig(damping=0), r'`ptq\.x\.damping` must be positive, got 0'),
        (ReconstructConfig(cache_gib=-1), r'`ptq\.x\.cache_gib` must not be negative'),
        (ReconstructConfig(granularity='net'), r"`ptq\.x\.granularity` is 'net'.* Known: block, layer, paper"),
    ],
)
def test_what_lies_beyond_is_refused_with_its_key(section, told):
    with pytest.raises(PTQError, match=f'^{told}'):
        section.check('ptq.x')


def test_a_setting_of_the_other_kind_of_tensor_is_refused():
    TensorConfig(saturation='ignore').check('ptq.weights')
    TensorConfig(scale_migration=0.5).check('ptq.head.activations')
    with pytest.raises(PTQError, match='it belongs to weights'):
        TensorConfig(saturation='ignore').check('ptq.head.activations')
    with pytest.raises(PTQError, match='it belongs to activations'):
        TensorConfig(scale_migration=0.5).check('ptq.weights')


def test_learning_rates_that_are_not_named_follow_the_one_that_is():
    names = {'scale', 'weight_scale', 's', 'mu', 'k', 'eps', 'weight', 'bias'}
    rates = GlobalLossConfig(lr=0.5, bias_lr=0.25, weight_lr=0.125).rates()
    assert rates == dict.fromkeys(names, 0.5) | dict(bias=0.25, weight=0.125)
    # nothing is another rate than none
    rates = GlobalLossConfig(lr=0.5, bias_lr=0, grid_lr=0, weight_scale_lr=2.0).rates()
    assert rates == dict(scale=0.5, weight_scale=2.0, s=2.0, mu=2.0, k=0, eps=0, weight=0, bias=0)
