"""Runs that are killed (SIGKILL) at random places, half of them within a write, resume to the same bytes."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import signal
from pathlib import Path
from threading import Timer

import pytest
from mmengine.config import Config
from mmengine.runner import runner as mmengine_runner
from torch.nn.modules.module import register_module_forward_hook

from mmdet_ptq import files
from mmdet_ptq.engine import PTQRunner
from mmdet_ptq.testing import tiny_config

pytestmark = pytest.mark.slow
KILLS = 30
RECIPE = dict(
    preset='w4a8',
    calibration=dict(num_images=6, batch_size=2),
    reconstruct=dict(iters=2, rounding='latent', holdout=0.34),
    global_loss=dict(iters=4, batch_size=2, holdout=0.34, val_interval=2, checkpoint_interval=2),
)
# forked: what is imported is imported once
FORK = multiprocessing.get_context('fork')


class Counts:
    """How often a run wrote, and how often it called a module: what a random place in it is told by."""

    def __init__(self) -> None:
        self.writes, self.calls = FORK.Value('i', 0), FORK.Value('i', 0)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(config: Path, work_dir: Path, counts: Counts, fatal_write: int, fatal_call: int, delay: float) -> None:
    """A run; counts, and kills itself in the middle of a write, or some time after it called a module."""

    def is_fatal_write() -> bool:
        counts.writes.value += 1
        return counts.writes.value == fatal_write

    def called(*_) -> None:
        counts.calls.value += 1
        if counts.calls.value == fatal_call:
            Timer(delay, killed).start()

    def torn(file, content: bytes) -> None:
        file.write(content[: len(content) // 2])
        file.flush()
        killed()

    def write_atomic(path, write) -> None:
        if not is_fatal_write():
            return whole(path, write)
        buffer = io.BytesIO()
        write(buffer)
        whole(path, lambda file: torn(file, buffer.getvalue()))

    def save_checkpoint(checkpoint, filename, *args, **kwargs) -> None:
        save(checkpoint, filename, *args, **kwargs)
        if is_fatal_write():
            content = Path(filename).read_bytes()
            with Path(filename).open('wb') as file:
                torn(file, content)

    os.environ['OMP_NUM_THREADS'] = '1'
    whole, files.write_atomic = files.write_atomic, write_atomic
    save, mmengine_runner.save_checkpoint = mmengine_runner.save_checkpoint, save_checkpoint
    register_module_forward_hook(called)
    cfg = Config.fromfile(config)
    cfg.work_dir, cfg.resume = str(work_dir), work_dir.exists()
    PTQRunner.from_cfg(cfg).run()


def ended(config: Path, work_dir: Path, fatal_write: int = 0, fatal_call: int = 0, delay: float = 0) -> tuple:
    """How a run in a process of its own ended, and its counts."""
    counts = Counts()
    process = FORK.Process(target=run, args=(config, work_dir, counts, fatal_write, fatal_call, delay))
    process.start()
    process.join()
    return process.exitcode, counts


@pytest.fixture(scope='module')
def whole_run(tmp_path_factory) -> tuple[Path, Path, Counts]:
    """The config, the work directory of a run that nobody killed, and its counts."""
    folder = tmp_path_factory.mktemp('kills')
    cfg = tiny_config('retinanet', folder)
    cfg.ptq = RECIPE
    cfg.dump(folder / 'tiny.py')
    code, counts = ended(folder / 'tiny.py', folder / 'whole')
    assert code == 0 and counts.writes.value > 10 and counts.calls.value > 1000
    return folder / 'tiny.py', folder / 'whole', counts


@pytest.mark.parametrize('seed', range(KILLS))
def test_a_killed_run_resumes_to_the_same_bytes(seed, whole_run, tmp_path):
    config, expected, counts = whole_run
    draw, work_dir = random.Random(seed), tmp_path / 'work_dir'
    if seed % 2:
        place = dict(fatal_write=draw.randint(1, counts.writes.value))
    else:
        # counted, not timed: a busy machine is slower, and at another time idle
        place = dict(fatal_call=draw.randint(1, int(0.95 * counts.calls.value)), delay=draw.uniform(0, 0.1))
    assert ended(config, work_dir, **place)[0] == -signal.SIGKILL
    assert ended(config, work_dir)[0] == 0
    for name in ('quantized.pth', 'results.json'):
        assert (work_dir / name).is_file()
    assert (work_dir / 'quantized.pth').read_bytes() == (expected / 'quantized.pth').read_bytes()
    assert not list(work_dir.rglob(f'.*{files.TEMPORARY}'))
