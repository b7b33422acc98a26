"""What a run is going to do, and about how long it will take: told before anything long."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmdet_ptq.calibration import ROUNDING_IMAGES, WEIGHED_IMAGES
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.deploy import EXACT_IMAGES
from mmdet_ptq.engine.run import Run
from mmdet_ptq.progress import clock
from mmdet_ptq.wrapping import check_detector, planned_layers
from mmdet_ptq.wrapping.watching.tensors import tensors_in

# Seconds of a stage whatever the detector, and passes of the float detector over one image that an image costs more.
# Measured on SSDLite, YOLOX-nano and RetinaNet-R18, on a processor.
EVALUATION, SIMULATION, EXPORT = (3, 1.2), (3, 2.0), (10, 40.0)
# of images that the simulation computes without exact integers
PLAIN_SIMULATION = (0, 1.5)
PREPARATION, OBSERVING, WEIGHING, ROUNDING, TRAINING = (4, 100.0), 3.0, 8.0, 20.0, 8.0
# a layer or a tensor, in passes over every image
RECONSTRUCTION, PROTECTION = 4.0, 2.0
REPORT = 5.0
# what training keeps of an image, in outputs of the float detector's modules
KEPT = 8


@dataclass
class Plan:
    """What a run is going to do.

    Attributes:
        layers: Every layer to why it will stay float; '' where it will not.
        seconds: Stage to the seconds that it is thought to take.
        memory: Bytes that the run is thought to need; 0 where nobody knows.
    """

    layers: dict[str, str]
    seconds: dict[str, float]
    memory: int


def make_plan(run: Run) -> Plan:
    """Probes the float detector with one image.

    Args:
        run: Its detector, calibration and evaluation are loaded and checked.

    Raises:
        PTQError: A weight is not finite, a module is compiled or of TorchScript, or an override matches no layer.
    """
    check_detector(run.detector)
    one = run.one_image()
    layers = planned_layers(run.detector, run.ptq, one)
    with torch.no_grad():
        outputs = _output_bytes(run.detector, one)
        passes = []
        for _ in range(3):
            start = time.perf_counter()
            one()
            passes.append(time.perf_counter() - start)
    batch = max(run.ptq.calibration.batch_size, run.ptq.global_loss.batch_size if run.ptq.global_loss else 0)
    peak = peak_memory()
    memory = peak and peak + KEPT * outputs * batch
    return Plan(layers, dict(_seconds(run, min(passes), len(layers))), memory)


def peak_memory() -> int:
    """Bytes that this process has had at most; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def _output_bytes(detector: nn.Module, one: Any) -> int:
    """Bytes of what the detector's modules return for one image."""
    total = 0

    def add(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal total
        total += sum(tensor.nbytes for tensor in tensors_in(output))

    hooks = [m.register_forward_hook(add) for m in detector.modules() if not any(m.children())]
    try:
        one()
    finally:
        for hook in hooks:
            hook.remove()
    return total


def _seconds(run: Run, once: float, layers: int) -> Iterator[tuple[str, float]]:
    """Stages in their order, and what each is thought to take, from what one pass took."""
    evaluated = len(run.evaluation_dataset())

    def of(stage: tuple[float, float], images: int = 1) -> float:
        return stage[0] + stage[1] * images * once

    for name in run.runtimes:
        yield f'export_{name}_float', of(EXPORT)
    yield 'evaluate_float', of(EVALUATION, evaluated)
    for block in (run.ptq, *run.other_blocks):
        part = '' if block is run.ptq else f'{block.export[0]}_'
        for stage, passes in _calibration(block, len(run.calibration), layers):
            yield part + stage, (PREPARATION[0] if stage == 'prepare' else 0) + passes * once
        if run.canvas is not None and block is run.ptq:
            yield 'evaluate_float_padded', of(EVALUATION, evaluated)
        exact = min(evaluated, EXACT_IMAGES)
        yield f'{part}evaluate_simulated', of(SIMULATION, exact) + of(PLAIN_SIMULATION, evaluated - exact)
        for name in block.export:
            yield f'{part}export_{name}', of(EXPORT) + of(EVALUATION, evaluated)
    yield 'report', REPORT


def _calibration(ptq: PTQConfig, images: int, layers: int) -> Iterator[tuple[str, float]]:
    yield 'prepare', PREPARATION[1]
    rounding = ROUNDING * min(images, ROUNDING_IMAGES) if ptq.rounding == 'compensated' else 0
    yield 'observe', OBSERVING * images + WEIGHING * min(images, WEIGHED_IMAGES) + rounding
    if ptq.protect is not None:
        yield 'protect', PROTECTION * layers * min(images, ptq.protect.images)
    if ptq.reconstruct is not None:
        training = ptq.reconstruct.iters * ptq.reconstruct.batch_size / max(images, 1)
        yield 'reconstruct', (RECONSTRUCTION + training) * images * layers**0.5
    if ptq.global_loss is not None:
        yield 'global', TRAINING * ptq.global_loss.iters * ptq.global_loss.batch_size


def plan_lines(run: Run, plan: Plan) -> list[str]:
    """The plan, a line for each thing that a person may want to change."""
    reasons = Counter(reason for reason in plan.layers.values() if reason)
    left = [name for name, reason in plan.layers.items() if reason]
    told = ', '.join(left[:3]) + (f' and {len(left) - 3} more' if len(left) > 3 else '')
    why = '; '.join(f'{count} because {reason}' for reason, count in reasons.items())
    images = run.ptq.calibration.images or 'the training set'
    memory = f' and {plan.memory / 1e9:.1f} GB of memory' if plan.memory else ''
    size = ('up to ' if run.export_options else '') + 'x'.join(map(str, run.input_shape[2:]))
    return [
        'the plan:',
        f'  detector    {type(run.detector).__name__}, {len(plan.layers)} layers; input {size} (height x width)',
        f'  stays float {f"{told} ({why})" if left else "no layer"}',
        f'  calibration {len(run.calibration)} images of {images}, seed {run.ptq.calibration.seed}',
        f'  evaluation  {len(run.evaluation_dataset())} images',
        f'  runtimes    {", ".join(run.runtimes) or "none, simulated only (`ptq.export`)"}',
        '  stages      ' + ', '.join(f'{name.replace("_", " ")} {clock(s)}' for name, s in plan.seconds.items()),
        f'  in all      about {clock(sum(plan.seconds.values()))}{memory}, results in {run.work_dir}',
    ]
