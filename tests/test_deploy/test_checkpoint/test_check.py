"""A checkpoint whose numbers or fields changed is refused in a sentence; nothing wrong is loaded in silence."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdet_ptq import PTQError, load_quantized
from mmdet_ptq.deploy import read_quantized, save_quantized
from mmdet_ptq.deploy.checkpoint.check import CHECKSUM
from mmdet_ptq.deploy.checkpoint.packing import flatten_tensors, unflatten_tensors

OLD = Path(__file__).resolve().parents[2] / 'old_files' / 'schema_3' / 'quantized.pth'


@pytest.fixture(scope='module')
def good():
    return read_quantized(OLD)


@pytest.fixture
def saved(good, tmp_path):
    """Saves a changed copy, with a right checksum."""

    def save(change):
        state = copy.deepcopy(good)
        change(state)
        save_quantized(tmp_path / 'q.pth', state)
        return tmp_path / 'q.pth'

    return save


def refusal(work):
    with pytest.raises(PTQError) as error:
        work()
    assert '\n' not in str(error.value)
    return str(error.value)


def test_a_new_file_has_a_checksum_and_an_old_one_needs_none(saved):
    assert CHECKSUM not in torch.load(OLD, weights_only=True)
    assert torch.load(saved(lambda state: None), weights_only=True)[CHECKSUM].startswith('sha256:')


def test_every_number_counts_for_the_checksum(saved):
    path = saved(lambda state: None)
    packed = torch.load(path, weights_only=True)
    for group in ('codes', 'tensors'):
        for dtype in packed[group]:
            changed = copy.deepcopy(packed)
            data = changed[group][dtype].view(torch.uint8)
            data[len(data) // 2] ^= 1
            torch.save(changed, path)
            assert 'checksum' in refusal(lambda: read_quantized(path))


def test_a_flipped_bit_is_told_or_changes_nothing(saved):
    """Bits of the archive itself, names and alignment, are read by nobody or make it no archive."""
    path = saved(lambda state: None)
    content, expected, told = path.read_bytes(), read_quantized(path), 0
    generator = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(content)
        damaged[generator.integers(len(content))] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        try:
            found = read_quantized(path)
        except PTQError as error:
            told += '\n' not in str(error)
            continue
        assert found.keys() == expected.keys() and found['structure'] == expected['structure']
        for group in ('codes', 'tables', 'tensors'):
            ours, theirs = (unflatten_tensors(state[group]) for state in (found, expected))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert told > 30


@pytest.mark.parametrize('field', ['config', 'dataset_meta', 'structure', 'layers'])
def test_a_missing_or_other_field_is_named(saved, field):
    assert f'lacks the field `{field}`' in refusal(lambda: read_quantized(saved(lambda state: state.pop(field))))
    assert field in refusal(lambda: read_quantized(saved(lambda state: state.update({field: 7}))))


@pytest.mark.parametrize('field', ['text', 'codes', 'tables', 'tensors', 'schema', 'version'])
def test_a_missing_or_other_part_of_the_file_is_named(tmp_path, field):
    for change in (lambda packed: packed.pop(field), lambda packed: packed.update({field: [1]})):
        packed = torch.load(OLD, weights_only=True)
        change(packed)
        torch.save(packed, tmp_path / 'q.pth')
        assert field in refusal(lambda: read_quantized(tmp_path / 'q.pth'))


def test_an_unknown_field_is_named(saved):
    assert 'unknown field `extra`' in refusal(lambda: read_quantized(saved(lambda state: state.update(extra=1))))


def layer(state, **changes):
    state['layers']['backbone.conv1'].update(changes)


def first(state):
    return state['structure']['activations']['backbone/conv1']


def twice(state):
    state['structure']['layers'].append(state['structure']['layers'][0])


def scale(state, value, name='backbone.conv1.parametrizations.weight.0.quantizer.scale'):
    tensors = unflatten_tensors(state['tensors'])
    tensors[name].reshape(-1)[0] = value
    state['tensors'] = flatten_tensors(tensors)


def renamed(state, old, new):
    next(entry for entry in state['tensors']['index'] if entry[0] == old)[0] = new


QUANTIZER = 'ptq.activations.backbone/conv1'
DAMAGES = {
    'bits': (lambda state: layer(state, bits=4), 'bytes of codes'),
    'bits of text': (lambda state: layer(state, bits='8'), 'layers.backbone.conv1.bits must be a whole number'),
    'bits of the format': (lambda state: state['structure']['layers'][0]['weight'].update(bits=7), 'not those of its'),
    'lowest code': (lambda state: layer(state, lowest=0), 'not those of its format'),
    'rows': (lambda state: layer(state, rows=[8, 146]), 'rows and columns'),
    'shape': (lambda state: layer(state, shape=[8, 7, 7, 3]), 'does not fit the detector'),
    'a layer without codes': (lambda state: state['layers'].pop('backbone.conv1'), 'do not name the same layers'),
    'a field of a layer': (lambda state: layer(state, extra=1), 'unknown field `extra`'),
    'readers': (lambda state: first(state).update(readers=3), '3 readers, and 1 layers read it'),
    'no readers': (lambda state: first(state).pop('readers'), 'lacks the field `readers`'),
    'an unknown activation': (lambda state: state['structure']['layers'][0].update(inputs=['x']), 'which it does not'),
    'a layer twice': (
        lambda state: state['structure']['layers'].append(state['structure']['layers'][0]),
        'twice|2 layers read it',
    ),
    'an option of a format': (lambda state: first(state)['spec'].update(extra=1), "no option 'extra'"),
    'a scale of zero': (lambda state: scale(state, 0.0), 'not positive'),
    'a negative scale': (lambda state: scale(state, -1.0), 'not positive'),
    'a scale that is no number': (lambda state: scale(state, float('nan')), 'NaN or infinity'),
    'an infinite scale': (lambda state: scale(state, float('inf')), 'NaN or infinity'),
    "an activation's scale": (lambda state: scale(state, -1.0, f'{QUANTIZER}.scale'), 'not positive'),
    'a zero point': (lambda state: scale(state, 300, f'{QUANTIZER}.zero_point'), 'zero point'),
    'a bias': (lambda state: scale(state, float('inf'), 'backbone.conv1.bias'), 'NaN or infinity'),
    'a variance': (lambda state: renamed(state, 'backbone.conv1.bias', 'backbone.bn1.running_var'), 'below zero'),
    'the size of images': (lambda state: state.update(input_shape=[64, 64]), 'no size of an image'),
    'an offset': (lambda state: state['codes']['index'][0].__setitem__(3, 10**9), 'not within the numbers'),
    'an index entry': (lambda state: state['codes']['index'][0].pop(0), 'dtype must be text'),
}


@pytest.mark.parametrize(('change', 'told'), DAMAGES.values(), ids=DAMAGES)
def test_what_does_not_fit_together_is_told(saved, change, told):
    import re

    found = refusal(lambda: load_quantized(saved(change)))
    assert re.search(told, found), found
