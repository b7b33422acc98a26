"""A byte of an exported model that changed is noticed, in any of its files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mmdet_ptq import PTQError
from mmdet_ptq.deploy import open_model
from mmdet_ptq.deploy.ncnn.format import NcnnLayer, floats, write_network
from mmdet_ptq.deploy.network.seal import BLANK, seal

OLD = Path(__file__).resolve().parents[2] / 'old_files' / 'schema_3' / 'model.onnx'


@pytest.fixture
def sealed(tmp_path):
    """The old model as this version would have written it."""
    onnx = pytest.importorskip('onnx', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
    pytest.importorskip('onnxruntime', reason="needs pip install 'mmdet-ptq[onnxruntime]'")
    model = onnx.load(OLD)
    entry = next(e for e in model.metadata_props if e.key == 'mmdet_ptq')
    entry.value = json.dumps({**json.loads(entry.value), 'checksum': BLANK})
    (tmp_path / 'model.onnx').write_bytes(seal(model.SerializeToString()))
    return tmp_path / 'model.onnx'


def test_a_sealed_model_opens_and_does_not_tell_its_checksum(sealed):
    assert open_model(sealed).meta == open_model(OLD).meta


def test_flipped_bits_of_an_onnx_file_are_refused(sealed):
    content, generator, checksum = sealed.read_bytes(), np.random.default_rng(0), 0
    for _ in range(40):
        damaged = bytearray(content)
        damaged[generator.integers(len(content))] ^= 1 << int(generator.integers(8))
        sealed.write_bytes(damaged)
        with pytest.raises(PTQError) as error:
            open_model(sealed)
        assert '\n' not in str(error.value)
        checksum += 'the checksum is another' in str(error.value)
    # most bytes are weights
    assert checksum > 20


def test_flipped_bits_of_ncnn_weights_are_refused(tmp_path):
    pytest.importorskip('ncnn', reason="needs pip install 'mmdet-ptq[ncnn]'")
    meta = dict(format='mmdet_ptq.ncnn', version='0', runtime='ncnn', input_shape=[1, 3, 4, 4], dynamic_batch=False)
    layers = [
        NcnnLayer('Input', 'in0', [], ['in0']),
        NcnnLayer('Bias', 'x', ['in0'], ['out0'], {0: '3'}, floats([1, 2, 3])),
    ]
    path = write_network(layers, tmp_path, {**meta, 'outputs': [0], 'raw_shapes': [[3, 4, 4]], 'layers': {}})
    image = np.zeros((1, 3, 4, 4), np.float32)
    assert open_model(path)(image)[0][0, :, 0, 0].tolist() == [1, 2, 3]
    weights = bytearray((tmp_path / 'model.bin').read_bytes())
    weights[3] ^= 1
    (tmp_path / 'model.bin').write_bytes(weights)
    with pytest.raises(PTQError, match='the checksum is another'):
        open_model(path)


def test_a_text_without_a_place_is_no_model():
    with pytest.raises(ValueError, match='one place'):
        seal(b'nothing')
