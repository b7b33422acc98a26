"""Float against quantized detectors: observers only, then with the global loss, one CSV line each.

python benchmarks/zoo.py CONFIG [CONFIG ...] --out docs/results/zoo_w8a8.csv

A second run with the same --work-dir takes over what is finished.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from runs import ROOT, run, write_csv


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
            lines.append(
                run(config.resolve(), preset, preset, args.work_dir.resolve() / config.stem, options=args.cfg_options)
            )
            write_csv(args.out, lines)


if __name__ == '__main__':
    main()
