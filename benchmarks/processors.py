"""What the bound on neighbouring weights costs, and what exported models give with and without VNNI; one CSV line each.

python benchmarks/processors.py CONFIG [CONFIG ...] --presets w8a8_observe w4a8 --out docs/results/processors.csv

Each detector is quantized with ``ptq.saturation='safe'`` and ``'ignore'``, and its models are evaluated, compared with
the simulation code by code and timed on this processor and on others (:mod:`mmdet_ptq.testing.processors`). A second
run with the same --work-dir takes over what is finished.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import runs
import torch
from runs import METRIC, ROOT, one_sentence, run_ptq, write_csv

from mmdet_ptq.analysis import versions
from mmdet_ptq.cli import load_config
from mmdet_ptq.deploy import open_model, read_quantized, runtime_detector
from mmdet_ptq.deploy.agreement import compare_layer_inputs
from mmdet_ptq.deploy.checkpoint.packing import unflatten_tensors
from mmdet_ptq.deploy.onnxruntime.compare import compare_codes
from mmdet_ptq.deploy.openvino.layer_inputs import openvino_inputs
from mmdet_ptq.engine import evaluate, load_quantized
from mmdet_ptq.engine.stages.export import time_against_float
from mmdet_ptq.errors import PTQError
from mmdet_ptq.files import write_json
from mmdet_ptq.testing.processors import PROCESSORS, cannot_emulate, environment
from mmdet_ptq.wrapping.state import only_read_tensors

RUNTIMES = ('onnxruntime', 'openvino')
HERE = 'here'
VERSIONS = (*runs.VERSIONS, 'onnxruntime', 'openvino')
FIELDS = (
    'detector',
    'preset',
    'saturation',
    'runtime',
    'without_vnni',
    'float_AP',
    'simulated_AP',
    'AP',
    'difference_points',
    'identical_codes',
    'latency_ratio',
    'wider_channels',
    'marked',
    'calibration_images',
    'seed',
    'date',
    *VERSIONS,
    'command',
)


def measure(config: Path, folder: Path, options: list[str]) -> dict:
    """What one exported model gives on the processor of this process.

    Args:
        config: The config.
        folder: Of the runtime, in a run's work directory.
        options: ``--cfg-options``.
    """
    (path,) = folder.glob('model.onnx') if folder.name == 'onnxruntime' else folder.glob('model.xml')
    model, shape = open_model(path), tuple(open_model(path).meta['input_shape'])
    cfg = load_config(str(config), options)
    cfg.work_dir = str(folder / 'evaluation')
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    # neighbouring pixels are alike, as in an image
    image = torch.nn.functional.avg_pool2d(image, 9, 1, 4) * 9
    detector = load_quantized(folder.parent / 'quantized.pth', cfg)
    if folder.name == 'onnxruntime':
        found = compare_codes(detector, path, image, follow=True)
    else:
        # it is given no quantizers between the layers
        found = compare_layer_inputs(
            detector, openvino_inputs(path, image), image, follow=True, within=only_read_tensors
        )
    (float_path,) = (folder / 'float').glob(path.name)
    return dict(
        AP=evaluate(cfg, runtime_detector(cfg, model))[METRIC],
        identical_codes=float(np.mean([entry.identical for entry in found])),
        latency_ratio=time_against_float(path, float_path, shape).ratio,
        marked=bool(model.remark()),
    )


def measured(config: Path, folder: Path, processor: str, options: list[str]) -> dict:
    """The same in a process of its own, on another processor."""
    stored = folder / f'measured_{processor}.json'
    model = next(path for path in folder.glob('model.*') if path.suffix in ('.onnx', '.xml'))
    if not stored.exists() or stored.stat().st_mtime < model.stat().st_mtime:
        env = dict(os.environ) if processor == HERE else environment(processor)
        subprocess.run(
            [
                sys.executable,
                __file__,
                str(config),
                '--measure',
                str(folder),
                '--out',
                str(stored),
                *(['--cfg-options', *options] if options else []),
            ],
            env=env,
            check=True,
        )
    return json.loads(stored.read_text())


def wider_channels(safe: Path, ignored: Path) -> float:
    """Share of the output channels whose scale the bound made larger."""
    first, second = (unflatten_tensors(read_quantized(path)['tensors']) for path in (safe, ignored))
    names = [name for name in first if name.endswith('parametrizations.weight.0.quantizer.scale')]
    return float(torch.cat([(first[name] > 1.0001 * second[name]).float() for name in names]).mean())


def lines_of(config: Path, preset: str, args: argparse.Namespace) -> list[dict]:
    """Both settings of one detector and preset."""
    lines, folders = [], {}
    for saturation in ('ignore', 'safe'):
        recipe = [
            f'ptq.saturation={saturation}',
            f'ptq.export=[{",".join(RUNTIMES)}]',
            f'ptq.calibration.num_images={args.images}',
            *args.recipe,
        ]
        folders[saturation] = args.work_dir.resolve() / config.stem / preset / saturation
        command, results = run_ptq(config, preset, folders[saturation], [*recipe, *args.cfg_options])
        rows = {row['model']: row['metrics'][METRIC] for row in results['rows']}
        for runtime in RUNTIMES:
            for processor in (HERE, *args.processors):
                found = measured(config, folders[saturation] / runtime, processor, args.cfg_options)
                lines.append(
                    dict(
                        detector=config.stem,
                        preset=preset,
                        saturation=saturation,
                        runtime=runtime,
                        without_vnni='' if processor == HERE else processor,
                        float_AP=rows['float'],
                        simulated_AP=rows['simulated'],
                        AP=found['AP'],
                        difference_points=round(100 * (found['AP'] - rows['float']), 1),
                        identical_codes=round(found['identical_codes'], 5),
                        latency_ratio=round(found['latency_ratio'], 2),
                        marked=found['marked'],
                        calibration_images=results['calibration']['num_images'],
                        seed=results['seed'],
                        date=results['date'][:10],
                        command=' '.join(
                            ['python', 'tools/ptq.py', config.name, *command[2:4], '--cfg-options', *recipe]
                        ),
                        **{name: results['versions'][name] for name in VERSIONS},
                    )
                )
    if preset.startswith('w8'):
        share = wider_channels(*(folders[name] / 'quantized.pth' for name in ('safe', 'ignore')))
        for line in lines:
            line['wider_channels'] = round(share, 3) if line['saturation'] == 'safe' else ''
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', nargs='+', type=Path)
    parser.add_argument('--presets', nargs='+', default=['w8a8_observe'])
    parser.add_argument(
        '--processors',
        nargs='*',
        default=list(PROCESSORS),
        choices=list(PROCESSORS),
        help='what this processor is asked to be, too',
    )
    parser.add_argument('--images', type=int, default=128, help='calibration images')
    parser.add_argument('--recipe', nargs='*', default=[], metavar='KEY=VALUE', help='changes that make the recipe')
    parser.add_argument('--out', type=Path, required=True, help='CSV file')
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'processors')
    parser.add_argument('--measure', type=Path, help=argparse.SUPPRESS)
    parser.add_argument('--cfg-options', nargs='+', default=[], help='changes that change no figure')
    args = parser.parse_args(argv)
    if args.measure is not None:
        write_json(args.out, measure(args.configs[0], args.measure, args.cfg_options))
        return
    if args.processors and cannot_emulate():
        raise PTQError(f'{cannot_emulate()}; pass --processors without names.')
    print(f'on {versions()["processor"]}')
    lines = []
    for config in args.configs:
        for preset in args.presets:
            lines += lines_of(config.resolve(), preset, args)
            write_csv(args.out, lines, FIELDS)


if __name__ == '__main__':
    one_sentence(main)
