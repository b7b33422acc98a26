"""Float against quantized detectors: observers only, then with the global loss, one CSV line each.

python benchmarks/zoo.py CONFIG [CONFIG ...] --out docs/results/zoo_w8a8.csv

A second run with the same --work-dir takes over what is finished.
"""
from __future__ import annotations

import argparse
import csv
import io
import subprocess
import sys
from pathlib import Path

from mmdet_ptq.analysis import read_results
from mmdet_ptq.files import write_text

ROOT = Path(__file__).resolve().parent.parent
METRIC = 'coco/bbox_mAP'
FIELDS = ('detector', 'recipe', 'float_AP', 'quantized_AP', 'difference_points', 'integer_mac_share',
          'float_bytes', 'quantized_bytes', 'calibration_images', 'seed', 'date',
          'mmdet_ptq', 'torch', 'mmdet', 'mmcv', 'mmengine', 'numpy', 'python', 'command')


def run(config: Path, preset: str, work_dir: Path, options: list[str]) -> dict:
    """Runs one recipe and returns its line."""
    command = ['tools/ptq.py', str(config), '--preset', preset, '--work-dir', str(work_dir), '--resume']
    if options:
        command += ['--cfg-options', *options]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    results = read_results(work_dir / 'results.json')
    rows = {row['model']: row for row in results['rows']}
    ap = {name: row['metrics'][METRIC] for name, row in rows.items()}
    versions = results['versions']
    return dict(
        detector=config.stem, recipe=preset, float_AP=ap['float'], quantized_AP=ap['simulated'],
        difference_points=round(100 * (ap['simulated'] - ap['float']), 1),
        integer_mac_share=results['coverage']['integer_mac_share'], float_bytes=rows['float']['size_bytes'],
        quantized_bytes=rows['simulated']['size_bytes'], calibration_images=results['calibration']['num_images'],
        seed=results['seed'], date=results['date'][:10],
        command=' '.join(['python', 'tools/ptq.py', config.name, *command[2:4]]),
        **{name: versions[name] for name in FIELDS if name in versions})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', nargs='+', type=Path)
    parser.add_argument('--presets', nargs='+', default=['w8a8_observe', 'w8a8'])
    parser.add_argument('--out', type=Path, required=True, help='CSV file')
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'zoo')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='changes to every config')
    args = parser.parse_args()
    lines = []
    for config in args.configs:
        for preset in args.presets:
            lines.append(run(config.resolve(), preset, args.work_dir.resolve() / config.stem, args.cfg_options))
            write_text(args.out, _csv(lines))


def _csv(lines: list[dict]) -> str:

    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator='\n')
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


if __name__ == '__main__':
    main()
