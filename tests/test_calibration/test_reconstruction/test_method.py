import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from architectures import register
from torch import nn

from mmdet_ptq.calibration import BlockReconstruction, observe_activations
from mmdet_ptq.calibration.reconstruction.streams import CallInputs
from mmdet_ptq.calibration.reconstruction.unit_data import UnitData
from mmdet_ptq.calibration.reconstruction.unit_training import UnitResult, UnitTrainer
from mmdet_ptq.calibration.reconstruction.units import Unit, find_units
from mmdet_ptq.config import PTQConfig, ReconstructConfig
from mmdet_ptq.errors import PTQError
from mmdet_ptq.predictions import two_stage
from mmdet_ptq.testing import tiny_batch, tiny_detector, tiny_quantized
from mmdet_ptq.testing.calibrated import predict
from mmdet_ptq.wrapping import prepare_detector
from mmdet_ptq.wrapping.state import STATE
from mmdet_ptq.wrapping.weights import float_weight, quantized_weights

LOW_BIT = dict(
    preset='w8a8_observe',
    weights=dict(bits=3),
    activations=dict(bits=4, observer=dict(type='mmdet_ptq.MinMaxObserver')),
)


def batches(count=2):
    return [tiny_batch(4, seed=i) for i in range(2, 2 + count)]


def reconstruct(detector, folder, resume=False, **kwargs):
    cfg = ReconstructConfig(
        **{
            'iters': 6,
            'rounding': 'adaround',
            'rounding_lr': 0.05,
            'compensate': False,
            'search_scales': False,
            'batch_size': 4,
            'skip_below': 0,
            'fisher': 0,
            **kwargs,
        }
    )
    return BlockReconstruction(cfg).run(detector, batches(), [tiny_batch(4, seed=5)], folder, 0, resume)


@pytest.fixture(scope='module')
def low_bit():
    return tiny_quantized('retinanet', LOW_BIT)[0]


@pytest.mark.thorough
@pytest.mark.parametrize(
    'options',
    [
        dict(granularity='block', drop=0.5, input_drop=0.5, fisher=1),
        dict(rounding='latent', bias_lr=1e-3),
        dict(compensate=True, iters=0),
        dict(compensate=True, iters=0, fisher=0.5),
        dict(search_scales=True, iters=0),
        dict(search_scales=True, compensate=True, iters=0, fisher=0.7),
    ],
    ids=str,
)
def test_no_unit_gets_worse_and_some_get_better(low_bit, tmp_path, options):
    detector = copy.deepcopy(low_bit)
    units = reconstruct(detector, tmp_path, **options)
    assert all(unit['after'] <= unit['before'] for unit in units)
    assert any(unit['after'] < 0.95 * unit['before'] for unit in units)
    assert {unit['outcome'] for unit in units} <= {'trained', 'restored'}
    # nothing of the training is left behind
    assert all(weight.rounding is None for weight in quantized_weights(detector).values())
    assert getattr(detector, STATE).drop == 0
    assert set(detector.state_dict()) == set(low_bit.state_dict())


@pytest.mark.parametrize('head', ['affine', 'log_affine'])
def test_learned_rounding_moves_no_weight_by_more_than_one_code(tmp_path, head):
    detector, _ = tiny_quantized('retinanet', {**LOW_BIT, 'head': head})
    before = {
        name: weight.codes(float_weight(detector.get_submodule(name)))
        for name, weight in quantized_weights(detector).items()
    }
    reconstruct(detector, tmp_path, rounding_lr=0.1, activation_lr=0)
    changed = 0
    for name, weight in quantized_weights(detector).items():
        distance = (weight.codes(float_weight(detector.get_submodule(name))) - before[name]).abs()
        assert distance.max() <= 1
        changed += int(distance.sum())
    assert changed > 0


@pytest.mark.thorough
@pytest.mark.parametrize('head', ['affine', 'log_affine'])
def test_trained_weights_end_on_values_of_their_grid(tmp_path, head):
    detector, _ = tiny_quantized('retinanet', {**LOW_BIT, 'head': head})
    units = reconstruct(detector, tmp_path, rounding='latent', compensate=True, iters=8)
    trained = [unit['name'] for unit in units if unit['outcome'] == 'trained']
    assert len(trained) > len(units) // 2
    for name, weight in quantized_weights(detector).items():
        if any(name == unit or name.startswith(f'{unit}.') for unit in trained):
            original = float_weight(detector.get_submodule(name))
            assert torch.equal(weight(original), original), name


def test_settling_changes_no_quantized_weight():
    detector, _ = tiny_quantized('retinanet', {**LOW_BIT, 'head': 'log_affine'})
    for name, weight in quantized_weights(detector).items():
        original = float_weight(detector.get_submodule(name))
        before, quantized = original.clone(), weight(original).detach().clone()
        weight.settle(original)
        assert torch.equal(weight(original), quantized)
        assert not torch.equal(original, before)


@pytest.mark.thorough
def test_an_interrupted_reconstruction_ends_in_the_same_state(low_bit, tmp_path, monkeypatch):
    whole = copy.deepcopy(low_bit)
    reconstruct(whole, tmp_path / 'whole', iters=2, drop=0.5, compensate=True)
    cut, seen = copy.deepcopy(low_bit), []
    log = BlockReconstruction._log

    def stop(self, index, *args):
        log(self, index, *args)
        seen.append(index)
        if index == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(BlockReconstruction, '_log', stop)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(cut, tmp_path / 'cut', iters=2, drop=0.5, compensate=True)
    monkeypatch.undo()
    again = copy.deepcopy(low_bit)
    (tmp_path / 'cut' / '002.pth').write_bytes(b'damaged')
    reconstruct(again, tmp_path / 'cut', resume=True, iters=2, drop=0.5, compensate=True)
    for key, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_a_unit_that_diverges_gets_its_state_back_and_is_named(low_bit, tmp_path):
    detector = copy.deepcopy(low_bit)
    units = reconstruct(detector, tmp_path, rounding='latent', weight_lr=1e30, activation_lr=0, iters=2)
    for key, value in low_bit.state_dict().items():
        assert torch.equal(detector.state_dict()[key], value), key
    assert all(unit['outcome'] == 'restored' and math.isfinite(unit['after']) for unit in units)


@pytest.mark.thorough
def test_training_that_diverges_after_the_closed_form_helped_is_named(low_bit, tmp_path):
    detector = copy.deepcopy(low_bit)
    units = reconstruct(detector, tmp_path, compensate=True, rounding='latent', bias_lr=1e30, activation_lr=0, iters=4)
    with_bias = [u for u in units if getattr(detector.get_submodule(u['name']), 'bias', None) is not None]
    outcomes = [unit['outcome'] for unit in with_bias]
    assert set(outcomes) <= {'diverged', 'restored'} and outcomes.count('diverged') > 5
    assert all(math.isfinite(unit['after']) for unit in units)
    assert all(torch.isfinite(parameter).all() for parameter in detector.parameters())


def test_units_that_are_good_enough_are_left_alone(low_bit, tmp_path):
    detector = copy.deepcopy(low_bit)
    units = reconstruct(detector, tmp_path, skip_below=1e9)
    assert {unit['outcome'] for unit in units} == {'good enough'}
    assert all(torch.equal(v, low_bit.state_dict()[k]) for k, v in detector.state_dict().items())


@pytest.mark.thorough
def test_activations_that_do_not_fit_in_memory_change_nothing(low_bit, tmp_path):
    inside, outside = copy.deepcopy(low_bit), copy.deepcopy(low_bit)
    reconstruct(inside, tmp_path / 'a', iters=2)
    reconstruct(outside, tmp_path / 'b', iters=2, cache_gib=0)
    assert all(torch.equal(v, inside.state_dict()[k]) for k, v in outside.state_dict().items())
    assert not list((tmp_path / 'b').rglob('*.pt'))


@pytest.mark.thorough
def test_too_few_images_are_named_with_the_number_needed(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(
        'mmdet_ptq.calibration.reconstruction.method.print_log', lambda text, *args, **kwargs: told.append(text)
    )
    detector, _ = tiny_quantized('faster_rcnn', LOW_BIT)
    cfg = ReconstructConfig(iters=1, batch_size=1, holdout=0)
    BlockReconstruction(cfg).run(detector, [tiny_batch(1)], [], tmp_path, 0, False)
    assert any('are needed (`ptq.calibration.num_images`)' in text for text in told)


@pytest.mark.parametrize(
    'change,told',
    [
        (dict(iters=-1), '`key.iters` must not be negative'),
        (dict(rounding='ada'), 'Did you mean'),
        (dict(granularity='blok'), 'Did you mean'),
        (dict(drop=1.0), r'`key.drop` must lie in \[0, 1\)'),
        (dict(weight_lr=-1), '`key.weight_lr` must not be negative'),
    ],
)
def test_bad_settings(change, told):
    with pytest.raises(PTQError, match=told):
        ReconstructConfig(**change).check('key')


@pytest.mark.thorough
def test_fisher_weights_are_the_same_in_a_run_that_is_resumed(low_bit, tmp_path):
    first, second = copy.deepcopy(low_bit), copy.deepcopy(low_bit)
    torch.manual_seed(1)
    reconstruct(first, tmp_path / 'first', iters=0, compensate=True, fisher=1)
    torch.manual_seed(2)
    reconstruct(second, tmp_path / 'second', iters=0, compensate=True, fisher=1)
    for key, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key


def test_published_rounding_loss(low_bit, tmp_path, monkeypatch):
    """Squared errors summed over channels, their mean over positions, plus 0.01 times the sum of 1 - |2 h - 1|^beta."""
    compared = []

    def check(self, seed):
        data = self.data
        for name, weight in data.weights.items():
            weight.learn_rounding(float_weight(data.layers[name]))
        torch.manual_seed(0)
        total = self._loss(1.0)
        torch.manual_seed(0)
        samples = [data.train_samples[i] for i in torch.randint(len(data.train_samples), (data.batch_size,)).tolist()]
        published = torch.zeros(())
        if data.unit.calls == 1:
            (group,) = data._groups(0, samples)
            tensors, target = data._gather(0, group, False)
            output = data.streams.run(data.unit, 0, data.inputs[0][0], tensors)
            published = (output - target).square().sum(1).mean() + 0.01 * sum(
                (1 - (2 * w.rounding() - 1).abs().pow(2)).sum() for w in data.weights.values()
            )
            compared.append((total * data.energy, published))
        for name, weight in data.weights.items():
            weight.settle_rounding(float_weight(data.layers[name]))
        return UnitResult(data.unit.name, 1.0, 1.0)

    monkeypatch.setattr(UnitTrainer, 'run', check)
    reconstruct(copy.deepcopy(low_bit), tmp_path, granularity='block')
    assert len(compared) > 3
    for total, published in compared:
        torch.testing.assert_close(total, published)


def only(monkeypatch, *names):
    """Units whose names start with others are left out: most of a detector is not what a test is about."""

    def chosen(*args):
        units = [unit for unit in find_units(*args) if unit.name.startswith(names)]
        for unit in units:
            unit.needs = [None] * unit.calls
        return units

    monkeypatch.setattr('mmdet_ptq.calibration.reconstruction.method.find_units', chosen)


class Around(nn.Module):
    """A layer with operations before and after it."""

    def __init__(self, layer, before, after):
        super().__init__()
        self.layer, self.before, self.after = layer, before, after

    def forward(self, x):
        return self.after(self.layer(self.before(x)))


def changed_retinanet(change, bits=4):
    detector = tiny_detector('retinanet')
    change(detector.backbone)
    cfg = PTQConfig.from_dict({**LOW_BIT, 'activations': {**LOW_BIT['activations'], 'bits': bits}})
    structure = prepare_detector(detector, cfg, lambda: predict(detector, tiny_batch(1)))
    observe_activations(detector, [tiny_batch(2, seed=1)], structure)
    return detector


@pytest.mark.parametrize(
    'before,after',
    [
        (lambda x: x, lambda y: F.max_pool2d(y, 2)),
        (lambda x: F.avg_pool2d(x, 2), lambda y: F.interpolate(y, scale_factor=2)),
    ],
    ids=['larger', 'smaller'],
)
def test_weights_of_positions_count_only_where_the_layer_has_those_of_its_unit(tmp_path, monkeypatch, before, after):
    def change(backbone):
        backbone.conv1 = Around(backbone.conv1, before, after)

    only(monkeypatch, 'backbone.conv1')
    weights = []
    for fisher in (0, 0.9):
        detector = changed_retinanet(change)
        (unit,) = reconstruct(detector, tmp_path, compensate=True, iters=0, fisher=fisher)
        assert unit['name'] == 'backbone.conv1' and unit['outcome'] == 'trained'
        weights.append(float_weight(detector.backbone.conv1.layer).detach().clone())
    assert torch.equal(*weights)


@pytest.mark.thorough
def test_units_without_fisher_information_are_weighed_alike(tmp_path, monkeypatch):
    register(monkeypatch)
    only(monkeypatch, 'roi_head.bbox_head')
    # as of a RoI head that no adapter knows: the proposals alone are compared
    monkeypatch.setattr(two_stage, 'roi_problem', lambda roi_head: 'it is not known')
    detector, _ = tiny_quantized('cascade_rcnn', LOW_BIT)
    alike = reconstruct(copy.deepcopy(detector), tmp_path, iters=0, compensate=True)
    fisher = reconstruct(copy.deepcopy(detector), tmp_path, iters=0, compensate=True, fisher=1)
    assert len(alike) > 4 and all(unit['before'] > 0 for unit in alike)
    for first, second in zip(alike, fisher, strict=True):
        assert {**first, 'seconds': 0} == {**second, 'seconds': 0}


def test_tables_with_as_many_rows_as_a_batch_has_images_are_not_cut(tmp_path, monkeypatch):
    register(monkeypatch)
    only(monkeypatch, 'encoder', 'decoder.layers.0')
    detector, _ = tiny_quantized('deformable_detr', LOW_BIT)
    cfg = ReconstructConfig(granularity='block', compensate=False, search_scales=False, iters=2, skip_below=0)
    # two levels, two images
    units = BlockReconstruction(cfg).run(
        detector, [tiny_batch(2, seed=i) for i in (2, 3)], [tiny_batch(2, seed=5)], tmp_path, 0, False
    )
    assert units and all(unit['after'] <= unit['before'] for unit in units)


@pytest.mark.parametrize('table, cut', [(torch.ones(1, 2), True), (torch.ones(1, 2, dtype=torch.int64), False)])
def test_of_one_image_integers_may_be_a_table_with_one_row(table, cut):
    tensors = [torch.zeros(1, 3), table]
    streams = SimpleNamespace(
        batches=[SimpleNamespace(samples=['image'])],
        target=lambda *args: tensors[0],
        store=SimpleNamespace(get=tensors.__getitem__),
    )
    data = SimpleNamespace(
        inputs=[[CallInputs([0, 1], None, [0, 1])]], streams=streams, unit=Unit('unit', {}, 1, rows=[[1, 1, 1]])
    )
    assert UnitData._by_image(data, 0, 0) == cut


def test_a_unit_that_returns_nan_once_quantized_is_named(tmp_path, monkeypatch):
    def change(backbone):
        part = backbone.layer2[0].downsample
        part[0] = Around(part[0], nn.Identity(), lambda y: y / y.norm(dim=1, keepdim=True))

    only(monkeypatch, 'backbone.layer2.0.downsample')
    detector = changed_retinanet(change, bits=2)
    with pytest.raises(PTQError, match='the quantized unit backbone.layer2.0.downsample.0 has no finite error'):
        reconstruct(detector, tmp_path, compensate=True, search_scales=True, iters=2)


def test_a_unit_that_returns_nan_is_mended_where_that_can_be(low_bit, tmp_path, monkeypatch):
    only(monkeypatch, 'backbone.conv1')
    detector, errors = copy.deepcopy(low_bit), UnitData.errors

    def nan_at_first(self, samples, mix):
        nan = bool((float_weight(self.layers['backbone.conv1']) == original).all())
        return ((error * math.nan if nan else error, count) for error, count in errors(self, samples, mix))

    original = float_weight(detector.backbone.conv1).clone()
    monkeypatch.setattr(UnitData, 'errors', nan_at_first)
    (unit,) = reconstruct(detector, tmp_path, compensate=True, iters=0)
    assert unit['before'] == math.inf > unit['after'] and unit['outcome'] == 'trained'


def test_nan_of_the_float_detector_is_named(low_bit, tmp_path, monkeypatch):
    only(monkeypatch, 'backbone.layer1.0')
    detector = copy.deepcopy(low_bit)
    detector.backbone.layer1[0].conv1.bias.data[0] = math.nan
    with pytest.raises(PTQError, match='backbone.layer1.0.* returns NaN, infinity .* in the float'):
        reconstruct(detector, tmp_path, compensate=True)


def test_a_layer_that_reads_nothing_but_zeros_is_left_as_it_is(tmp_path, monkeypatch):
    only(monkeypatch, 'backbone.layer1.0')

    def change(backbone):
        backbone.layer1[0].bn1.bias.data.fill_(-50)

    detector = changed_retinanet(change)
    (unit,) = reconstruct(detector, tmp_path, compensate=True, iters=0, granularity='block')
    assert math.isfinite(unit['after']) and unit['outcome'] in ('trained', 'restored')


def test_equations_without_a_solution_name_the_layer_and_the_key(low_bit, tmp_path, monkeypatch):
    only(monkeypatch, 'backbone')
    with pytest.raises(PTQError, match=r'layer backbone\..* no finite solution; raise `ptq.reconstruct.damping`'):
        reconstruct(copy.deepcopy(low_bit), tmp_path, compensate=True, iters=0, damping=1e-12)
