"""What the names of presets promise, and that nothing is shared that a reader could change for another."""

import re

import pytest

from mmdet_ptq.config import GlobalLossConfig
from mmdet_ptq.config.checks import merge
from mmdet_ptq.config.presets import HEAD_POLICIES, PRESETS, RECONSTRUCTION_METHODS
from mmdet_ptq.config.sections import ActivationConfig

NAMED = {name: tuple(map(int, re.search(r'w(\d+)a(\d+)', name).groups())) for name in PRESETS}
LOW = [name for name, (weights, _) in NAMED.items() if weights < 8]


@pytest.mark.parametrize('name', PRESETS)
def test_a_preset_has_the_bits_of_its_name(name):
    preset = PRESETS[name]
    assert (preset['weights']['bits'], preset['activations']['bits']) == NAMED[name]


@pytest.mark.parametrize('name', LOW)
def test_with_few_bits_the_ends_keep_eight_or_stay_float(name):
    preset = PRESETS[name]
    assert (preset['first']['weights']['bits'], preset['first']['activations']['bits']) == (8, 8)
    assert preset['last'] == (HEAD_POLICIES['float'] if name.startswith('paper') else preset['first'])


@pytest.mark.parametrize('name', LOW)
def test_with_few_bits_weights_are_reconstructed_and_their_grids_stay(name):
    assert 'reconstruct' in PRESETS[name]
    rates = GlobalLossConfig(**PRESETS[name]['global_loss']).rates()
    assert {kind for kind, rate in rates.items() if rate} == {'scale', 'bias', 'weight'}


@pytest.mark.parametrize('name', LOW)
def test_fewer_activation_levels_are_trained_longer(name):
    preset, few = PRESETS[name], NAMED[name][1] < 8
    assert preset['global_loss']['iters'] == (1000 if few else 200)
    activations = ActivationConfig(**preset['activations'])
    assert activations.observer['type'] == f'mmdet_ptq.{"MSE" if few else "Fisher"}Observer'
    # the paper has no migration
    assert activations.scale_migration == (1 if few and not name.startswith('paper') else 0)


def test_what_is_only_observed_differs_by_its_training_and_rounding_alone():
    trained, observed = dict(PRESETS['w8a8']), dict(PRESETS['w8a8_observe'])
    assert trained.pop('global_loss') == {} and observed.pop('rounding') == 'compensated' and trained == observed
    assert all('global_loss' in preset for name, preset in PRESETS.items() if name != 'w8a8_observe')


def test_published_methods_learn_the_rounding_and_nothing_of_ours():
    published = {name: method for name, method in RECONSTRUCTION_METHODS.items() if method}
    assert RECONSTRUCTION_METHODS.keys() - published.keys() == {'closed_form'}
    for name, method in published.items():
        assert method['rounding'] == 'adaround' and method['iters'] == 20000, name
        assert not (method['search_scales'] or method['compensate'] or method['skip_below']), name
    assert {name for name, method in published.items() if method.get('drop')} == {'qdrop'}
    assert {name for name, method in published.items() if method['fisher']} == {'brecq'}
    assert {name for name, method in published.items() if method['granularity'] == 'layer'} == {'adaround'}


def test_merging_into_one_preset_changes_no_other():
    before = repr((PRESETS, HEAD_POLICIES))
    merged = merge(PRESETS['w4a8'], dict(first=dict(weights=dict(bits=16)), weights=dict(quantizer=dict(mode='exact'))))
    assert merged['first']['weights']['bits'] == 16 and merged['weights']['quantizer']['mode'] == 'exact'
    assert repr((PRESETS, HEAD_POLICIES)) == before
