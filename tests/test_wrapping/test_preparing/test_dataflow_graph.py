"""What lies between quantized layers, asked of operations that are written down by hand."""

import pytest
from torch import nn

from mmdet_ptq.wrapping.preparing.dataflow_graph import DataflowGraph
from mmdet_ptq.wrapping.structure import ActivationStructure, LayerStructure, Structure
from mmdet_ptq.wrapping.watching.operations import ARITHMETIC, LAYER, MOVEMENT, UNKNOWN
from mmdet_ptq.wrapping.watching.recorder import Operation, Recorder

SPEC = dict(type='mmdet_ptq.AffineQuantizer', bits=8, num_channels=None)
# image -> first -> a -> relu -> b -> strange -> c -> moved -> d -> second -> e; e and b -> add -> f -> head -> g
MODULES = {name: nn.Conv2d(4, 4, 3) for name in ('first', 'second', 'head')}
IMAGE, A, B, C, D, E, F, G = ((number, 0) for number in range(8))


def layer(name, source, target):
    return Operation(LAYER, name, (name, 0), [source], [target])


def operation(kind, name, inputs, target):
    return Operation(kind, name, ('', 0, name, 0), inputs, [target])


@pytest.fixture
def graph():
    operations = [
        layer('first', IMAGE, A),
        operation(ARITHMETIC, 'relu', [A], B),
        operation(UNKNOWN, 'strange', [B], C),
        operation(MOVEMENT, 'reshape', [C], D),
        layer('second', D, E),
        operation(ARITHMETIC, 'add', [E, B], F),
        layer('head', F, G),
    ]
    names = [op.name for op in operations if op.kind == LAYER]
    layers = [LayerStructure(name, 'linear', 'neck', 1, 1, dict(SPEC), [name]) for name in names]
    activations = {name: ActivationStructure(dict(SPEC), 1) for name in names}
    structure = Structure(layers=layers, activations=activations)
    return DataflowGraph(Recorder(operations), structure, {'head'}, MODULES, multiplied=False)


def test_integers_go_through_known_operations_alone(graph):
    assert [graph.made_of_integers(key) for key in (IMAGE, A, B, C, D, E, F, G)] == [False, *[True] * 2] + [
        False,
        False,
        True,
        True,
        False,  # what the head puts out is not followed
    ]
    assert [graph.becomes_integers(key) for key in (IMAGE, A, B, C, D, E, F, G)] == [*[True] * 7, False]
    assert graph.come_from_layers([C]) and graph.come_from_layers([D]) and not graph.come_from_layers([IMAGE, G])
    assert graph.lead_to_layers([A]) and not graph.lead_to_layers([G])


def test_what_lies_between_is_quantized_and_what_stays_float_is_told(graph):
    assert [op.name for op in graph.operations if graph.between(op)] == ['first', 'relu', 'second', 'add', 'head']
    assert [op.name for op in graph.reads_values(B)] == ['strange', 'add']
    assert graph.islands() == [dict(module='', operation='strange', reason='no 8-bit form of it is known')]
    assert graph.origin(D) is None and graph.origin(E).name == 'second'


@pytest.mark.parametrize(
    'head, float_output',
    [
        (nn.Conv2d(4, 4, 1), True),
        (nn.Linear(4, 4), True),
        (nn.Conv2d(4, 4, 3), False),
        (nn.Conv2d(4, 4, 1, stride=2), False),
        (nn.Conv2d(4, 4, 1, padding=1), False),
        (nn.Conv2d(4, 4, 1, groups=2), False),
        (nn.ConvTranspose2d(4, 4, 1), False),
    ],
)
def test_what_a_head_puts_out_stays_float_where_it_is_a_product_of_matrices(graph, monkeypatch, head, float_output):
    monkeypatch.setitem(MODULES, 'head', head)
    operations = graph.operations
    assert graph.between(operations[-1]) is graph.writes_output(operations[-1]) is not float_output
    # and nothing else changes
    assert [op.name for op in operations if graph.between(op)][:4] == ['first', 'relu', 'second', 'add']


def test_an_operation_behind_floats_is_told_so(graph):
    graph.operations.insert(4, operation(ARITHMETIC, 'mul', [C], D))
    structure = Structure([], {}, [*graph.layers.values()], graph.entries)
    again = DataflowGraph(Recorder(graph.operations), structure, set(), MODULES, multiplied=False)
    assert again.islands()[1] == dict(module='', operation='mul', reason='float operations stand before it')
