"""How a calibration's time and memory grow with the detector: five of mmdet's own configs, against their float pass.

python benchmarks/calibration_cost.py                   # half an hour or more on two cores
python benchmarks/calibration_cost.py --only mask_rcnn

Weights are random and the images noise: only time and memory matter. Each detector runs in a process of its own, so
that its largest resident set is its own. Images come one by one.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.registry import init_default_scope
from overhead import peak_memory
from runs import ROOT, VERSIONS
from zoo_architectures import zoo_config

from mmdet_ptq import PTQRunner
from mmdet_ptq.analysis import versions
from mmdet_ptq.calibration.images import LoadedSamples
from mmdet_ptq.config import PTQConfig

# config of mmdet's, and the size of its test images where they are largest
DETECTORS = {
    'ssdlite': ('ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py', (320, 320)),
    'yolox_s': ('yolox/yolox_s_8xb8-300e_coco.py', (640, 640)),
    'retinanet': ('retinanet/retinanet_r50_fpn_1x_coco.py', (800, 1344)),
    'faster_rcnn': ('faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', (800, 1344)),
    'mask_rcnn': ('mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', (800, 1344)),
}
TABLE = ROOT / 'docs' / 'results' / 'calibration_cost.csv'
FIELDS = (
    'detector',
    'config',
    'million',
    'height',
    'width',
    'images',
    'threads',
    'preset',
    'float_seconds_per_image',
    'calibration_seconds_per_image',
    'float_passes_per_image',
    'float_peak_gib',
    'calibration_peak_gib',
    'date',
    *VERSIONS,
    'command',
)


def batches(count: int, size: tuple[int, int]) -> list[dict]:
    """Colour images of smooth noise, one a batch, as a test pipeline gives them."""
    coarse = torch.rand(count, 3, size[0] // 16, size[1] // 16)
    images = (255 * F.interpolate(coarse, size=size, mode='bilinear')).round().to(torch.uint8)
    meta = dict(img_shape=size, ori_shape=size, pad_shape=size, scale_factor=(1.0, 1.0))
    return [
        dict(inputs=[image], data_samples=[DetDataSample(metainfo=meta | dict(img_id=i))])
        for i, image in enumerate(images)
    ]


def measure(name: str, count: int, threads: int, preset: str) -> dict:
    """One detector's line, in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    config, size = DETECTORS[name]
    cfg = zoo_config(config)
    init_default_scope('mmdet')
    model = MODELS.build(cfg.model).eval()
    data = batches(count, size)
    seconds = []
    with torch.no_grad():
        for batch in [data[0], *data]:
            start = time.perf_counter()
            model.test_step(batch)
            seconds.append(time.perf_counter() - start)
    float_peak, float_seconds = peak_memory(), sum(seconds[1:]) / count
    block = PTQConfig.from_dict(dict(export=['onnxruntime']), preset=preset)
    with tempfile.TemporaryDirectory() as folder:
        runner = PTQRunner(
            model=model, work_dir=folder, ptq=block, calibration=LoadedSamples(data), default_scope='mmdet', cfg=cfg
        )
        runner.begin()  # exports the float model, too
        start = time.perf_counter()
        runner.calibrate()
        own_seconds = (time.perf_counter() - start) / count
    return dict(
        detector=name,
        config=config,
        million=round(sum(p.numel() for p in model.parameters()) / 1e6, 1),
        height=size[0],
        width=size[1],
        images=count,
        threads=threads,
        preset=preset,
        float_seconds_per_image=round(float_seconds, 3),
        calibration_seconds_per_image=round(own_seconds, 2),
        float_passes_per_image=round(own_seconds / float_seconds, 1),
        float_peak_gib=round(float_peak / 2**30, 2),
        calibration_peak_gib=round(peak_memory() / 2**30, 2),
        date=datetime.now(timezone.utc).date().isoformat(),
        **{key: value for key, value in versions().items() if key in VERSIONS},
        command=f'python benchmarks/calibration_cost.py --only {name} --images {count} --threads {threads}',
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', nargs='+', choices=DETECTORS, default=list(DETECTORS))
    parser.add_argument('--images', type=int, default=8)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--preset', default='w8a8_observe')
    parser.add_argument('--out', type=Path, default=TABLE)
    parser.add_argument('--one', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        line = measure(args.only[0], args.images, args.threads, args.preset)
        with args.out.open('a', newline='') as file:
            csv.DictWriter(file, FIELDS, lineterminator='\n').writerow(line)
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    known = list(csv.DictReader(args.out.open(newline=''))) if args.out.is_file() else []
    with args.out.open('w', newline='') as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(line for line in known if line['detector'] not in args.only)
    for name in args.only:
        options = ['--images', str(args.images), '--threads', str(args.threads), '--preset', args.preset]
        command = [sys.executable, __file__, '--one', '--only', name, *options, '--out', str(args.out)]
        subprocess.run(command, check=True)


if __name__ == '__main__':
    main()
