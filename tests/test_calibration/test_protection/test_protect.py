import copy
import io

import pytest
import torch
from sensitive import BAD, OBSERVE, PER_TENSOR, images, prepared, ranges, with_a_bad_tensor

from mmdet_ptq.analysis import bops, float_bops
from mmdet_ptq.calibration.protection.damage import DamageMeter
from mmdet_ptq.calibration.protection.protect import Protector, protect_detector
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.deploy import quantized_state
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import tiny_detector

RETINANET = {**OBSERVE, 'overrides': {'backbone.layer2.*': dict(weights=dict(bits=4))}}
# with the bound on its weights this random detector gains nothing from 16 bits
LOOSE = {**RETINANET, 'saturation': 'ignore'}


@pytest.fixture(scope='module')
def retinanet():
    return prepared(tiny_detector('retinanet'), PTQConfig.from_dict(RETINANET))


def protect(detector, structure, block, **kwargs):
    """Protects copies; returns what it returned, the changed detector and structure."""
    detector, structure = copy.deepcopy(detector), copy.deepcopy(structure)
    cfg = PTQConfig.from_dict(block)
    return protect_detector(detector, structure, cfg, images(), ranges(), **kwargs), detector, structure


def assert_same_as_prepared_anew(float_detector, block, protection, detector, structure):
    """The overrides are valid, and give bit for bit the detector that protection made."""
    overrides = {**block.get('overrides', {}), **protection.overrides}
    anew, structure_anew = prepared(float_detector, PTQConfig.from_dict({**block, 'overrides': overrides}))
    assert structure.to_dict() == structure_anew.to_dict()
    state, state_anew = detector.state_dict(), anew.state_dict()
    assert state.keys() == state_anew.keys()
    assert all(torch.equal(state[name], state_anew[name]) for name in state)


@pytest.mark.thorough
def test_the_bad_tensor_is_mended_in_integers():
    float_detector = with_a_bad_tensor()
    block = {**PER_TENSOR, 'protect': dict(max_tensors=1, candidates=['per_channel', 'range', 'float'])}
    detector, structure = prepared(float_detector, PTQConfig.from_dict(block))
    before = copy.deepcopy(structure)
    protection, detector, structure = protect(detector, structure, block)
    assert protection.overrides == {BAD: dict(activations=dict(depthwise_per_channel=True))}
    (choice,) = protection.choices
    assert choice.layers == (BAD,) and choice.float_macs == 0 and choice.bops == 0
    assert choice.loss_after < 0.75 * choice.loss_before
    assert protection.after.loss < protection.before.loss
    changed = [name for name in structure.activations if structure.activations[name] != before.activations[name]]
    assert changed == [BAD.replace('.', '/')]
    assert structure.layers == before.layers
    assert_same_as_prepared_anew(float_detector, block, protection, detector, structure)


@pytest.mark.thorough
@pytest.mark.parametrize(
    'limits',
    [
        dict(max_tensors=3, candidates=['8bit', 'format', 'range']),
        dict(max_tensors=10, min_share=0.0, candidates=['16bit']),
        dict(max_tensors=3, candidates=['float'], max_float_macs=1.0),
    ],
)
def test_overrides_give_the_same_detector_again(limits):
    base = LOOSE if limits['candidates'] == ['16bit'] else RETINANET
    block = {**base, 'protect': limits}
    protection, detector, structure = protect(*prepared(tiny_detector('retinanet'), PTQConfig.from_dict(base)), block)
    assert protection.choices
    assert_same_as_prepared_anew(tiny_detector('retinanet'), block, protection, detector, structure)
    if limits['candidates'] == ['16bit']:
        assert {s.spec['bits'] for s in structure.activations.values()} == {8, 16}


@pytest.mark.thorough
@pytest.mark.parametrize('candidates', [['8bit', '16bit', 'range'], ['float']])
def test_tensors_whose_scales_moved_into_weights_keep_them(candidates):
    block = {**RETINANET, 'activations': dict(scale_migration=1.0, observer=dict(type='mmdet_ptq.MinMaxObserver'))}
    block['protect'] = dict(max_tensors=4, min_share=0.0, candidates=candidates, max_float_macs=1.0)
    float_detector = tiny_detector('retinanet')
    detector, structure = prepared(float_detector, PTQConfig.from_dict(block))
    divided = set(detector.ptq.divisions)
    protection, detector, structure = protect(detector, structure, block)
    assert protection.choices and divided and set(detector.ptq.divisions) == divided
    assert_same_as_prepared_anew(float_detector, block, protection, detector, structure)


def test_nothing_goes_to_float_without_a_budget_for_it(retinanet):
    protection, _, structure = protect(*retinanet, {**RETINANET, 'protect': dict(candidates=['float'], max_tensors=2)})
    assert not protection.choices and not protection.overrides
    assert structure == retinanet[1]


@pytest.mark.parametrize(
    'export, share, chosen', [([], 0.0, True), (['openvino'], 0.0, False), (['openvino'], 1.0, True)]
)
def test_sixteen_bits_are_float_in_runtimes(export, share, chosen):
    block = {
        **LOOSE,
        'export': export,
        'dataflow': None,
        'protect': dict(max_tensors=10, min_share=0.0, candidates=['16bit'], max_float_macs=share),
    }
    protection, _, structure = protect(*prepared(tiny_detector('retinanet'), PTQConfig.from_dict(LOOSE)), block)
    assert bool(protection.choices) == chosen
    assert ({s.spec['bits'] for s in structure.activations.values()} == {8, 16}) == chosen
    assert all((choice.float_macs > 0) == bool(export) for choice in protection.choices)


def test_float_stays_within_its_share_of_macs(retinanet):
    limits = dict(candidates=['float'], max_tensors=6, max_float_macs=0.1)
    protection, _, structure = protect(*retinanet, {**RETINANET, 'protect': limits})
    macs = [layer.macs for layer in structure.layers if not layer.integer]
    assert 0 < sum(macs) <= 0.1 * sum(layer.macs for layer in structure.layers)
    assert sum(choice.float_macs for choice in protection.choices) <= sum(macs)


@pytest.mark.parametrize('key', ['bops_ratio', 'size_ratio'])
def test_a_budget_below_the_present_cost_is_kept(retinanet, key):
    detector, structure = retinanet
    block = {**RETINANET, 'protect': dict(max_tensors=2, **{key: 1e-6})}
    with pytest.raises(PTQError, match=rf'`ptq\.protect\.{key}` = .* the least that can be reached is ') as error:
        protect(detector, structure, block)
    least = float(str(error.value).split('reached is ')[1].split(';')[0])
    protection, changed, structure = protect(
        detector, structure, {**block, 'protect': {**block['protect'], key: 1.1 * least}}
    )
    assert protection.bops == bops(structure)
    assert protection.choices and {'bits': 4} in [p for o in protection.overrides.values() for p in o.values()]
    if key == 'bops_ratio':
        assert protection.bops <= 1.1 * least * float_bops(structure)
    else:
        state = tiny_detector('retinanet').state_dict().values()
        size = 4 * sum(t.numel() for t in state if t.is_floating_point())
        assert protection.size_bytes <= 1.1 * least * size


def test_size_in_bytes_is_that_of_the_checkpoint(retinanet):
    detector, structure = retinanet
    before = stored_bytes(detector, structure)
    block = {**RETINANET, 'protect': dict(max_tensors=1, size_bytes=int(0.9 * before))}
    protection, detector, structure = protect(detector, structure, block, stored_bytes=before)
    after = stored_bytes(detector, structure)
    assert protection.size_bytes <= 0.9 * before
    assert after == pytest.approx(protection.size_bytes, rel=0.02)


def stored_bytes(detector, structure) -> int:
    buffer = io.BytesIO()
    torch.save(quantized_state(detector, structure, {}, {}), buffer)
    return buffer.tell()


def test_a_loss_that_cannot_be_reached_leaves_the_detector_as_it_was(retinanet):
    detector, structure = copy.deepcopy(retinanet)
    state = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    cfg = PTQConfig.from_dict({**RETINANET, 'protect': dict(max_tensors=1, max_loss=1e-9, candidates=['16bit'])})
    with pytest.raises(PTQError, match=r'`ptq\.protect\.max_loss` = 1e-09 cannot be kept: the least that was reached'):
        protect_detector(detector, structure, cfg, images(), ranges())
    assert structure == retinanet[1]
    assert all(torch.equal(tensor, state[name]) for name, tensor in detector.state_dict().items())


def test_a_loss_that_is_kept_already_changes_nothing(retinanet):
    protection, _, _ = protect(*retinanet, {**RETINANET, 'protect': dict(max_tensors=1, max_loss=100.0)})
    assert not protection.choices and protection.before == protection.after


@pytest.mark.parametrize(
    'reconstruct, kinds',
    [(None, {'activation', 'weight'}), (dict(compensate=False), {'activation', 'weight'}), ({}, {'activation'})],
)
def test_ranges_of_weights_are_left_to_a_reconstruction_that_sets_them(retinanet, reconstruct, kinds):
    block = {**RETINANET, 'weights': dict(bits=4), 'reconstruct': reconstruct}
    protector = Protector(*retinanet, PTQConfig.from_dict(block), images(), ranges(), None, None)
    # one set of each kind is enough: fitting takes its time
    sets = [next(s for s in protector.sets if s.kind == kind) for kind in ('activation', 'weight')]
    protector.offer(sets, ['range'])
    assert {tensors.kind for tensors, case in protector.cases.items() if case.candidates} == kinds


def test_the_whole_detector_has_what_no_layer_reads():
    limits = dict(max_tensors=3, candidates=['8bit', '16bit'])
    block = {**RETINANET, 'dataflow': 'full', 'export': [], 'protect': limits}
    detector, structure = prepared(tiny_detector('retinanet'), PTQConfig.from_dict(block))
    protection, changed, structure_changed = protect(detector, structure, block)
    assert protection.choices
    assert protection.before == DamageMeter(detector, structure, images()).measure_all()
    assert protection.after == DamageMeter(changed, structure_changed, images()).measure_all()


@pytest.mark.parametrize(
    'limits, words',
    [
        (dict(max_float_macs=1.5), ['max_float_macs', 'between 0 and 1']),
        (dict(size_bytes=1, size_ratio=0.5), ['`size_bytes` and `size_ratio`']),
        (dict(size_ratio=0), ['`ptq.protect.size_ratio`', 'positive']),
        (dict(candidates=['16bits']), ['`ptq.protect.candidates`', "Did you mean '16bit'"]),
        (dict(max_tensor=3), ['`ptq.protect`', "Did you mean 'max_tensors'"]),
    ],
)
def test_bad_input_is_one_sentence_that_names_the_key(limits, words):
    with pytest.raises(PTQError) as error:
        PTQConfig.from_dict(dict(preset='w8a8', protect=limits))
    assert all(word in str(error.value) for word in words), error.value
