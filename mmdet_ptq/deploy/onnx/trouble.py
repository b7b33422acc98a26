"""Where in a detector an exporter gives up."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

_WRAPPER = 'detector'  # the attribute under which exported networks keep the detector
# whose lines are not the detector's
_OURS = (Path(torch.__file__).parent, Path(__file__).parents[2])


def failing_place(network: nn.Module, inputs: tuple[Tensor, ...], cause: str) -> str:
    """The module that cannot be exported, as the detector names it, and the line of its code.

    The network is captured once more: either that fails inside the module, or the operation that the exporter names
    is one of the module's.

    Args:
        network: What was exported.
        inputs: What it reads.
        cause: What the exporter said.

    Returns:
        As in ``neck.1, line 27 of mmcv/ops/nms.py``; empty where it cannot be told.
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
    except Exception as error:  # whatever it is, it was reported already: here only the place counts
        frames = traceback.extract_tb(error.__traceback__)
        return _shown(entered[-1:], [(frame.filename, frame.lineno) for frame in frames])
    finally:
        for handle in handles:
            handle.remove()
    for node in program.graph.nodes:
        if node.op == 'call_function' and repr(node.target) in cause:
            stack = node.meta.get('nn_module_stack') or {}
            frames = re.findall(r'File "(.+?)", line (\d+)', node.meta.get('stack_trace') or '')
            return _shown([path for path, _ in stack.values()][-1:], frames)
    return ''


def _shown(module: list[str], frames: Iterable[tuple[str, int | str]]) -> str:
    parts = [path.removeprefix(f'{_WRAPPER}.') for path in module]
    lines = [(Path(file), line) for file, line in frames if not any(map(Path(file).is_relative_to, _OURS))]
    if lines:
        file, line = lines[-1]
        known = 'site-packages' in file.parts
        parts.append(f'line {line} of {file.as_posix().rpartition("site-packages/")[2] if known else file.name}')
    return ', '.join(parts)
