"""Where in a detector an exporter gives up."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_WRAPPER = 'detector'  # the attribute under which exported networks keep the detector


def failing_module(network: nn.Module, inputs: tuple[Tensor, ...], cause: str) -> str:
    """Path of the module that cannot be exported, as the detector names it.

    The network is captured once more: either that fails inside the module, or the operation that the exporter names
    is one of the module's.

    Args:
        network: What was exported.
        inputs: What it reads.
        cause: What the exporter said.

    Returns:
        The path; empty where it cannot be told.
    """
    entered: list[str] = []
    handles = []

    def leave(*_) -> None:
        entered.pop()

    for name, module in network.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: entered.append(name)))
        handles.append(module.register_forward_hook(leave))
    try:
        program = torch.export.export(network, inputs, strict=False).run_decompositions()
    except Exception:  # whatever it is, it was reported already: here only the place counts
        return _shown(entered[-1]) if entered else ''
    finally:
        for handle in handles:
            handle.remove()
    for node in program.graph.nodes:
        if node.op == 'call_function' and repr(node.target) in cause:
            stack = node.meta.get('nn_module_stack') or {}
            return _shown([path for path, _ in stack.values()][-1]) if stack else ''
    return ''


def _shown(path: str) -> str:
    return path.removeprefix(f'{_WRAPPER}.')
