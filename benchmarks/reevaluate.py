"""Evaluates the detectors of finished runs on other images, where those of the config are too few to tell them apart.

python benchmarks/reevaluate.py CONFIG RUN [RUN ...] --cfg-options KEY=VALUE ... --out CSV

Each run is a work directory with a ``quantized.pth``; the float detector, from the config's ``load_from``, comes first.
"""

from __future__ import annotations

import argparse
from datetime import datetime, timezone
from pathlib import Path

from mmengine.config import Config
from runs import METRIC, VERSIONS, one_sentence, write_csv

from mmdet_ptq.analysis import versions
from mmdet_ptq.cli import load_config
from mmdet_ptq.engine import evaluate, load_quantized
from mmdet_ptq.errors import PTQError

FIELDS = ('detector', 'run', 'AP', 'difference_points', 'images', 'date', *VERSIONS, 'options')


def reevaluate(cfg: Config, runs: list[Path]) -> list[dict]:
    """One line for the float detector and one for each run.

    Args:
        cfg: The config with the other images; ``work_dir`` and ``load_from`` must be set.
        runs: Work directories.

    Raises:
        PTQError: The config has no ``load_from``, or a run has no checkpoint.
    """
    from mmdet.apis import init_detector

    if not cfg.get('load_from'):
        raise PTQError('the config has no `load_from`, the checkpoint of the float detector.')
    for run in runs:
        if not (run / 'quantized.pth').is_file():
            raise PTQError(f'{str(run)!r} has no quantized.pth; finish the run first.')
    lines, metrics = [], evaluate(cfg, init_detector(cfg, cfg.load_from, device='cpu'))
    ap = metrics[METRIC]
    lines.append(dict(run='float', AP=ap, difference_points=0.0))
    for run in runs:
        found = evaluate(cfg, load_quantized(run / 'quantized.pth', cfg))[METRIC]
        lines.append(
            dict(run='/'.join(run.resolve().parts[-2:]), AP=found, difference_points=round(100 * (found - ap), 1))
        )
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', type=Path)
    parser.add_argument('runs', nargs='+', type=Path, help='work directories of finished runs')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='the other images')
    parser.add_argument('--work-dir', default='work_dirs/reevaluate', help='where logs go')
    parser.add_argument('--out', type=Path, required=True, help='CSV file')
    args = parser.parse_args(argv)
    cfg = load_config(str(args.config), args.cfg_options)
    cfg.work_dir = args.work_dir
    lines = reevaluate(cfg, args.runs)
    from mmdet.registry import DATASETS

    images = len(DATASETS.build(cfg.test_dataloader.dataset))
    about = dict(
        detector=args.config.stem,
        images=images,
        date=datetime.now(timezone.utc).date().isoformat(),
        options=' '.join(args.cfg_options),
        **{name: versions().get(name, '') for name in VERSIONS},
    )
    write_csv(args.out, [{**line, **about} for line in lines], FIELDS)


if __name__ == '__main__':
    one_sentence(main)
