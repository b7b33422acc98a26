"""Two processes, started by torchrun on a machine without a GPU, calibrate as one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmdet_ptq.engine import PTQRunner
from mmdet_ptq.testing import tiny_config

# three runs in processes of their own, a minute together
pytestmark = pytest.mark.slow

RECIPE = dict(
    preset='w8a8_observe',
    weights=dict(bits=4),
    # its ranges depend on the order of the batches
    head=dict(activations=dict(observer=dict(type='mmdet_ptq.MovingAverageObserver'))),
    calibration=dict(num_images=9, batch_size=2),
    reconstruct=dict(iters=2, rounding='latent', holdout=0.25),
    # the size of a step is that of the gradient
    global_loss=dict(iters=1, batch_size=2, holdout=0.0, bias_lr=0.01, optim_wrapper=dict(optimizer=dict(type='SGD'))),
)
# what every rank does
PROGRAM = """
import os, sys, time
import torch
from mmengine.runner import runner
from mmengine.runner.checkpoint import save_checkpoint
from mmdet_ptq.cli import load_config
from mmdet_ptq.engine import PTQRunner

def slow_save(*args, **kwargs):  # only one rank writes, the other must wait
    time.sleep(0.3)
    save_checkpoint(*args, **kwargs)

runner.save_checkpoint = slow_save
folder = sys.argv[1]
cfg = load_config(f'{folder}/tiny.py')
cfg.launcher, cfg.work_dir = 'pytorch', f'{folder}/two'
cfg.randomness = dict(seed=0, diff_rank_seed=True)
run = PTQRunner.from_cfg(cfg)
run.run()
torch.save(run.detector.state_dict(), f'{folder}/{os.environ["RANK"]}.pt')
torch.distributed.destroy_process_group()
"""


def stage(folder: Path, name: str) -> dict:
    return torch.load(folder / 'stages' / f'{name}.pth', weights_only=True)['state']


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """Holds the runs of one and of two processes."""
    folder = tmp_path_factory.mktemp('distributed')
    cfg = tiny_config('retinanet', folder)
    cfg.ptq = RECIPE
    # as in mmdet's own configs
    cfg.env_cfg = dict(dist_cfg=dict(backend='nccl'))
    cfg.dump(folder / 'tiny.py')
    (folder / 'program.py').write_text(PROGRAM)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    done = subprocess.run(
        [*command, str(folder / 'program.py'), str(folder)],
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '-1'},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    cfg.work_dir = str(folder / 'one')
    PTQRunner.from_cfg(cfg).calibrate()
    return folder


def test_every_rank_ends_with_the_same_detector(folder):
    assert_equal(*(torch.load(folder / f'{rank}.pt', weights_only=True) for rank in range(2)))
    assert (folder / 'two' / 'results.json').is_file()


def test_up_to_the_global_stage_two_processes_give_what_one_gives(folder):
    for name in ('prepare', 'observe'):
        one, two = (stage(folder / run, name) for run in ('one', 'two'))
        assert_equal(two.get('model', two), one.get('model', one))
    one, two = (stage(folder / run, 'reconstruct') for run in ('one', 'two'))
    assert any(unit['outcome'] == 'trained' for unit in one['units'])
    assert [{**unit, 'seconds': 0} for unit in one['units']] == [{**unit, 'seconds': 0} for unit in two['units']]
    assert_equal(two['model'], one['model'])


def test_the_global_stage_of_two_processes_averages_what_one_averages(folder):
    before, *after = (
        stage(folder / 'one', 'reconstruct')['model'],
        *(stage(folder / r, 'global') for r in ('one', 'two')),
    )
    # scales are left out: their gradients have a factor by the number of values that a process sees
    biases = [key for key in before if key.endswith('.bias') and not torch.equal(after[0][key], before[key])]
    assert len(biases) > 10
    for key in biases:
        one, two = (state[key] - before[key] for state in after)
        torch.testing.assert_close(two, one, rtol=0, atol=1e-4 * float(one.abs().max()) + 1e-7, msg=key)
