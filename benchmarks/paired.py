"""How two detectors differ in AP on the same images, with a 95 % interval by a paired bootstrap over images and seeds.

python benchmarks/paired.py --before WORK_DIR [WORK_DIR ...] --after WORK_DIR [WORK_DIR ...]

Several work directories a side are runs with other seeds, in the same order on both sides.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from runs import one_sentence

import mmdet_ptq  # noqa: F401  registers the data set of the drawn images
from mmdet_ptq.analysis.detected.average_precision import Matches, match_classes, paired_bootstrap
from mmdet_ptq.engine.kept import kept_detections, truths_of
from mmdet_ptq.errors import PTQError

RESAMPLES = 1000


def matches_of(folders: Sequence[Path], row: str) -> list[list[Matches]]:
    """What the detectors of some runs found, matched with the annotations.

    Args:
        folders: Work directories of runs on the same evaluation images.
        row: The detector's row.

    Raises:
        PTQError: A run has kept no detections, or its config is gone.
    """
    configs = sorted(folders[0].glob('*.py'))
    if not configs:
        raise PTQError(f'{folders[0]} holds no config; it is written when a run begins.')
    cfg = Config.fromfile(configs[0])
    init_default_scope(cfg.get('default_scope') or 'mmdet')
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    truths, found = truths_of(dataset), []
    for folder in folders:
        detections = kept_detections(folder, row)
        if detections is None:
            raise PTQError(f'{folder} holds no detections of the row {row!r}; run the evaluation again.')
        found.append(match_classes(detections, truths, len(dataset.metainfo['classes'])))
    return found


def difference_of(
    before: Sequence[Path],
    after: Sequence[Path],
    row: str = 'simulated',
    before_row: str | None = None,
    resamples: int = RESAMPLES,
) -> tuple[float, float, float, int]:
    """How much higher AP is, in points: the mean over runs, the ends of its 95 % interval, and the number of images.

    Args:
        before: Work directories of one side.
        after: As many of the other, in the same order.
        row: The detector's row.
        before_row: That of the first side, if another.
        resamples: How often images and runs are drawn.
    """
    sides = matches_of(before, before_row or row), matches_of(after, row)
    return *paired_bootstrap(*sides, resamples=resamples), len(sides[0][0][0].truths)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--before', nargs='+', type=Path, required=True, help='work directories')
    parser.add_argument('--after', nargs='+', type=Path, required=True, help='as many, in the same order')
    parser.add_argument('--row', default='simulated', help='row of the results, default: simulated')
    parser.add_argument('--before-row', help='of the first side, if another, as float')
    parser.add_argument('--resamples', type=int, default=RESAMPLES)
    args = parser.parse_args(argv)
    if len(args.before) != len(args.after):
        parser.error('--before and --after need equally many work directories')
    points, low, high, images = difference_of(args.before, args.after, args.row, args.before_row, args.resamples)
    told = f'{len(args.after)} seeds, {images} images'
    print(f'{points:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}, {told}')


if __name__ == '__main__':
    one_sentence(main)
