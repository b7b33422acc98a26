"""Whether attention's products of two activations are worth integers: softmax(q k^T) v in float and in 8 bits.

python benchmarks/attention.py

The sizes are those of DETR's encoder on an image of 800 x 1333, of a decoder of 300 queries, and of the windows of a
Swin transformer's first stage. Float and integers run in turn; the fastest of all rounds counts.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper, numpy_helper

from mmdet_ptq.analysis import versions

# heads times images or windows, tokens, channels of a head
SIZES = {'encoder': (8, 1050, 32), 'decoder': (8, 300, 32), 'windows': (1596, 49, 32)}


def attention(size: tuple[int, int, int], integers: bool) -> bytes:
    """A model of three inputs; with ``integers``, every factor is quantized, as mmdet-ptq exports products."""
    nodes, constants = [], []

    def node(kind: str, *inputs: str, **attributes) -> str:
        nodes.append(helper.make_node(kind, inputs, [f't{len(nodes)}'], **attributes))
        return nodes[-1].output[0]

    def quantized(x: str, scale: float, zero: int) -> str:
        if not integers:
            return x
        names = [f'{name}{len(constants)}' for name in ('scale', 'zero')]
        arrays = (np.float32(scale), np.uint8(zero))
        constants.extend(numpy_helper.from_array(a, n) for a, n in zip(map(np.asarray, arrays), names, strict=True))
        return node('DequantizeLinear', node('QuantizeLinear', x, *names), *names)

    q, k, v = (quantized(x, 0.05, 128) for x in 'qkv')
    scores = node('MatMul', q, quantized(node('Transpose', k, perm=[0, 2, 1]), 0.05, 128))
    weights = quantized(node('Softmax', scores, axis=-1), 1 / 255, 0)
    out = node('MatMul', weights, v)
    inputs = [helper.make_tensor_value_info(x, TensorProto.FLOAT, size) for x in 'qkv']
    outputs = [helper.make_tensor_value_info(out, TensorProto.FLOAT, size)]
    graph = helper.make_graph(nodes, 'attention', inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 21)])
    model.ir_version = 10
    onnx.checker.check_model(model)
    return model.SerializeToString()


def in_onnxruntime(model: bytes) -> Callable[[Sequence[np.ndarray]], np.ndarray]:
    """The model as a function, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=['CPUExecutionProvider'])
    return lambda inputs: session.run(None, dict(zip('qkv', inputs, strict=True)))[0]


def in_openvino(model: bytes) -> Callable[[Sequence[np.ndarray]], np.ndarray]:
    """The same."""
    options = {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': 1}
    compiled = openvino.Core().compile_model(openvino.convert_model(io.BytesIO(model)), 'CPU', options)
    return lambda inputs: compiled(list(inputs))[0]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=40)
    args = parser.parse_args(argv)
    told = versions()
    print(f'{told["processor"]}, ONNX Runtime {onnxruntime.__version__}, OpenVINO {openvino.__version__}, one thread')
    for name, size in SIZES.items():
        inputs = [np.random.default_rng(i).normal(size=size).astype(np.float32) for i in range(3)]
        for runtime, opened in (('onnxruntime', in_onnxruntime), ('openvino', in_openvino)):
            models = [opened(attention(size, integers)) for integers in (False, True)]
            times: list[list[float]] = [[], []]
            for _ in range(args.rounds):
                for model, seconds in zip(models, times, strict=True):
                    start = time.perf_counter()
                    model(inputs)
                    seconds.append(time.perf_counter() - start)
            plain, integers = (1000 * min(seconds) for seconds in times)
            ratio = plain / integers
            print(
                f'{name} {size}, {runtime}: float {plain:.2f} ms, integers {integers:.2f} ms, {ratio:.2f} times float'
            )


if __name__ == '__main__':
    main()
