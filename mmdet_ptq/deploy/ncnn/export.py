"""A calibrated detector as an ncnn network that computes its convolutions and inner products in int8."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmdet_ptq.deploy.ncnn.format import NcnnLayer, parse_param, split_weights, write_network
from mmdet_ptq.deploy.ncnn.formats import check_activation
from mmdet_ptq.deploy.ncnn.layers import (
    INT8_CONVOLUTIONS,
    float_layers,
    fuse_activations,
    integer_layers,
    rounded_layers,
    unrounded_layers,
)
from mmdet_ptq.deploy.ncnn.network import NCNN
from mmdet_ptq.deploy.ncnn.shifts import merge_shifts, share_shifts, shift_of
from mmdet_ptq.deploy.ncnn.trace import IntegerCall, LayerCall, RoundedInput, opaque_type, trace, traceable
from mmdet_ptq.deploy.ncnn.verify import verify
from mmdet_ptq.deploy.network.meta import input_meta
from mmdet_ptq.deploy.network.raw_outputs import first_outputs, output_layout, output_shapes
from mmdet_ptq.deploy.requirements import require
from mmdet_ptq.errors import PTQError
from mmdet_ptq.version import __version__
from mmdet_ptq.wrapping import is_quantized
from mmdet_ptq.wrapping.inputs import QuantizedInput
from mmdet_ptq.wrapping.state import STATE

FORMAT = 'mmdet_ptq.ncnn'

_Lowering = Callable[[LayerCall, NcnnLayer], list[NcnnLayer]]


def export_ncnn(detector: nn.Module, input_shape: tuple[int, int, int, int], folder: str | os.PathLike) -> Path:
    """Writes ``model.param`` and ``model.bin`` for ncnn, with our integer codes and scales.

    Every call of a quantized convolution or linear layer becomes an int8 layer of ncnn; everything else is float32, the
    quantizers between the layers are left out.
    pnnx converts what lies between them. Before the files get their names ncnn runs the network once in float, which
    must give the detector's own outputs.

    Args:
        detector: The calibrated quantized detector, or a float one to compare with.
        input_shape: (1, C, H, W) of the preprocessed images; ncnn networks take one image.
        folder: Gets the two files.

    Returns:
        Path of ``model.param``.

    Raises:
        PTQError: A number format or an operator has no ncnn form, a package is missing, or ncnn does not reproduce
            the detector.
    """
    require(*NCNN, 'pnnx', extra='ncnn')
    if not is_quantized(detector):
        return _export_float(detector, input_shape, Path(folder))
    state = getattr(detector, STATE)
    # between the layers, and in products of activations, it computes in float
    read = {name for hook in state.hooks if isinstance(hook, QuantizedInput) for name in hook.names if name}
    for name in sorted(read):
        check_activation(name, state.activations[name].spec())
    twin, calls = traceable(detector)
    example = torch.randn((1, *input_shape[1:]), generator=torch.Generator().manual_seed(0))
    skeleton = _convert(trace(twin, example), calls, tuple(example.shape))
    layers = share_shifts(_lower(skeleton, calls, integer_layers, rounded_layers))
    layers = merge_shifts(fuse_activations(layers), INT8_CONVOLUTIONS)
    verify(detector, example, _lower(skeleton, calls, float_layers, unrounded_layers), layers)
    for call in calls.values():
        if not call.integer:
            print_log(f'ncnn computes {call.layer} in float: {call.reason}', 'current')
    return write_network(layers, Path(folder), _meta(detector, example, calls))


def _export_float(detector: nn.Module, input_shape: tuple[int, int, int, int], folder: Path) -> Path:
    example = torch.zeros(1, *input_shape[1:])
    twin = copy.deepcopy(detector).cpu()
    twin.eval()
    twin = _without_sharing(twin)
    layers = _convert(trace(twin, example), {}, tuple(example.shape))
    return write_network(layers, folder, _meta(detector, example, {}))


def _without_sharing(detector: nn.Module) -> nn.Module:
    """Gives each name of a module a module of its own, in place: pnnx converts a shared one under one name alone."""
    seen = set()
    for parent in detector.modules():
        for name, child in parent._modules.items():
            if child in seen:
                parent._modules[name] = copy.deepcopy(child)
            elif child is not None:
                seen.add(child)
    return detector


def _meta(detector: nn.Module, example: Tensor, calls: dict[str, LayerCall]) -> dict:
    outputs = first_outputs(detector, tuple(example.shape))
    return dict(
        format=FORMAT,
        version=__version__,
        runtime='ncnn',
        input_shape=list(example.shape),
        dynamic_batch=False,
        outputs=output_layout(outputs),
        raw_shapes=output_shapes(outputs),
        input=input_meta(detector, example.shape[1]),
        layers={name: call.layer for name, call in calls.items()},
        shifts=dict(_shifts(calls)),
    )


def _shifts(calls: dict[str, LayerCall]) -> Iterator[tuple[str, list[float]]]:
    """Calls that read shifted tensors, to the sign and to what stands for zero."""
    for name, call in calls.items():
        if (
            call.activation is not None
            and call.activation.num_channels is None
            and (shift := shift_of(call.activation))
        ):
            yield name, [shift.sign, shift.zero * float(call.activation.positive_scale())]


def _convert(traced: torch.jit.ScriptModule, calls: dict[str, LayerCall], shape: tuple[int, ...]) -> list[NcnnLayer]:
    """Runs pnnx on a traced detector; quantized calls come back as opaque layers."""
    import pnnx

    with tempfile.TemporaryDirectory() as folder:
        try:
            traced.save(f'{folder}/model.pt')
        except RuntimeError as error:
            if (found := re.search(r"Python function call '(\w+)'", str(error))) is None:
                raise
            raise PTQError(
                f'ncnn cannot take this detector: its forward calls {found[1]}, an autograd function without an '
                "operator; leave 'ncnn' out."
            ) from error
        opaque = {opaque_type(IntegerCall if call.integer else RoundedInput, name) for name, call in calls.items()}
        command = [pnnx.EXEC_PATH, 'model.pt', f'inputshape={list(shape)}f32'.replace(' ', ''), 'fp16=0']
        if opaque:
            command.append(f'moduleop={",".join(sorted(opaque))}')
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        param, weights = Path(folder, 'model.ncnn.param'), Path(folder, 'model.ncnn.bin')
        if done.returncode or not param.is_file() or not weights.is_file():
            lines = (done.stderr or done.stdout).strip().splitlines() or [f'exit status {done.returncode}']
            raise PTQError(f'pnnx cannot convert the detector: {lines[-1]}.')
        layers = parse_param(param.read_text())
        _check_layers(layers, calls)
        split_weights(layers, weights.read_bytes())
    return layers


def _check_layers(layers: list[NcnnLayer], calls: dict[str, LayerCall]) -> None:
    import ncnn

    opaque = Counter(layer.name for layer in layers if layer.name in calls)
    doubled = [name for name, count in opaque.items() if count > 1]
    if doubled:
        raise PTQError(
            f'pnnx doubled {len(doubled)} quantized layer calls, first {doubled[0]} ({calls[doubled[0]].layer}).'
        )
    dead = [
        call.layer
        for name, call in calls.items()
        if (call.integer or call.activation is not None) and name not in opaque
    ]
    if dead:
        # had they fed an output, the comparison with the simulation would show it
        print_log(
            f'{len(dead)} layers run without feeding an output and are not in the model: {", ".join(dead)}', 'current'
        )
    producers = {blob: layer for layer in layers for blob in layer.tops}
    for layer in layers:
        if layer.name not in calls and ncnn.create_layer(layer.type) is None:
            raise PTQError(
                f'ncnn has no operator {layer.type} ({layer.name}, {_place(layer, producers, calls)}); '
                'export to another runtime.'
            )


def _place(layer: NcnnLayer, producers: dict[str, NcnnLayer], calls: dict[str, LayerCall]) -> str:
    """Where in the detector a layer stands: behind which quantized layer."""
    while layer.bottoms:
        layer = producers[layer.bottoms[0]]
        if layer.name in calls:
            return f'behind {calls[layer.name].layer}'
    return "at the detector's input"


def _lower(
    skeleton: list[NcnnLayer], calls: dict[str, LayerCall], integer: _Lowering, rounded: _Lowering
) -> list[NcnnLayer]:
    """Puts ncnn's own layers in the place of the opaque ones."""
    layers = []
    for layer in skeleton:
        call = calls.get(layer.name)
        if call is None:
            layers.append(copy.copy(layer))
        else:
            layers += (integer if call.integer else rounded)(call, layer)
    return layers
