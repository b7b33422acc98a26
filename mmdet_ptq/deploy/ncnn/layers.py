"""ncnn's layers for one quantized call: int8 codes and scales as `src/layer/*.cpp` of ncnn reads them."""

from __future__ import annotations

import numpy as np
from torch import nn

from mmdet_ptq.deploy.ncnn.format import FLOAT_MAX, NcnnLayer, array, floats, int8_weight
from mmdet_ptq.deploy.ncnn.formats import INT8_MAX
from mmdet_ptq.deploy.ncnn.shifts import shift_layer, shift_of, unshift_layers
from mmdet_ptq.deploy.ncnn.trace import LayerCall, borders
from mmdet_ptq.quantizers import Quantizer

# ncnn layer type to the activation number of a convolution and the parameters it takes along (id, default)
_ACTIVATIONS = {
    'ReLU': (1, ()),
    'Clip': (3, ((0, -FLOAT_MAX), (1, FLOAT_MAX))),
    'Sigmoid': (4, ()),
    'HardSwish': (6, ((0, 0.2), (1, 0.5))),
}
# bit of a layer's featmask; the int8 Winograd kernels overflow: codes 127 and -128 in 64 channels are off by 80 %
_NO_WINOGRAD = 1 << 6
INT8_CONVOLUTIONS = ('Convolution', 'ConvolutionDepthWise')


def integer_layers(call: LayerCall, place: NcnnLayer) -> list[NcnnLayer]:
    """The layers that compute one call in integers.

    Args:
        call: The call.
        place: The opaque operator whose blobs and name they take.
    """
    before, bottom_scale, channel_scale = _input_layers(call.activation, place)
    module = call.module
    weights = call.integers.numpy()
    scale = call.scale.double().numpy()
    bias = np.zeros(len(scale)) if module.bias is None else module.bias.detach().numpy()
    groups = getattr(module, 'groups', 1)
    if channel_scale is not None:
        scale = scale * channel_scale.repeat(len(scale) // groups)
    shift = shift_of(call.activation)
    # zero's code times the weights is too much, at the borders as well, where it stands for the zeros
    scale = scale * shift.sign
    bias = bias - scale * weights.sum(1) * (shift.zero / bottom_scale)
    # ncnn takes reciprocals, and gives 0 for a weight scale of 0
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    blobs = before[-1].tops if before else place.bottoms
    if isinstance(module, nn.Linear):
        params = {0: str(len(scale)), 1: '1', 2: str(weights.size), 8: '2'}
        main = NcnnLayer('InnerProduct', place.name, blobs, place.tops, params)
        main.weights = int8_weight(weights) + floats(bias) + floats(inverse) + floats([bottom_scale])
        return [*before, *_as_rows(main, call.shape)]
    main = NcnnLayer(
        'Convolution' if groups == 1 else 'ConvolutionDepthWise',
        place.name,
        blobs,
        place.tops,
        _convolution_params(module, weights.size, call.shape),
    )
    if shift:
        main.params[18] = f'{shift.zero:.1f}'
    if groups in (1, len(scale)):
        main.weights = int8_weight(weights) + floats(bias) + floats(inverse) + floats([bottom_scale])
        return [*before, main]
    # one weight scale per group is all that ncnn has: a layer behind gives each channel its own
    main.params[5] = '0'
    main.tops = [f'{place.name}_sum']
    main.weights = int8_weight(weights) + floats(np.ones(groups)) + floats([1])
    after = NcnnLayer('Scale', f'{place.name}_scale', main.tops, place.tops, {0: str(len(scale)), 1: '1'})
    after.weights = floats(scale / bottom_scale) + floats(bias)
    if channel_scale is None:
        before += [_quantize(place.name, blobs, np.array([bottom_scale]))]
        main.bottoms = before[-1].tops
    return [*before, main, after]


def _as_rows(main: NcnnLayer, shape: tuple[int, ...]) -> list[NcnnLayer]:
    """InnerProduct takes a vector or rows of them; images (1, H, W, C) are reshaped before and after."""
    if len(shape) <= 3:
        return [main]
    first = NcnnLayer('Reshape', f'{main.name}_rows', main.bottoms, [f'{main.name}_rows'], {0: str(shape[-1]), 1: '-1'})
    sizes = [main.params[0], *map(str, reversed(shape[1:-1]))]
    last = NcnnLayer('Reshape', f'{main.name}_image', [f'{main.name}_image'], main.tops, dict(enumerate(sizes)))
    main.bottoms, main.tops = first.tops, last.bottoms
    return [first, main, last]


def rounded_layers(call: LayerCall, place: NcnnLayer) -> list[NcnnLayer]:
    """The layers that round a float layer's input to its codes; codes of 16 bits are clipped only, ncnn has no such."""
    before, bottom_scale, channel_scale = _input_layers(call.activation, place)
    if call.activation.bits > 8:
        if channel_scale is not None:
            before.append(
                NcnnLayer(
                    'Scale',
                    place.name,
                    before[-1].tops,
                    [],
                    {0: str(channel_scale.size), 1: '0'},
                    floats(channel_scale),
                )
            )
        before[-1].tops = place.tops
        for layer in before:
            layer.name = f'clips_{layer.name}'  # of another name than what reads codes
        return before
    if not before or before[-1].type != 'Quantize':
        blobs = before[-1].tops if before else place.bottoms
        before += [_quantize(place.name, blobs, np.array([bottom_scale]))]
    # int8 to float32; ncnn's Dequantize takes the int32 of sums only
    cast = NcnnLayer('Cast', f'{place.name}_cast', before[-1].tops, [f'{place.name}_cast'], {0: '3', 1: '1'})
    after = [cast, *unshift_layers(place.name, cast.tops, shift_of(call.activation))]
    blobs = after[-1].tops
    if channel_scale is None:
        last = NcnnLayer('BinaryOp', place.name, blobs, place.tops, {0: '2', 1: '1', 2: f'{1 / bottom_scale:.9e}'})
    else:
        last = NcnnLayer('Scale', place.name, blobs, place.tops, {0: str(channel_scale.size), 1: '0'})
        last.weights = floats(channel_scale)
    return [*before, *after, last]


def float_layers(call: LayerCall, place: NcnnLayer) -> list[NcnnLayer]:
    """One integer call in float: the values that its weight stands for, and an input that is not rounded."""
    module = call.module
    weights = module.weight.detach().numpy()
    if isinstance(module, nn.Linear):
        params = {0: str(module.out_features), 1: '1', 2: str(weights.size)}
        main = NcnnLayer('InnerProduct', place.name, place.bottoms, place.tops, params)
    else:
        params = _convolution_params(module, weights.size, call.shape)
        del params[8]
        main = NcnnLayer(
            'Convolution' if module.groups == 1 else 'ConvolutionDepthWise',
            place.name,
            place.bottoms,
            place.tops,
            params,
        )
    bias = np.zeros(len(weights)) if module.bias is None else module.bias.detach().numpy()
    main.weights = bytes(4) + floats(weights) + floats(bias)
    return _as_rows(main, call.shape) if isinstance(module, nn.Linear) else [main]


def unrounded_layers(call: LayerCall, place: NcnnLayer) -> list[NcnnLayer]:
    """The input of a float layer as it is."""
    return [NcnnLayer('Noop', place.name, place.bottoms, place.tops)]


def _input_layers(quantizer: Quantizer, place: NcnnLayer) -> tuple[list[NcnnLayer], float, np.ndarray | None]:
    """What brings the input to codes, the scale that is left to the int8 layer, and the scale per channel."""
    scale = quantizer.positive_scale().detach().double().numpy()
    zero = quantizer.zero_point.double().numpy()
    first, last = quantizer.code_range
    clipped = bool((first - zero != -INT8_MAX).any() or (last - zero != INT8_MAX).any())
    layers: list[NcnnLayer] = []

    def add(kind: str, params: dict[int, str], weights: bytes = b'') -> None:
        bottoms = layers[-1].tops if layers else place.bottoms
        name = f'{place.name}_in{len(layers)}'
        layers.append(NcnnLayer(kind, name, bottoms, [name], params, weights))

    shift = shift_of(quantizer)
    if scale.ndim == 0:
        if shift:
            layers.append(shift_layer(place.name, place.bottoms, shift, float(scale)))
        elif clipped:
            add('Clip', {0: f'{(first - zero) * scale:.9e}', 1: f'{(last - zero) * scale:.9e}'})
        return layers, 1 / float(scale), None
    if not clipped:
        return [_quantize(place.name, place.bottoms, 1 / scale)], 1.0, scale
    if shift:
        add('Scale', {0: str(scale.size), 1: '1'}, floats(shift.sign / scale) + floats(np.full(scale.size, shift.zero)))
        return layers, 1.0, scale
    # channels may have different zero points: they are added before the bounds, and taken off after them
    add('Scale', {0: str(scale.size), 1: '1'}, floats(1 / scale) + floats(zero))
    add('Clip', {0: f'{first:.1f}', 1: f'{last:.1f}'})
    add('Scale', {0: str(scale.size), 1: '1'}, floats(np.ones(scale.size)) + floats(-zero))
    return layers, 1.0, scale


def _quantize(name: str, bottoms: list[str], scale: np.ndarray) -> NcnnLayer:
    layer = NcnnLayer('Quantize', f'{name}_quantize', bottoms, [f'{name}_quantize'], {0: str(scale.size)})
    layer.weights = floats(scale)
    return layer


def _convolution_params(module: nn.Module, size: int, shape: tuple[int, ...]) -> dict[int, str]:
    height, width = 0, 1
    pairs = {1: module.kernel_size, 2: module.dilation, 3: module.stride}
    params = {0: module.out_channels}
    for key, pair in pairs.items():
        params[key], params[key + 10] = pair[width], pair[height]
    params[14], params[16], params[4], params[15] = borders(module, shape)
    params.update({5: 1, 6: size, 8: 2})
    if module.kernel_size == (3, 3):
        params[31] = _NO_WINOGRAD
    if module.groups > 1:
        params.update({7: module.groups, 8: 1})
    return {key: str(value) for key, value in params.items()}


def fuse_activations(layers: list[NcnnLayer]) -> list[NcnnLayer]:
    """Takes activation functions into the int8 convolution before them, as ncnn's own converters do."""
    readers = {blob: layer for layer in layers for blob in layer.bottoms}
    gone = set()
    for layer in layers:
        after = readers.get(layer.tops[0]) if layer.tops else None
        if not is_integer(layer) or layer.type == 'InnerProduct' or after is None:
            continue
        if after.type not in _ACTIVATIONS or (after.type == 'ReLU' and float(after.params.get(0, 0))):
            continue
        number, taken = _ACTIVATIONS[after.type]
        layer.params[9] = str(number)
        if taken:
            layer.params[-23310] = array(*(float(after.params.get(key, default)) for key, default in taken))
        layer.tops = after.tops
        gone.add(after.name)
    return [layer for layer in layers if layer.name not in gone]


def is_integer(layer: NcnnLayer) -> bool:
    """Whether ncnn computes a layer in integers."""
    return layer.type in (*INT8_CONVOLUTIONS, 'InnerProduct') and layer.params.get(8, '0') != '0'
