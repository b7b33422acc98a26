"""Trains a float detector with mmengine's own loop, and writes a slim checkpoint: weights and plain values only.

With --quantized it trains a quantized detector instead, and writes a quantized.pth.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import mmengine
import torch
from mmengine.config import Config, DictAction
from mmengine.runner import Runner
from torch import Tensor, nn

from mmdet_ptq.engine.label_training import train_quantized
from mmdet_ptq.errors import PTQError


def to_fast_layout(model: nn.Module) -> None:
    """Trains twice as fast on a CPU, where a convolution takes the layout of its weights.

    Two-stage detectors stay as they are: on a CPU mmcv's RoIAlign ignores the layout, and reads other numbers.
    """
    if not hasattr(model, 'roi_head'):
        model.to(memory_format=torch.channels_last)


def slim_state(model: nn.Module, half: bool) -> dict[str, Tensor]:
    """A model's state on the CPU, with the versions of its layers; what modules share stands there once.

    Args:
        model: The model.
        half: Whether floating point values become float16.
    """
    state, stored = model.state_dict(), {}
    for name, value in state.items():
        place = value.data_ptr(), value.shape
        if place not in stored:
            plain = value.cpu().contiguous()
            stored[place] = plain.half() if half and plain.is_floating_point() else plain
        state[name] = stored[place]
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config')
    parser.add_argument('--export', type=Path, help='where to write the slim checkpoint (no optimizer, no history)')
    parser.add_argument('--half', action='store_true', help='store the weights as float16')
    parser.add_argument(
        '--quantized',
        type=Path,
        help='a quantized.pth: it is trained with its labels, and the work directory gets a new one',
    )
    parser.add_argument('--resume', action='store_true', help='go on from the last checkpoint of the work directory')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={})
    args = parser.parse_args()

    config = Config.fromfile(args.config)
    config.merge_from_dict(args.cfg_options)
    config.resume = args.resume
    config.work_dir = config.get('work_dir') or f'work_dirs/{Path(args.config).stem}'
    if args.quantized:
        try:
            train_quantized(config, args.quantized)
        except PTQError as error:
            print(f'error: {error}', file=sys.stderr)
            sys.exit(2)
        return
    runner = Runner.from_cfg(config)
    to_fast_layout(runner.model)
    runner.train()
    if args.export:
        meta = dict(
            dataset_meta={key: list(value) for key, value in runner.train_dataloader.dataset.metainfo.items()},
            config=Path(args.config).name,
            epoch=runner.epoch,
            seed=runner.seed,
            torch_version=str(torch.__version__),
            mmengine_version=mmengine.__version__,
        )
        args.export.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(state_dict=slim_state(runner.model, args.half), meta=meta), args.export)


if __name__ == '__main__':
    main()
