"""Two processes calibrate the same detector."""

from __future__ import annotations

import socket
import time

import torch
import torch.multiprocessing
from mmengine.config import Config
from mmengine.runner import runner
from mmengine.runner.checkpoint import save_checkpoint

from mmdet_ptq.engine import PTQRunner
from mmdet_ptq.testing import tiny_config

RECIPE = dict(
    preset='w8a8_observe',
    weights=dict(bits=4),
    activations=dict(observer=dict(type='mmdet_ptq.MinMaxObserver')),
    calibration=dict(num_images=8, batch_size=2),
    reconstruct=dict(iters=2, rounding='latent', holdout=0.25),
    global_loss=dict(iters=2, batch_size=2, holdout=0.0),
)


def calibrate(rank: int, port: int, folder: str) -> None:
    """What one of two ranks does; on a GPU mmengine's launcher makes the group."""
    torch.set_num_threads(1)
    runner.save_checkpoint = slow_save  # only one rank writes, the other must wait
    torch.distributed.init_process_group('gloo', init_method=f'tcp://localhost:{port}', rank=rank, world_size=2)
    detector = run(folder, 'two')
    torch.save(detector.state_dict(), f'{folder}/{rank}.pt')
    torch.distributed.destroy_process_group()


def run(folder: str, name: str) -> torch.nn.Module:
    cfg = Config.fromfile(f'{folder}/tiny.py')
    cfg.work_dir, cfg.randomness = f'{folder}/{name}', dict(seed=0, diff_rank_seed=True)
    return PTQRunner.from_cfg(cfg).calibrate()


def slow_save(checkpoint: dict, filename: str, **kwargs) -> None:
    time.sleep(1)
    save_checkpoint(checkpoint, filename, **kwargs)


def test_every_rank_ends_with_the_same_detector_reconstructed_as_by_one(tmp_path):
    cfg = tiny_config('retinanet', tmp_path)
    cfg.ptq = RECIPE
    cfg.dump(tmp_path / 'tiny.py')
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(calibrate, (port, str(tmp_path)), nprocs=2)
    run(str(tmp_path), 'one')
    ranks = [torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in range(2)]
    assert all(torch.equal(value, ranks[1][key]) for key, value in ranks[0].items())
    # biases are corrected batch after batch, which two ranks do in another order
    one, two = (
        torch.load(tmp_path / name / 'stages' / 'reconstruct.pth', weights_only=True)['state']
        for name in ('one', 'two')
    )
    assert any(unit['outcome'] == 'trained' for unit in one['units'])
    assert [u['name'] for u in one['units']] == [u['name'] for u in two['units']]
    for key, value in one['model'].items():
        torch.testing.assert_close(two['model'][key], value, msg=key)
