"""Products of two activations: which are quantized, with what, and that the simulation multiplies what it says."""

import copy

import pytest
import torch
from dataflow_toys import outputs_of, toy
from torch import nn

from mmdet_ptq.errors import PTQError
from mmdet_ptq.wrapping import apply_structure, coverage_rows, integer_mac_share, quantization_mode
from mmdet_ptq.wrapping.structure import Structure

LEFT, RIGHT = 'attention:matmul/left', 'attention:matmul/right'
WEIGHTS, VALUES = 'attention:matmul-1/left', 'attention:matmul-1/right'


class Attention(nn.Module):
    """Of one head, among the pixels of an image, as they are written everywhere."""

    def __init__(self, multiply=torch.Tensor.__matmul__):
        super().__init__()
        self.qkv, self.proj, self.multiply = nn.Linear(4, 12), nn.Linear(4, 4), multiply

    def forward(self, x):
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1)
        weights = self.multiply(q * 0.5, k.transpose(1, 2)).softmax(-1)
        return self.proj(self.multiply(weights, v)).transpose(1, 2).view_as(x)


def attending(ptq=None, **options):
    return toy(lambda self, a, b: self.attention(a + b), ptq, attention=Attention(**options))


@pytest.mark.parametrize('dataflow', [None, 'speed'])
def test_both_factors_have_one_scale_and_no_zero_point(dataflow):
    detector, structure, image = attending(dict(dataflow=dataflow))
    assert [product['factors'] for product in structure.products] == [[LEFT, RIGHT], [WEIGHTS, VALUES]]
    assert {product['macs'] for product in structure.products} == {2 * 64 * 64 * 4} and not structure.uncovered
    for name in (LEFT, RIGHT, WEIGHTS, VALUES):
        quantizer = detector.ptq.activations[name]
        # what a softmax gives is never negative: all 256 codes are for what there is; and 2 * 255 * 64 < 2 ** 15
        ends = {LEFT: (True, (-128, 127)), WEIGHTS: (False, (0, 255))}.get(name, (True, (-64, 63)))
        assert (quantizer.symmetric, quantizer.code_range) == ends
        assert quantizer.scale.dim() == 0 and quantizer.zero_point == 0
    assert integer_mac_share(structure) == 1
    rows = {row.name: row for row in coverage_rows(structure)}
    row = rows['attention:matmul']
    assert (row.kind, row.part, row.integer) == ('product of activations', 'attention', True)
    with quantization_mode(detector, 'float'):
        expected = detector(image)
    assert expected.sub(detector(image)).norm() < 0.05 * expected.norm()


def test_what_a_linear_layer_writes_for_float_operations_alone_is_not_rounded_twice():
    _, structure, _ = attending()
    assert outputs_of(structure)['attention.qkv'] == []
    # nothing multiplies: the layer's output is read in float all the same
    _, structure, _ = attending(dict(products='float'))
    assert outputs_of(structure)['attention.qkv'] == [] and len(structure.uncovered) == 2
    # a sum that is quantized reads it
    _, structure, _ = toy(lambda self, a, b: self.fc(a.transpose(1, 3)).transpose(1, 3) + b, fc=nn.Linear(4, 4))
    assert outputs_of(structure)['fc'] == ['fc:out']


@torch.no_grad()
def test_the_simulation_multiplies_the_rounded_factors():
    detector, _, image = attending(dict(dataflow=None))
    seen = []
    detector.attention.multiply = lambda a, b: seen.append((a, b)) or torch.einsum('bij,bjk->bik', a, b)
    # another function is called where none is looked for: float
    plain = detector(image)
    detector.attention.multiply = torch.Tensor.__matmul__
    q, k = seen[0]
    ptq = detector.ptq.activations
    detector.attention.proj.register_forward_pre_hook(lambda _, args: seen.append(args))
    found = detector(image)
    weights = (ptq[LEFT](q) @ ptq[RIGHT](k)).softmax(-1)
    expected = ptq['attention/proj'](ptq[WEIGHTS](weights) @ ptq[VALUES](seen[1][1]))
    torch.testing.assert_close(seen[-1][0], expected, atol=1e-6, rtol=1e-5)
    assert not torch.equal(found, plain)


def test_scales_of_factors_learn():
    detector, _, image = attending()
    detector(image).square().sum().backward()
    for name in (LEFT, RIGHT, WEIGHTS, VALUES):
        gradient = detector.ptq.activations[name].scale.grad
        assert gradient is not None and gradient.isfinite() and gradient != 0


@pytest.mark.parametrize('multiply', [torch.matmul, torch.bmm, torch.Tensor.bmm])
def test_however_a_product_is_written(multiply):
    _, structure, _ = attending(multiply=multiply)
    assert len(structure.products) == 2 and not structure.uncovered


@pytest.mark.parametrize(
    'multiply',
    [
        lambda a, b: torch.einsum('bij,bjk->bik', a, b),  # exporters keep it as it is
        lambda a, b: torch.matmul(input=a, other=b),
        lambda a, b: torch.baddbmm(torch.zeros(()), a, b),
    ],
)
def test_what_is_written_otherwise_is_told_as_float(multiply):
    _, structure, _ = attending(multiply=multiply)
    assert not structure.products
    assert [op['reason'] for op in structure.uncovered] == ['activation x activation product'] * 2


def test_some_of_a_modules_products_are_quantized():
    class Both(Attention):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return super().forward((x.transpose(1, 3) @ self.matrix).transpose(1, 3))

    _, structure, _ = toy(lambda self, a, b: self.attention(a + b), attention=Both())
    assert [product['index'] for product in structure.products] == [1, 2]
    assert [op['reason'] for op in structure.uncovered] == ['a parameter of a module that is no layer']


def test_what_is_no_product_of_two_activations_for_layers_stays_as_it_is():
    class Others(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(64, 64))

        def forward(self, x):
            return (x.flatten(2) @ self.matrix).view_as(x)

    _, structure, _ = toy(lambda self, a, b: self.others(a + b), others=Others())
    assert not structure.products
    assert [op['reason'] for op in structure.uncovered] == ['a parameter of a module that is no layer']
    # what no layer reads any more, as masks out of queries and features, is an output of the head

    class Masks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.a(x).flatten(2).transpose(1, 2) @ self.b(x).flatten(2)

    detector, structure, _ = toy(lambda self, a, b: a + b, bbox_head=Masks())
    assert not structure.products


def test_where_the_right_factor_is_never_negative_a_product_is_float():
    class Pooling(nn.Module):  # as in GCNet
        def __init__(self):
            super().__init__()
            self.mask, self.add = nn.Conv2d(4, 1, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            weights = self.mask(x).flatten(2).softmax(-1).transpose(1, 2)
            return x + self.add((x.flatten(2) @ weights)[..., None])

    _, structure, _ = toy(lambda self, a, b: self.pooling(a + b), pooling=Pooling())
    assert not structure.products
    assert [op['reason'] for op in structure.uncovered] == ['activation x activation product']


def test_joined_tensors_are_never_negative_where_none_of_them_is():
    class Levels(nn.Module):  # as TOOD weighs the layers of its tower
        def __init__(self, act):
            super().__init__()
            self.weigh, self.end, self.act = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1), act

        def forward(self, x):
            kept = torch.cat([x.relu(), self.act(-x)], 1)
            weights = self.weigh(x).mean((2, 3))[:, None] * self.weigh.weight[:, :1, 0, 0]
            return self.end((weights @ kept.flatten(2)).view_as(kept))

    assert not toy(lambda self, a, b: self.levels(a + b), levels=Levels(nn.ReLU()))[1].products
    assert toy(lambda self, a, b: self.levels(a + b), levels=Levels(nn.Tanh()))[1].products


def test_factors_have_the_bits_of_the_layers_beside_them():
    wide = dict(activations=dict(bits=16))
    _, structure, _ = attending(dict(overrides={'attention': wide}))
    assert {structure.activations[name].spec['bits'] for name in (LEFT, RIGHT, WEIGHTS, VALUES)} == {16}


def test_among_float_layers_a_product_is_float():
    for override in ({'attention': 'float'}, {'attention.*': 'float'}):
        _, structure, _ = attending(dict(overrides=override))
        assert not structure.products and len(structure.uncovered) == 2
    _, structure, _ = attending(dict(overrides={'attention.proj': 'float'}))
    assert not structure.products  # nothing in integers reads it
    _, structure, _ = attending(dict(activations=dict(bits=4, observer=dict(type='mmdet_ptq.MinMaxObserver'))))
    assert {structure.activations[name].spec['bits'] for name in (LEFT, WEIGHTS)} == {8}
    _, structure, _ = attending(dict(saturation='ignore'))
    assert {structure.activations[name].spec['bits'] for name in (LEFT, RIGHT, WEIGHTS, VALUES)} == {8}


def test_formats_without_codes_without_sign_have_none_here():
    detector, _, _ = attending(
        dict(activations=dict(quantizer=dict(symmetric=True), observer=dict(type='mmdet_ptq.MinMaxObserver')))
    )
    assert all(detector.ptq.activations[name].symmetric for name in (LEFT, RIGHT, WEIGHTS, VALUES))
    narrow = dict(quantizer=dict(narrow_range=True), observer=dict(type='mmdet_ptq.MinMaxObserver'))
    detector, _, _ = attending(dict(activations=narrow))
    assert detector.ptq.activations[WEIGHTS].zero_point == 0 and detector.ptq.activations[LEFT].code_range[0] == -127


def test_a_structure_with_products_is_built_again():
    detector, structure, image = attending()
    torch.manual_seed(0)
    plain = toy(lambda self, a, b: self.attention(a + b), dict(products='float'), attention=Attention())[0]
    assert not plain.ptq.flow.places.keys() & {('attention', 0, '__matmul__', 0)}
    other = copy.deepcopy(detector)
    assert torch.equal(other(image), detector(image))
    stored = structure.to_dict()
    assert Structure.from_dict(stored).products == structure.products
    del stored['products']  # as of older versions
    assert Structure.from_dict(stored).products == []
    for change in (dict(factors=[LEFT]), dict(factors=[LEFT, 'nothing']), dict(macs=-1), dict(module='nowhere')):
        broken = Structure.from_dict({**structure.to_dict(), 'products': structure.products[:1]})
        with pytest.raises((PTQError, ValueError)):
            data = {**broken.to_dict(), 'products': [{**structure.products[0], **change}]}
            read = Structure.from_dict(data)
            read.check()
            apply_structure(nn.Module(), read)


def test_the_block_and_the_first_runtime_choose():
    from mmdet_ptq.config import PTQConfig

    def chosen(**block):
        return PTQConfig.from_dict(dict(preset='w8a8_observe', **block)).products

    assert (chosen(), chosen(export=['openvino']), chosen(export=['ncnn'])) == ('integer', 'integer', 'float')
    assert chosen(export=['ncnn'], products='integer') == 'integer'
    with pytest.raises(PTQError, match="`ptq.products` is 'integers', which is unknown. Did you mean 'integer'?"):
        chosen(products='integers')
