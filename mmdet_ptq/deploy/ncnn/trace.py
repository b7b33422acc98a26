"""Tracing a quantized detector for pnnx: every call of a quantized layer becomes one opaque operator."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from mmcv.cnn.bricks import Conv2dAdaptivePadding
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from mmdet_ptq.deploy.integers.biases import SharedBias
from mmdet_ptq.deploy.integers.weights import integer_weight
from mmdet_ptq.deploy.network.raw_outputs import RawOutputs
from mmdet_ptq.errors import PTQError, first_line
from mmdet_ptq.quantizers import Quantizer
from mmdet_ptq.wrapping import float_weight, quantized_weights
from mmdet_ptq.wrapping.inputs import QuantizedInput
from mmdet_ptq.wrapping.state import STATE, QuantizationState
from mmdet_ptq.wrapping.watching.layers import RowLayout, out_channels

PREFIX = 'ptq_'  # the opaque operators' names


@dataclass
class LayerCall:
    """One call of a quantized layer in a forward pass.

    Attributes:
        layer: The layer's path in the detector, with ``#`` and the call's number where it has several.
        module: The layer with its quantized weight as plain float values.
        activation: Format of its input; None leaves it float.
        integers: Weight in units of its scale, rows (C, K) int32; None for a float weight.
        scale: One per output channel; None for a float weight.
        reason: Why ncnn does not compute the call in integers; empty where it does.
        shape: Shape of the input, known once the detector ran.
    """

    layer: str
    module: nn.Module
    activation: Quantizer | None
    integers: Tensor | None
    scale: Tensor | None
    reason: str
    shape: tuple[int, ...] = ()

    @property
    def integer(self) -> bool:
        return not self.reason


class IntegerCall(nn.Module):
    """Stands for one integer call; pnnx keeps it as an operator of this type, with this module's name.

    Its output has the right shape and no more: a weight would become part of pnnx's files.
    """

    def __init__(self, call: LayerCall) -> None:
        super().__init__()
        self._call = [call]  # in a list, so that the layer is not traced as a child

    def forward(self, x: Tensor) -> Tensor:
        self._call[0].shape = tuple(map(int, x.shape))  # tensors, while a trace runs
        layer = self._call[0].module
        if isinstance(layer, nn.Linear):
            return x[..., :1].repeat(*[1] * (x.dim() - 1), layer.out_features)
        top, bottom, left, right = borders(layer, self._call[0].shape)
        x = functional.pad(x[:, :1], (left, right, top, bottom))
        x = functional.max_pool2d(x, layer.kernel_size, layer.stride, 0, layer.dilation)
        return x.repeat(1, layer.out_channels, 1, 1)


class RoundedInput(nn.Module):
    """Stands for the quantized input of a call that stays float."""

    def __init__(self, call: LayerCall) -> None:
        super().__init__()
        self._call = [call]

    def forward(self, x: Tensor) -> Tensor:
        self._call[0].shape = tuple(map(int, x.shape))  # tensors, while a trace runs
        return x.clone()


def _own_class(kind: type, name: str) -> type:
    """A class for one call: pnnx merges operators of one type that read one tensor."""
    return type(f'{kind.__name__}_{name}', (kind,), {'__module__': kind.__module__})


def opaque_type(kind: type, name: str) -> str:
    """The type that pnnx gives to a call."""
    return f'{kind.__module__}.{kind.__name__}_{name}'


class Calls(nn.Module):
    """Takes the place of a layer and runs its calls in turn.

    Args:
        calls: Operator name to call, in the order of a forward pass.
    """

    def __init__(self, calls: dict[str, LayerCall]) -> None:
        super().__init__()
        self.calls = list(calls.items())
        self.done = 0
        for name, call in self.calls:
            if call.integer:
                setattr(self, name, _own_class(IntegerCall, name)(call))
            else:
                self.layer = call.module
                if call.activation is not None:
                    setattr(self, name, _own_class(RoundedInput, name)(call))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name, call = self.calls[self.done % len(self.calls)]
        self.done += 1
        if call.activation is not None:
            x = getattr(self, name)(x)
        return x if call.integer else self.layer(x, *args, **kwargs)


class StridedSlices(TorchFunctionMode):
    """Writes ``x[..., a::2, b::2]`` as a slice and a pooling of one pixel: ncnn's Crop takes no steps."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.__getitem__ and args[0].dim() == 4:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if Ellipsis in index:
                place = index.index(Ellipsis)
                missing = 5 - len(index)
                index = (*index[:place], *[slice(None)] * missing, *index[place + 1 :])
            index += (slice(None),) * (4 - len(index))
            if len(index) == 4 and all(isinstance(part, slice) for part in index):
                steps = [part.step or 1 for part in index]
                if steps[:2] == [1, 1] and max(steps) > 1:
                    dense = args[0][tuple(slice(part.start, part.stop) for part in index)]
                    return functional.max_pool2d(dense, 1, tuple(steps[2:]))
        return func(*args, **kwargs or {})


def obstacle(module: nn.Module, activation: Quantizer | None, integers: Tensor | None) -> str:
    """Why ncnn cannot compute a call in integers; empty where it can."""
    if activation is None or integers is None:
        return f'its {"input" if activation is None else "weight"} is float'
    if activation.bits > 8 or integers.min() < -128 or integers.max() > 127:
        return 'it has more than 8 bits'
    if isinstance(module, nn.Linear):
        return ''
    if type(module).forward not in (nn.Conv2d.forward, Conv2dAdaptivePadding.forward):
        return f'ncnn has no int8 {type(module).__name__}'
    if module.padding_mode != 'zeros' or isinstance(module.padding, str):
        return f'its padding is {module.padding_mode!r}, {module.padding!r}'
    return ''


def borders(module: nn.Conv2d, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Zeros that a convolution puts around an input of a shape: top, bottom, left, right."""
    if type(module).forward is not Conv2dAdaptivePadding.forward:
        height, width = module.padding
        return height, height, width, width
    found = []
    for size, kernel, stride, dilation in zip(
        shape[2:], module.kernel_size, module.stride, module.dilation, strict=True
    ):
        # as many as the last place of the kernel lacks; the odd one at the end
        reach = (ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1
        missing = max(reach - size, 0)
        found += [missing // 2, missing - missing // 2]
    return tuple(found)


def traceable(detector: nn.Module) -> tuple[nn.Module, dict[str, LayerCall]]:
    """A float copy of a quantized detector whose quantized layer calls are opaque operators.

    Args:
        detector: The calibrated detector; it is not changed.

    Returns:
        The copy, and operator name to call.
    """
    twin = copy.deepcopy(detector).cpu().requires_grad_(False)
    twin.eval()
    state: QuantizationState = getattr(twin, STATE)
    twin._forward_hooks.clear()
    twin._forward_pre_hooks.clear()
    weights, inputs = (
        quantized_weights(twin),
        {hook.layer: hook.names for hook in state.hooks if isinstance(hook, QuantizedInput)},
    )
    calls: dict[str, LayerCall] = {}
    replaced = {}
    for layer in dict.fromkeys([*inputs, *weights]):
        quantized = twin.get_submodule(layer)
        module = replaced[quantized] = _plain(quantized)
        integers, scale = _integers(quantized, weights[layer]) if layer in weights else (None, None)
        group = {}
        for index, name in enumerate(inputs.get(layer, ())):
            activation = state.activations[name] if name is not None else None
            reason = obstacle(module, activation, integers)
            label = f'{layer}#{index}' if len(inputs[layer]) > 1 else layer
            group[f'{PREFIX}{len(calls) + index}'] = LayerCall(label, module, activation, integers, scale, reason)
        calls.update(group)
        if group:
            replaced[quantized] = Calls(group)
    for parent in list(twin.modules()):
        for name, child in parent._modules.items():
            if child in replaced:
                parent._modules[name] = replaced[child]
    if state.flow is not None:
        state.flow.enabled = False  # that of the copy
    delattr(twin, STATE)
    return twin, calls


def _plain(quantized: nn.Module) -> nn.Module:
    """A layer with its quantized weight as a plain one, and without the hooks that quantize its input and bias.

    ``remove_parametrizations`` would change the class, which the original layer shares.
    """
    kind = parametrize.type_before_parametrizations(quantized)
    module = kind.__new__(kind)
    module.__dict__.update(quantized.__dict__)
    weight = nn.Parameter(quantized.weight.detach().clone(), requires_grad=False)
    module._parameters = {**quantized._parameters, 'weight': weight}
    module._modules = {name: child for name, child in quantized._modules.items() if name != 'parametrizations'}
    kept = {key: hook for key, hook in quantized._forward_pre_hooks.items() if not isinstance(hook, QuantizedInput)}
    module._forward_pre_hooks = OrderedDict(kept)
    module._forward_pre_hooks_with_kwargs = OrderedDict()
    module._forward_hooks = OrderedDict(
        (key, hook) for key, hook in quantized._forward_hooks.items() if not isinstance(hook, SharedBias)
    )
    return module


def trace(twin: nn.Module, example: Tensor) -> torch.jit.ScriptModule:
    """Traces a detector's raw forward pass.

    Raises:
        PTQError: The detector cannot be traced.
    """
    try:
        with torch.no_grad(), StridedSlices():
            return torch.jit.trace(RawOutputs(twin).eval(), example, check_trace=False)
    except Exception as error:
        raise PTQError(
            f'the detector cannot be traced on images of {tuple(example.shape)}: {first_line(error)}'
        ) from error


def _integers(module: nn.Module, quantized: nn.Module) -> tuple[Tensor, Tensor]:
    """A quantized weight as integers, rows (C, K), and one scale per channel."""
    with torch.no_grad():
        rows = RowLayout.of(module).to_rows(module.weight.detach())
        scale = integer_weight(quantized.quantizer, quantized.codes(float_weight(module))).scale
        scale = scale.expand(out_channels(module))
        unit = torch.where(scale > 0, scale, torch.ones_like(scale))
        return (rows / unit.reshape(-1, 1)).round().to(torch.int32), scale
