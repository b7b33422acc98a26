"""TensorRT on an NVIDIA GPU."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import print_log
from torch import nn

from mmdet_ptq.deploy.network.parts import part_path
from mmdet_ptq.deploy.onnx.dialect import Dialect
from mmdet_ptq.deploy.onnx.export import export_onnx, model_meta
from mmdet_ptq.deploy.requirements import ONNX, require
from mmdet_ptq.deploy.runtime import IntegerCoverage, Runtime, remove_parts
from mmdet_ptq.deploy.tensorrt.rules import check_tensorrt_formats, check_tensorrt_model, check_tensorrt_rules
from mmdet_ptq.errors import PTQError
from mmdet_ptq.files import remove, write_atomic
from mmdet_ptq.registry import RUNTIMES
from mmdet_ptq.wrapping import Structure

# images, and regions, in one run of an engine whose number of them was left open
MAX_BATCH, MAX_REGIONS = 32, 1000
# --int8 is gone since TensorRT 11; 10 and 11 both know strongly typed networks, where Q/DQ alone decide
TRTEXEC = 'trtexec --onnx=model.onnx --saveEngine=model.engine --stronglyTyped --noTF32 --profilingVerbosity=detailed'
_ONNX_LAYER = re.compile(r'\[ONNX Layer: ([^]]+)]')


@RUNTIMES.register_module(name='tensorrt')
class TensorRT(Runtime):
    """Runs ``model.engine`` in TensorRT; the ``model.onnx`` it was built from lies beside it. See :class:`Runtime`.

    Args:
        path: The ``.engine``, built on a GPU like this one by the TensorRT that is installed.
        threads: Has no meaning on a GPU.
    """

    name = 'tensorrt'
    suffix = '.engine'
    source = '.onnx'
    takes_parts = True
    # its parser comes with ONNX 1.17, that is with opset 21, since 10.6
    packages = ('tensorrt>=10.6',)
    # no more: ``model.onnx`` can be written where no engine can be built
    export_packages = ONNX

    def __init__(self, path: str | os.PathLike, threads: int | None = None) -> None:
        self.check()
        import onnx
        import tensorrt

        source, path = Path(path).with_suffix(self.source), os.fspath(path)
        if not source.is_file():
            raise PTQError(
                f'{path!r} lacks the {source.name!r} it was built from; keep both files together or export again.'
            )
        self.meta = model_meta(source)
        graph = onnx.load(source, load_external_data=False).graph
        self._given, self._names = ([value.name for value in values] for values in (graph.input, graph.output))
        # the engine lives no longer than the runtime and the logger
        self._runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(Path(path).read_bytes())
        if self._engine is None:
            raise PTQError(
                f'{path!r} is damaged, or was built by another TensorRT or for another GPU; build it here '
                'with tools/export.py --to tensorrt.'
            )
        present = {self._engine.get_tensor_name(place) for place in range(self._engine.num_io_tensors)}
        if present != {*self._given, *self._names}:
            raise PTQError(f'{path!r} was not built from the {source.name!r} beside it; export again.')
        self._context = self._engine.create_execution_context()
        self._largest = self._engine.get_tensor_profile_shape(self._given[0], 0)[2][0]
        self._stream = torch.cuda.Stream()

    @classmethod
    def check(cls) -> None:
        require(*cls.export_packages, *cls.packages, extra=cls.name)
        if not torch.cuda.is_available():
            raise PTQError(
                'TensorRT builds and runs its engines on an NVIDIA GPU, and PyTorch sees none; go on where '
                'there is one, or remove tensorrt from the runtimes.'
            )

    @classmethod
    def check_formats(cls, structure: Structure) -> None:
        check_tensorrt_formats(structure)

    @classmethod
    def needed_activations(cls, bits: int) -> dict:
        return dict(symmetric=True)

    @classmethod
    def dialect(cls) -> Dialect:
        from mmdet_ptq.deploy.onnx import passes
        from mmdet_ptq.deploy.onnx.channel_scales import absorb_channel_scales, divide_before_quantizing

        # the file is a step towards the engine, whose messages name its nodes: they keep their names
        return Dialect(
            compact=False,
            check=check_tensorrt_model,
            passes=(
                passes.integer_products,
                passes.drop_redundant_clips,
                passes.quantize_movements,
                absorb_channel_scales,
                passes.drop_redundant_clips,
                divide_before_quantizing,
                partial(passes.integer_biases, stored=False),
            ),
        )

    @classmethod
    def export(
        cls, detector: nn.Module, folder: str | os.PathLike, input_shape: tuple[int, int, int, int], **options
    ) -> Path:
        """Writes ``model.onnx``, and where TensorRT and a GPU are present, builds ``model.engine`` from it.

        Of a detector with two stages each of its networks has such files.

        Returns:
            The engine, or the ONNX file where no engine can be built; the log says what is missing.
        """
        source = Path(folder) / f'model{cls.source}'
        path = source.with_suffix(cls.suffix)
        # an engine of an earlier export would look like this one's
        remove_parts(path)
        remove(path)
        parts = export_onnx(detector, source, input_shape, runtime=cls.name, **options).get('parts', {})
        try:
            cls.check()
        except PTQError as error:
            print_log(f'no TensorRT here: wrote {source}, build it with {TRTEXEC} ({error})', 'current')
            for name in parts:
                print_log(f'and {part_path(source, name)} with {_trtexec(part_path(source, name))}', 'current')
            return source
        # the one that is opened comes last: it never lies beside those of another detector
        for name in (*parts, ''):
            place = part_path(path, name) if name else path
            engine = build_engine(place.with_suffix(cls.source))
            write_atomic(place, lambda file, engine=engine: file.write(engine))
        return path

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        if len({len(given) for given in inputs}) > 1:
            return self._run(inputs)
        starts = range(0, len(inputs[0]), self._largest)
        found = [self._run([given[start : start + self._largest] for given in inputs]) for start in starts]
        return [np.concatenate(outputs) for outputs in zip(*found, strict=True)]

    def _run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        # a stream of its own: in the default one TensorRT waits for the device before and after
        with torch.cuda.stream(self._stream):
            given = [torch.from_numpy(np.ascontiguousarray(array, np.float32)).cuda() for array in inputs]
            for name, tensor in zip(self._given, given, strict=True):
                self._context.set_input_shape(name, tuple(tensor.shape))
            outputs = [torch.empty(tuple(self._context.get_tensor_shape(name)), device='cuda') for name in self._names]
            for name, tensor in zip([*self._given, *self._names], [*given, *outputs], strict=True):
                self._context.set_tensor_address(name, tensor.data_ptr())
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                raise PTQError('TensorRT could not run the engine; its message stands above.')
            # copying to the host waits for the stream
            return [tensor.cpu().numpy() for tensor in outputs]

    def coverage(self) -> IntegerCoverage:
        import tensorrt

        found = self._engine.create_engine_inspector().get_engine_information(tensorrt.LayerInformationFormat.JSON)
        return integer_coverage(json.loads(found)['Layers'], self.meta['layers'])


def _trtexec(path: Path) -> str:
    """The command that builds a network of another name, of which some dimensions are open."""
    command = TRTEXEC.replace('model.onnx', path.name).replace('model.engine', path.with_suffix('.engine').name)
    meta = model_meta(path)
    if not meta['dynamic_batch']:
        return command
    import onnx

    names = [value.name for value in onnx.load(path, load_external_data=False).graph.input]

    def shapes(count: int) -> str:
        told = zip(names, meta['inputs'], strict=True)
        return ','.join(f'{name}:{"x".join(map(str, (count, *shape[1:])))}' for name, shape in told)

    sizes = dict(minShapes=1, optShapes=meta['inputs'][0][0], maxShapes=MAX_REGIONS)
    return command + ''.join(f' --{option}={shapes(count)}' for option, count in sizes.items())


def build_engine(path: Path) -> bytes:
    """Builds an engine from an exported ONNX file, for the GPU that is present.

    What is not quantized computes in float32, not in TF32: that is what was simulated.

    Args:
        path: The ``.onnx`` file.

    Raises:
        PTQError: The file breaks a rule of explicit quantization, or TensorRT cannot read or build it.
    """
    import tensorrt

    check_tensorrt_rules(path)
    meta = model_meta(path)
    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse(path.read_bytes()):
        raise PTQError(f'TensorRT cannot read {str(path)!r}: {parser.get_error(0)}')
    config = builder.create_builder_config()
    config.profiling_verbosity = tensorrt.ProfilingVerbosity.DETAILED
    config.clear_flag(tensorrt.BuilderFlag.TF32)
    if meta['dynamic_batch']:
        most, shapes = (MAX_REGIONS, meta['inputs']) if 'inputs' in meta else (MAX_BATCH, [meta['input_shape']])
        profile = builder.create_optimization_profile()
        for place, (count, *size) in enumerate(shapes):
            name = network.get_input(place).name
            profile.set_shape(name, (1, *size), (count, *size), (max(count, most), *size))
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise PTQError(f'TensorRT could not build an engine from {str(path)!r}; its message stands above.')
    return bytes(engine)


def integer_coverage(layers: Sequence[dict | str], calls: Sequence[str]) -> IntegerCoverage:
    """Which calls of layers an engine computes in integers.

    Args:
        layers: ``Layers`` of the engine inspector's JSON, see TensorRT's "Engine Inspector".
        calls: Names of the calls, as the nodes of the ONNX file are called.

    Raises:
        PTQError: The engine tells no more than names.
    """
    if any(isinstance(layer, str) for layer in layers):
        raise PTQError(
            'the engine does not tell the precision of its layers; build it with tools/export.py, or with '
            'trtexec --profilingVerbosity=detailed.'
        )
    integer: set[str] = set()
    for layer in layers:
        # a fused layer names all it came from; copies between formats bear the name of the layer they serve
        reads = layer.get('Inputs') or [{}]
        if layer.get('LayerType') != 'Reformat' and 'int8' in reads[0].get('Format/Datatype', '').lower():
            integer.update(_ONNX_LAYER.findall(layer.get('Metadata', '')) or layer['Name'].split(' + '))
    found = IntegerCoverage()
    for call in calls:
        (found.integer if call in integer else found.float).append(call)
    return found
