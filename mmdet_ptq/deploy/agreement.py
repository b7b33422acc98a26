"""A runtime against the simulation: how many integer codes are the same, and the first tensor that diverges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from mmengine.logging import MMLogger
from torch import Tensor, nn

from mmdet_ptq.deploy.network.parts import is_rehearsal, parts_of
from mmdet_ptq.deploy.network.raw_outputs import RawOutputs
from mmdet_ptq.errors import PTQError
from mmdet_ptq.predictions.queries import chosen_queries
from mmdet_ptq.wrapping.inputs import QuantizedInput
from mmdet_ptq.wrapping.names import call_name, product_of
from mmdet_ptq.wrapping.state import STATE, with_input
from mmdet_ptq.wrapping.watching.tensors import walk_back

# a model with ReLU activations agrees at least so far
AGREEMENT = 0.999
INPUT = 'the input of '
CHOSEN = 'what reads the chosen queries'


@dataclass
class TensorAgreement:
    """One quantized tensor.

    Attributes:
        name: Name of the activation, ``@k`` marks its further calls; or of the layer that reads it, with ``#k``.
        identical: Share of the codes that are the same.
        largest: Largest difference, in codes.
    """

    name: str
    identical: float
    largest: int


def compare_layer_inputs(
    detector: nn.Module,
    inputs: Mapping[str, np.ndarray | None],
    image: Tensor,
    follow: bool = False,
    within: Callable[[nn.Module], AbstractContextManager] = nullcontext,
    outputs: list[Tensor] | None = None,
    choices: list[Tensor] | None = None,
) -> list[TensorAgreement]:
    """Compares the codes that every layer reads between the simulation and a runtime.

    For runtimes that leave out the quantizers between the layers: what both have is what the layers read.

    Args:
        detector: The quantized detector the runtime's model was exported from.
        inputs: What every call of a layer reads in the runtime, before it is quantized; None where it is not.
        image: (N, C, H, W), normalized, which the runtime read.
        follow: Whether the simulation goes on with what the runtime's layer reads, so that each is compared for
            itself. Defaults to False.
        within: What surrounds the simulation, given the detector: :func:`mmdet_ptq.wrapping.state.only_read_tensors`
            and :func:`mmdet_ptq.wrapping.flow.without_dataflow` make it do what such runtimes are given.
            Defaults to nothing: it quantizes between the layers as it was calibrated.
        outputs: Takes the raw outputs of the simulation, if given.
        choices: Which queries the runtime chose of a detector that chooses them by their scores
            (:func:`mmdet_ptq.predictions.queries.chooses_queries`), choice after choice. Given, the simulation goes on
            with these: of scores that are nearly the same, either may be the higher. Defaults to None.

    Returns:
        One entry per call of a layer, in the order of the network, named like the layer; ``#k`` marks further calls.
        Behind them, of choices, the share of the queries that the simulation would have chosen, too.
        Layers that feed no output have none: runtimes leave them out.

    Raises:
        PTQError: The model is not of this detector.
    """
    agreements: list[TensorAgreement] = []
    missing: set[str] = set()
    # the same regions as the runtime was given, whatever surrounds the simulation
    parts = parts_of(detector, image)
    own: list[Tensor] = []
    chosen = chosen_queries(detector, choices, own) if choices else nullcontext()
    with torch.no_grad(), within(detector), chosen:
        with _compared(detector, inputs, follow, agreements, missing) as calls:
            for part in parts:
                calls.clear()
                found = RawOutputs(detector, part)(*part.inputs)
                if outputs is not None:
                    outputs += found
    for ours, theirs in zip(own, choices or (), strict=True):
        shared = torch.stack([torch.isin(a, b).double().mean() for a, b in zip(ours, theirs, strict=True)])
        agreements.append(TensorAgreement(CHOSEN, float(shared.min()), 1))
    wanted = missing & _feeding(detector, image) if missing else missing
    if wanted:
        raise PTQError(f'the exported model has no layer {min(wanted)}; export it again.')
    return agreements


def _feeding(detector: nn.Module, image: Tensor) -> set[str]:
    """The calls of layers that an output of the detector depends on."""
    calls, nodes, parts = Counter(), {}, parts_of(detector, image)

    def note(layer: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            nodes[output.grad_fn] = call_name(layer, calls[layer])
            calls[layer] += 1

        return hook

    with ExitStack() as stack, torch.enable_grad():
        for layer in {hook.layer for hook in getattr(detector, STATE).hooks if isinstance(hook, QuantizedInput)}:
            stack.callback(detector.get_submodule(layer).register_forward_hook(note(layer)).remove)
        outputs = []
        for part in parts:
            calls.clear()
            outputs += RawOutputs(detector, part)(*(x.detach().clone().requires_grad_() for x in part.inputs))
    return {nodes[node] for node, _ in walk_back(outputs, stop=()) if node in nodes}


@contextmanager
def _compared(
    detector: nn.Module,
    found: Mapping[str, np.ndarray | None],
    follow: bool,
    agreements: list[TensorAgreement],
    missing: set[str],
) -> Iterator[Counter]:
    """Every layer notes, in one forward pass, how far it reads what the runtime's layer read, or that it has none.

    Yields the number of its calls, by layer.
    """
    state, calls = getattr(detector, STATE), Counter()
    read: dict[str, list[tuple[str, Tensor]]] = {}

    def hook(layer: str, names: list[str | None]):
        def compare(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            call = calls[layer]
            calls[layer] += 1
            name, label = names[call % len(names)], call_name(layer, call)
            if name is None or is_rehearsal():
                return args, kwargs

            def compared(simulated: Tensor) -> Tensor:
                like = label if label in found else _repeated(read.get(layer, ()), simulated)
                if like is None:
                    missing.add(label)
                if found.get(like) is None:
                    return simulated
                if len(names) > 1:
                    read.setdefault(layer, []).append((like, simulated.clone()))
                quantizer = state.activations[name]
                theirs = torch.from_numpy(_like(found[like], simulated.shape, label)).to(simulated)
                difference = (quantizer.encode(theirs) - quantizer.encode(simulated)).abs()
                agreements.append(
                    TensorAgreement(label, float((difference == 0).double().mean()), int(difference.max()))
                )
                return quantizer(theirs) if follow else simulated

            return with_input(args, kwargs, compared)

        return compare

    def factor(name: str):
        def compare(quantizer: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if is_rehearsal():
                return None
            theirs = quantizer.encode(torch.from_numpy(_like(found[name], output.shape, name)).to(output))
            difference = (theirs - quantizer.encode(args[0])).abs()
            agreements.append(TensorAgreement(name, float((difference == 0).double().mean()), int(difference.max())))
            return quantizer.decode(theirs) if follow else None

        return compare

    with ExitStack() as stack:
        for name in filter(product_of, state.activations.keys() & found.keys()):
            stack.callback(state.activations[name].register_forward_hook(factor(name)).remove)
        for quantized in state.hooks:
            if isinstance(quantized, QuantizedInput):
                # behind the quantizer's own hook
                stack.callback(
                    detector.get_submodule(quantized.layer)
                    .register_forward_pre_hook(hook(quantized.layer, quantized.names), with_kwargs=True)
                    .remove
                )
        yield calls


def _repeated(calls: Iterable[tuple[str, Tensor]], values: Tensor) -> str | None:
    """The call of a layer that read the same: a runtime computes the two once."""
    return next((label for label, read in calls if torch.equal(read, values)), None)


def _like(values: np.ndarray, shape: tuple[int, ...], label: str) -> np.ndarray:
    """A tensor in the shape that the detector's layer reads: matrix products may have theirs flattened."""
    if values.size != np.prod(shape) or values.shape[-1] != shape[-1]:
        raise PTQError(
            f'the layer {label} of the exported model reads an input of {values.shape}, that of '
            f'the detector {tuple(shape)}; export it again.'
        )
    return np.ascontiguousarray(values.reshape(shape))


def report_inputs(
    logger: MMLogger,
    detector: nn.Module,
    inputs: Mapping[str, np.ndarray | None],
    image: Tensor,
    runtime: str,
    given: Callable[[nn.Module], AbstractContextManager],
    choices: list[Tensor] | None = None,
) -> None:
    """Logs how far the codes that layers read are the simulation's, with and without what the runtime leaves out.

    Args:
        logger: Where.
        detector: The quantized detector that the model was exported from.
        inputs: What every call of a layer reads in the runtime, see :func:`compare_layer_inputs`.
        image: (N, C, H, W), normalized, which the runtime read.
        runtime: What the runtime is called.
        given: What the runtime is given, as ``within`` of :func:`compare_layer_inputs`.
        choices: Which queries it chose, see there.
    """
    for call, value in inputs.items():
        if value is None:
            logger.info(f'{runtime} reads the input of {call} in float, so that it cannot be compared')
    _log_shares(
        logger,
        compare_layer_inputs(detector, inputs, image, choices=choices),
        f'inputs of layers compared with {runtime}: from the image to the outputs',
    )
    name_first(logger, compare_layer_inputs(detector, inputs, image, follow=True, choices=choices), INPUT)
    with given(detector):
        left_out = len(_asleep(detector))
    if left_out:
        logger.info(
            f'{left_out} quantizers between the layers are not in the model for {runtime}; the simulation without them:'
        )
        found = compare_layer_inputs(detector, inputs, image, follow=True, within=given, choices=choices)
        name_first(logger, found, INPUT)


def _asleep(detector: nn.Module) -> list[str]:
    """The quantizers between the layers, and of products, that are switched off."""
    state = getattr(detector, STATE)
    read = {name for hook in state.hooks if isinstance(hook, QuantizedInput) for name in hook.names}
    return [name for name in state.activations if name not in read and not state.flow.works(name)]


def _log_shares(logger: MMLogger, found: list[TensorAgreement], what: str) -> None:
    if not found:
        raise PTQError('--compare compares quantized tensors, and the model has none; leave it out.')
    shares = [entry.identical for entry in found]
    logger.info(
        f'{len(found)} {what}, {sum(shares) / len(shares):.3%} of the codes are the same on average, '
        f'{min(shares):.3%} in the worst'
    )


def name_first(
    logger: MMLogger,
    found: list[TensorAgreement],
    kind: str = '',
    what: str = 'compared each for itself, computed from the same codes',
) -> None:
    """Logs how many codes are the same, and names the first tensor that diverges.

    Args:
        logger: Where.
        found: From the image to the outputs.
        kind: What stands before the name.
        what: How they were compared.
    """
    _log_shares(logger, found, what)
    first = next((entry for entry in found if entry.identical < AGREEMENT), None)
    if first is None:
        logger.info(f'every tensor has at least {AGREEMENT:.1%} of its codes in common')
    else:
        logger.warning(
            f'the first that diverges is {kind}{first.name}: {first.identical:.3%} of its codes are the '
            f'same, the largest difference is {first.largest}'
        )
