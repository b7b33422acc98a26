"""What simulation costs: forward time against float, peak memory of the global stage against float training.

python benchmarks/overhead.py work_dirs/yolox_nano/quantized.pth --size 416 416

Times are ratios of interleaved pairs in one process; memory is the growth of the resident set of a fresh process over
one training step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdet_ptq import load_quantized
from mmdet_ptq.analysis import versions
from mmdet_ptq.calibration import FilteredGlobalLoss
from mmdet_ptq.config import GlobalLossConfig
from mmdet_ptq.engine.global_stage.optim import train_only_quantization
from mmdet_ptq.engine.global_stage.train import GlobalLossModel
from mmdet_ptq.predictions import predict_aligned
from mmdet_ptq.wrapping import set_mode, thaw_weights


def make_batch(count: int, size: tuple[int, int]) -> tuple[Tensor, list[DetDataSample]]:
    """Random images of one size with one box each."""
    meta = dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1.0, 1.0))
    box = torch.tensor([[size[1] * 0.2, size[0] * 0.2, size[1] * 0.6, size[0] * 0.7]])
    samples = [
        DetDataSample(metainfo=meta, gt_instances=InstanceData(bboxes=box, labels=torch.tensor([0])))
        for _ in range(count)
    ]
    return torch.randn(count, 3, *size), samples


def float_detector(quantized: nn.Module) -> nn.Module:
    """A float detector of the same config, with fresh weights: only its time and memory matter."""
    return MODELS.build(quantized.cfg['model'])


def forward_ratio(detector: nn.Module, reference: nn.Module, batch: tuple, pairs: int) -> dict:
    """Median time of the simulated forward over the float one."""
    reference.eval()
    times: dict[str, list[float]] = {'float': [], 'simulated': []}
    with torch.no_grad():
        for _ in range(pairs + 1):
            for name, model in (('float', reference), ('simulated', detector)):
                start = time.perf_counter()
                model(*batch, mode='tensor')
                times[name].append(time.perf_counter() - start)
    ratios = [s / f for s, f in zip(times['simulated'][1:], times['float'][1:], strict=True)]
    return dict(ratio=round(statistics.median(ratios), 3), least=round(min(ratios), 3), most=round(max(ratios), 3))


def peak_memory() -> int:
    """Largest resident set so far, in bytes; what getrusage tells begins with that of the process that started this."""
    status = Path('/proc/self/status').read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith('VmHWM')))


def step_memory(path: str, mode: str, count: int, size: tuple[int, int]) -> int:
    """Growth of the resident set over one training step, in bytes; run in a fresh process."""
    detector = load_quantized(path)
    batch = make_batch(count, size)
    if mode == 'train':
        model = float_detector(detector).train()
        before = peak_memory()
        losses = model.loss(*batch)
    else:
        set_mode(detector, 'float')
        target = make_target(detector, batch)
        set_mode(detector, 'quantize')
        thaw_weights(detector)
        train_only_quantization(detector, GlobalLossConfig(weight_lr=1e-3).rates())
        model = GlobalLossModel(detector, FilteredGlobalLoss())
        model.eval()
        model.target = target
        before = peak_memory()
        losses = model(*batch)
    terms = [v if isinstance(v, Tensor) else sum(v) for k, v in losses.items() if 'loss' in k]
    sum(terms).sum().backward()
    return peak_memory() - before


@torch.no_grad()
def make_target(detector: nn.Module, batch: tuple):
    """The float predictions, image by image, so that they leave no peak of their own."""
    parts = [predict_aligned(detector, batch[0][i : i + 1], batch[1][i : i + 1]) for i in range(len(batch[1]))]
    merged = parts[0]
    for name in ('cls_logits', 'boxes', 'quality_logits', 'distributions'):
        if getattr(merged, name) is not None:
            setattr(merged, name, torch.cat([getattr(part, name) for part in parts]))
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint', help='a quantized.pth')
    parser.add_argument('--size', type=int, nargs=2, default=(416, 416), help='height and width')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--pairs', type=int, default=10)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--step', choices=['train', 'calibrate'], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    size = tuple(args.size)
    if args.step:
        print(step_memory(args.checkpoint, args.step, args.batch_size, size))
        return
    detector = load_quantized(args.checkpoint)
    forward = forward_ratio(detector, float_detector(detector), make_batch(args.batch_size, size), args.pairs)
    memory = {}
    for step in ('train', 'calibrate'):
        out = subprocess.run([sys.executable, *sys.argv, '--step', step], capture_output=True, text=True, check=True)
        memory[step] = int(out.stdout.split()[-1])
    print(
        json.dumps(
            dict(
                forward_simulated_over_float=forward,
                memory_bytes=memory,
                memory_calibrate_over_train=round(memory['calibrate'] / memory['train'], 3),
                batch_size=args.batch_size,
                size=size,
                threads=args.threads,
                versions=versions(),
            ),
            indent=1,
        )
    )


if __name__ == '__main__':
    main()
