import copy

import pytest
import torch

from mmdet_ptq.deploy import load_quantized_state, quantized_state, read_quantized, save_quantized, settle_biases
from mmdet_ptq.deploy.checkpoint.packing import unflatten_tensors
from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import raw_outputs, tiny_detector, tiny_model_cfg, tiny_quantized
from mmdet_ptq.wrapping import freeze_weights, quantized_weights, thaw_weights

MIN_MAX = dict(observer=dict(type='mmdet_ptq.MinMaxObserver'))
CASES = {
    'yolox-w8a8': ('yolox', dict(preset='w8a8_observe', activations=MIN_MAX)),
    'retinanet-w4a8': ('retinanet', dict(preset='w4a8', activations=MIN_MAX)),
    'yolox-w4a4': ('yolox', dict(preset='w4a4', activations=MIN_MAX)),
    'rtmdet-w8a16': ('rtmdet', dict(preset='w8a8_observe', activations=dict(bits=16, **MIN_MAX))),
}


@pytest.fixture(scope='module', params=CASES.values(), ids=CASES)
def case(request, tmp_path_factory):
    kind, ptq = request.param
    detector, structure = tiny_quantized(kind, ptq)
    settle_biases(detector, structure)
    path = tmp_path_factory.mktemp('checkpoint') / 'quantized.pth'
    config = dict(model=tiny_model_cfg(kind), hook=dict(type=torch.nn.Conv2d), ids={1, 2})
    save_quantized(path, quantized_state(detector, structure, config, dict(classes=('a', 'b', 'c'))))
    return kind, detector, structure, path


@pytest.fixture(scope='module')
def loaded(case):
    kind, _, _, path = case
    # other weights than the ones that were quantized: all numbers must come from the file
    detector = tiny_detector(kind, seed=5)
    load_quantized_state(detector, read_quantized(path))
    return detector.eval()


@pytest.mark.thorough
def test_outputs_are_bit_identical(case, loaded):
    detector = copy.deepcopy(case[1])
    freeze_weights(detector)
    before, after = raw_outputs(detector), raw_outputs(loaded)
    # scores and boxes of every level, and YOLOX's objectness
    assert len(before) == len(after) == dict(yolox=6, retinanet=6, rtmdet=4)[case[0]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_structure_survives(case):
    state = read_quantized(case[3])
    detector = tiny_detector(case[0])
    assert load_quantized_state(detector, state) == case[2]
    assert state['dataset_meta']['classes'] == ('a', 'b', 'c')
    assert state['config']['hook']['type'] == 'torch.nn.modules.conv.Conv2d'


def test_loads_without_pickle_and_holds_no_float_weights(case):
    assert all(
        isinstance(value, (str, int, dict, torch.Tensor)) for value in torch.load(case[3], weights_only=True).values()
    )
    state = read_quantized(case[3])
    names = [entry[0] for entry in state['tensors']['index']]
    assert not [n for n in names if n.endswith('weight.original')]
    bits = sum(8 * -(-torch.Size(e['rows']).numel() * e['bits'] // 8) for e in state['layers'].values())
    stored = sum(torch.Size(e[2]).numel() for e in state['codes']['index'])
    assert stored * 8 == bits


def test_thawed_detector_answers_the_same_and_learns(case, loaded):
    detector = copy.deepcopy(loaded)
    frozen = raw_outputs(detector)
    thaw_weights(detector)
    for a, b in zip(frozen, raw_outputs(detector), strict=True):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max()
    outputs = detector(**_data(detector), mode='tensor')
    sum(t.square().sum() for group in outputs for t in group).backward()
    learnable = {
        f'{name}.{kind}': parameter
        for name, quantizer in [
            *((n, w.quantizer) for n, w in quantized_weights(detector).items()),
            *detector.ptq.activations.items(),
        ]
        for kind, parameter in quantizer.learnable().items()
    }
    assert len(learnable) >= len(case[2].layers)
    assert not [n for n, p in learnable.items() if p.grad is None or not torch.isfinite(p.grad).all()]
    still = [n for n, p in learnable.items() if not p.grad.any()]
    assert not still


def _data(detector):
    from mmdet_ptq.testing import tiny_batch

    return detector.data_preprocessor(tiny_batch(2), False)


@pytest.mark.parametrize('other', ['ssd', 'retinanet'])
def test_another_architecture_is_refused(case, other):
    if other == case[0]:
        detector = tiny_detector(other)
        detector.bbox_head.retina_cls = torch.nn.Conv2d(16, 5, 3, padding=1)
    else:
        detector = tiny_detector(other)
    with pytest.raises(PTQError) as error:
        load_quantized_state(detector, read_quantized(case[3]))
    assert '\n' not in str(error.value)


def test_quantizing_twice_is_refused(case, loaded):
    with pytest.raises(PTQError, match='already quantized'):
        load_quantized_state(copy.deepcopy(loaded), read_quantized(case[3]))


def test_a_float_checkpoint_is_refused(tmp_path):
    torch.save(dict(state_dict=dict(w=torch.ones(1))), tmp_path / 'float.pth')
    with pytest.raises(PTQError, match='no quantized checkpoint'):
        read_quantized(tmp_path / 'float.pth')


def test_a_checkpoint_without_its_schema_is_refused(case, tmp_path):
    torch.save(dict(format=read_quantized(case[3])['format']), tmp_path / 'bare.pth')
    with pytest.raises(PTQError, match='is damaged; run tools/ptq.py again'):
        read_quantized(tmp_path / 'bare.pth')


def test_another_schema_is_refused(case, tmp_path):
    state = read_quantized(case[3])
    save_quantized(tmp_path / 'older.pth', {**state, 'schema': 1})
    with pytest.raises(PTQError, match='run tools/ptq.py again'):
        read_quantized(tmp_path / 'older.pth')
    save_quantized(tmp_path / 'newer.pth', {**state, 'schema': 99, 'version': '9.0'})
    with pytest.raises(PTQError, match=r'newer mmdet-ptq \(9.0\)'):
        read_quantized(tmp_path / 'newer.pth')


def test_the_schema_before_is_read(case, loaded, tmp_path):
    state = {**read_quantized(case[3]), 'schema': 2}
    for group in ('codes', 'tables', 'tensors'):
        tensors, index, data, ends = unflatten_tensors(state[group]), [], {}, {}
        for name, tensor in tensors.items():
            dtype = str(tensor.dtype).removeprefix('torch.')
            index.append([name, dtype, list(tensor.shape), ends.get(dtype, 0) if tensor.any() else -1])
            if tensor.any():
                ends[dtype] = ends.get(dtype, 0) + tensor.numel()
                data.setdefault(dtype, []).append(tensor.reshape(-1))
        state[group] = dict(index=index, data={dtype: torch.cat(parts) for dtype, parts in data.items()})
    torch.save(state, tmp_path / 'schema2.pth')
    assert (tmp_path / 'schema2.pth').stat().st_size > 1.05 * case[3].stat().st_size
    detector = tiny_detector(case[0], seed=6)
    load_quantized_state(detector, read_quantized(tmp_path / 'schema2.pth'))
    assert all(torch.equal(a, b) for a, b in zip(raw_outputs(detector.eval()), raw_outputs(loaded), strict=True))


def test_a_damaged_text_is_refused(case, tmp_path):
    state = torch.load(case[3], weights_only=True)
    for text in (state['text'][:-20], torch.zeros(8, dtype=torch.uint8)):
        torch.save({**state, 'text': text}, tmp_path / 'damaged.pth')
        with pytest.raises(PTQError, match='damaged'):
            read_quantized(tmp_path / 'damaged.pth')
