"""A runtime against the simulation by what layers read: how many integer codes are the same.

For runtimes that leave out the quantizers between the layers: what both have is what the layers read.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from mmdet_ptq.deploy.network.raw_outputs import RawOutputs
from mmdet_ptq.deploy.onnxruntime.compare import TensorAgreement
from mmdet_ptq.errors import PTQError
from mmdet_ptq.wrapping.inputs import QuantizedInput
from mmdet_ptq.wrapping.state import STATE, with_input


def compare_layer_inputs(detector: nn.Module, inputs: Mapping[str, np.ndarray | None], image: Tensor,
                         follow: bool = False, within: Callable[[nn.Module], AbstractContextManager] = nullcontext
                         ) -> list[TensorAgreement]:
    """Compares the codes that every layer reads between the simulation and a runtime.

    Args:
        detector: The quantized detector the runtime's model was exported from.
        inputs: What every call of a layer reads in the runtime, before it is quantized; None where it is not:
            :func:`mmdet_ptq.deploy.openvino.layer_inputs.openvino_inputs` or
            :func:`mmdet_ptq.deploy.ncnn.layer_inputs.ncnn_inputs`.
        image: (N, 3, H, W), normalized, which the runtime read.
        follow: Whether the simulation goes on with what the runtime's layer reads, so that each is compared for
            itself. Defaults to False.
        within: What surrounds the simulation, given the detector: :func:`mmdet_ptq.wrapping.state.only_read_tensors`
            makes it do what OpenVINO is given, :func:`mmdet_ptq.wrapping.flow.without_dataflow` what ncnn is given.
            Defaults to nothing: it quantizes between the layers as it was calibrated.

    Returns:
        One entry per call of a layer, in the order of the network, named like the layer; ``#k`` marks further calls.
        Layers that feed no output have none: runtimes leave them out.

    Raises:
        PTQError: The model is not of this detector.
    """
    agreements: list[TensorAgreement] = []
    missing: set[str] = set()
    with torch.no_grad(), within(detector), _compared(detector, inputs, follow, agreements, missing):
        RawOutputs(detector)(image)
    wanted = missing & _feeding(detector, image) if missing else missing
    if wanted:
        raise PTQError(f'the exported model has no layer {min(wanted)}; export it again.')
    return agreements


def _feeding(detector: nn.Module, image: Tensor) -> set[str]:
    """The calls of layers that an output of the detector depends on."""
    calls, nodes = Counter(), {}

    def note(layer: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            nodes[output.grad_fn] = f'{layer}#{calls[layer]}' if calls[layer] else layer
            calls[layer] += 1
        return hook

    with ExitStack() as stack, torch.enable_grad():
        for layer in {hook.layer for hook in getattr(detector, STATE).hooks if isinstance(hook, QuantizedInput)}:
            stack.callback(detector.get_submodule(layer).register_forward_hook(note(layer)).remove)
        outputs = RawOutputs(detector)(image.detach().clone().requires_grad_())
    seen, todo = set(), [output.grad_fn for output in outputs]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return {label for node, label in nodes.items() if node in seen}


@contextmanager
def _compared(detector: nn.Module, found: Mapping[str, np.ndarray | None], follow: bool,
              agreements: list[TensorAgreement], missing: set[str]) -> Iterator[None]:
    """Every layer notes, in one forward pass, how far it reads what the runtime's layer read, or that it has none."""
    state, calls = getattr(detector, STATE), Counter()

    def hook(layer: str, names: list[str | None]):
        def compare(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            call = calls[layer]
            calls[layer] += 1
            name, label = names[call % len(names)], f'{layer}#{call}' if call else layer
            if name is None:
                return args, kwargs
            if label not in found:
                missing.add(label)
            if found.get(label) is None:
                return args, kwargs

            def compared(simulated: Tensor) -> Tensor:
                quantizer = state.activations[name]
                theirs = torch.from_numpy(_like(found[label], simulated.shape, label)).to(simulated)
                difference = (quantizer.encode(theirs) - quantizer.encode(simulated)).abs()
                agreements.append(
                    TensorAgreement(label, float((difference == 0).double().mean()), int(difference.max())))
                return quantizer(theirs) if follow else simulated

            return with_input(args, kwargs, compared)
        return compare

    with ExitStack() as stack:
        for quantized in state.hooks:
            if isinstance(quantized, QuantizedInput):
                # behind the quantizer's own hook
                stack.callback(detector.get_submodule(quantized.layer).register_forward_pre_hook(
                    hook(quantized.layer, quantized.names), with_kwargs=True).remove)
        yield


def _like(values: np.ndarray, shape: tuple[int, ...], label: str) -> np.ndarray:
    """A tensor in the shape that the detector's layer reads: matrix products may have theirs flattened."""
    if values.size != np.prod(shape):
        raise PTQError(f'the layer {label} of the exported model reads an input of {values.shape}, that of '
                       f'the detector {tuple(shape)}; export it again.')
    return np.ascontiguousarray(values.reshape(shape))
