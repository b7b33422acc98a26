"""What a runtime says of the graph that it wants is what is written."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from mmdet.models.detectors import SingleStageDetector
from torch import nn

from mmdet_ptq.calibration import observe_activations
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.deploy import export_onnx, get_runtime
from mmdet_ptq.deploy.network.raw_outputs import RawOutputs
from mmdet_ptq.deploy.onnx.dialect import Dialect
from mmdet_ptq.errors import PTQError
from mmdet_ptq.registry import runtime_names
from mmdet_ptq.wrapping import prepare_detector

onnx = pytest.importorskip('onnx', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
pytest.importorskip('onnxscript', reason="needs pip install 'mmdet-ptq[onnxruntime]'")

from onnx.reference import ReferenceEvaluator  # noqa: E402

SHAPE = (1, 3, 8, 8)


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.other = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.conv(x).relu()
        return (x + self.other(x),)


class Head(nn.Module):
    def __init__(self, train_cfg, test_cfg):
        super().__init__()
        self.predicted = nn.Conv2d(4, 2, 1)

    def forward(self, features):
        return ([self.predicted(level) for level in features],)

    def predict(self, features, samples, rescale):
        self(features)
        return []


class Preprocessor(nn.Module):
    def forward(self, data, training=False):
        return data


@pytest.fixture(scope='module')
def detector():
    """Three convolutions, between which something is computed; the last one reads 5 bits, and 'other' reads 16."""
    torch.manual_seed(0)
    made = SingleStageDetector(
        backbone=dict(type=Stem), bbox_head=dict(type=Head), data_preprocessor=Preprocessor()
    ).eval()
    batch, given = torch.randn(2, *SHAPE[1:]), dict(activations=dict(bits=5))
    ptq = dict(
        preset='w8a8_observe',
        dataflow='full',
        activations=dict(observer=dict(type='mmdet_ptq.MinMaxObserver')),
        overrides={'bbox_head.predicted': given, 'backbone.conv': dict(activations=dict(bits=16))},
    )
    structure = prepare_detector(made, PTQConfig.from_dict(ptq), lambda: made(batch, None, mode='tensor'))
    observe_activations(made, [dict(inputs=batch, data_samples=[])], structure)
    return made.requires_grad_(False)


@pytest.fixture
def written(detector, tmp_path, monkeypatch):
    """Exports in a dialect and returns the graph's model."""
    path = tmp_path / 'model.onnx'

    def write(dialect=None, **options):
        monkeypatch.setattr(get_runtime('onnxruntime'), 'dialect', classmethod(lambda cls: dialect or Dialect()))
        export_onnx(detector, path, SHAPE, **options)
        return onnx.load(path)

    write.path = path
    return write


def count(model, kind):
    return sum(node.op_type == kind for node in model.graph.node)


def codes(model):
    """Types of the codes of activations."""
    told = onnx.shape_inference.infer_shapes(model).graph.value_info
    types = {value.name: value.type.tensor_type.elem_type for value in told}
    names = [node.output[0] for node in model.graph.node if node.op_type == 'QuantizeLinear']
    return sorted(onnx.TensorProto.DataType.Name(types[name]) for name in names)


@pytest.mark.thorough
def test_by_default_every_quantizer_is_written_as_it_is_simulated(detector, written):
    model, image = written(), torch.randn(SHAPE)
    assert codes(model) == ['UINT16', 'UINT8', 'UINT8', 'UINT8']
    # values are bounded before 5 bits are rounded
    assert [count(model, kind) for kind in ('Max', 'Min', 'Clip', 'Conv')] == [1, 1, 0, 3]
    with torch.no_grad():
        (expected,) = RawOutputs(detector)(image)
    (found,) = ReferenceEvaluator(model).run(None, {'input': image.numpy()})
    # a code on a boundary may fall to the other side
    assert np.isclose(found, expected, rtol=1e-4, atol=1e-5).mean() > 0.95
    # what the runtime is known by in the file stays its name
    with pytest.raises(FrozenInstanceError):
        Dialect().unsigned = True


def test_quantizers_are_left_out_and_bounded_as_the_runtime_wants(written):
    model = written(Dialect(between_layers=False, clip_codes=True, rounds_wide=False))
    # of four one stands between the layers, and one has 16 bits
    assert codes(model) == ['UINT8'] * 2
    # values are bounded at the ends of 16 bits, and codes of 5
    assert [count(model, kind) for kind in ('Max', 'Min', 'Clip')] == [1, 1, 1]


@pytest.mark.thorough
def test_changes_are_made_in_their_order_and_packings_behind_them_unless_refused(written):
    seen = []

    def note(name):
        return lambda graph: seen.append((name, sum(node.op_type == 'QuantizeLinear' for node in graph)))

    dialect = Dialect(passes=(note('first'), note('second')), packings=(note('packing'),))
    short = written(dialect)
    assert seen == [('first', 4), ('second', 4), ('packing', 4)]
    seen.clear()
    # names that nobody reads stay where they are wanted
    long = written(replace(dialect, compact=False), packed=False)
    assert [name for name, _ in seen] == ['first', 'second']
    assert [count(model, 'Conv') for model in (short, long)] == [3, 3]
    named = [{node.name for node in model.graph.node if node.op_type == 'QuantizeLinear'} for model in (short, long)]
    assert 'backbone/conv:codes' in named[1] and not named[0] & named[1]


def test_a_model_that_breaks_a_rule_of_the_runtime_is_not_written(written):
    given = []

    def refuse(model):
        given.append(model)
        raise PTQError('no.')

    with pytest.raises(PTQError, match='no.'):
        written(Dialect(check=refuse))
    assert not written.path.exists()
    assert {node.op_type for node in given[0].graph.node} >= {'Conv', 'QuantizeLinear'}


def test_every_runtime_that_reads_onnx_says_how():
    told = {}
    for name in runtime_names():
        try:
            told[name] = get_runtime(name).dialect()
        except PTQError as error:
            assert f'{name} reads no ONNX files' in str(error)
    assert set(told) == {'onnxruntime', 'openvino', 'tensorrt'}
    assert all(isinstance(dialect, Dialect) and dialect != Dialect() for dialect in told.values())
