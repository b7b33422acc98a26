"""One run per detector and preset, exported: float, simulated and every runtime, one CSV line each.

python benchmarks/runtimes.py CONFIG [CONFIG ...] --presets w8a8 w4a8 --out docs/results/runtimes.csv

A second run with the same --work-dir takes over what is finished.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import runs
from runs import METRIC, ROOT, one_sentence, run_ptq, write_csv

from mmdet_ptq.deploy import get_runtime, model_bytes, runtime_names
from mmdet_ptq.deploy.onnx.weight_bytes import weight_bytes

VERSIONS = (*runs.VERSIONS, 'onnx', 'onnxruntime', 'openvino', 'ncnn')
FIELDS = (
    'detector',
    'preset',
    'model',
    'AP',
    'difference_points',
    'bytes',
    'float_bytes',
    'bytes_ratio',
    'weights_ratio',
    'integer_convolutions',
    'convolutions',
    'latency_ratio',
    'dataflow',
    'calibration_images',
    'seed',
    'date',
    *VERSIONS,
    'command',
)


def lines_of(config: Path, preset: str, folder: Path, options: list[str], silent: list[str]) -> list[dict]:
    """Runs one recipe; a line per row of its results."""
    command, results = run_ptq(config, preset, folder, [*options, *silent])
    first, found = results['rows'][0], []
    told = ['--cfg-options', *options] if options else []
    for row in results['rows']:
        coverage = results.get('runtimes', {}).get(row['model'])
        float_bytes, weights_ratio = first['size_bytes'], ''
        if coverage:
            # in the same format, so that names and graph count on both sides
            stored = folder / row['model'] / 'float' / f'model{get_runtime(row["model"]).suffix}'
            float_bytes = model_bytes(stored)
            if stored.suffix == '.onnx':
                # without the graph, which outweighs the weights of a small detector
                weights_ratio = round(weight_bytes(folder / row['model'] / 'model.onnx') / weight_bytes(stored), 3)
        ap, reference = row['metrics'][METRIC], first['metrics'][METRIC]
        found.append(
            dict(
                detector=config.stem,
                preset=preset,
                model=row['model'],
                AP=ap,
                difference_points=round(100 * (ap - reference), 1),
                bytes=row['size_bytes'],
                float_bytes=float_bytes,
                bytes_ratio=round(row['size_bytes'] / float_bytes, 3),
                weights_ratio=weights_ratio,
                integer_convolutions=len(coverage['integer']) if coverage else '',
                convolutions=len(coverage['integer']) + len(coverage['float']) if coverage else '',
                latency_ratio=row['latency_ratio'] and round(row['latency_ratio'], 2),
                dataflow=results['recipe']['dataflow'],
                calibration_images=results['calibration']['num_images'],
                seed=results['seed'],
                date=results['date'][:10],
                command=' '.join(['python', 'tools/ptq.py', config.name, *command[2:4], *told]),
                **{name: results['versions'].get(name, '') for name in VERSIONS},
            )
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', nargs='+', type=Path)
    parser.add_argument('--presets', nargs='+', default=['w8a8'])
    parser.add_argument('--runtimes', nargs='+', default=['onnxruntime', 'openvino'], choices=runtime_names())
    parser.add_argument('--recipe', nargs='*', default=[], metavar='KEY=VALUE', help='changes that make the recipe')
    parser.add_argument('--out', type=Path, required=True, help='CSV file')
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'runtimes')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='changes that change no figure')
    args = parser.parse_args()
    options = [f'ptq.export={args.runtimes}'.replace(' ', ''), *args.recipe]
    lines = []
    for config in args.configs:
        for preset in args.presets:
            folder = args.work_dir.resolve() / config.stem / preset
            lines += lines_of(config.resolve(), preset, folder, options, args.cfg_options)
            write_csv(args.out, lines, FIELDS)


if __name__ == '__main__':
    one_sentence(main)
