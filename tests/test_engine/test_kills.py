"""Runs that are killed (SIGKILL) at random places, half of them within a write, resume to the same bytes."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.runner import runner as mmengine_runner

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


def run(config: Path, work_dir: Path, fatal_write: int | None, writes=None) -> None:
    """A run; counts its writes, and kills itself in the middle of one of them."""

    def count() -> bool:
        with writes.get_lock():
            writes.value += 1
            return writes.value == fatal_write

    def torn(file, content: bytes) -> None:
        file.write(content[: len(content) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def write_atomic(path, write) -> None:
        if not count():
            return whole(path, write)
        buffer = io.BytesIO()
        write(buffer)
        whole(path, lambda file: torn(file, buffer.getvalue()))

    def save_checkpoint(checkpoint, filename, *args, **kwargs) -> None:
        save(checkpoint, filename, *args, **kwargs)
        if count():
            content = Path(filename).read_bytes()
            with Path(filename).open('wb') as file:
                torn(file, content)

    os.environ['OMP_NUM_THREADS'] = '1'
    if writes is not None:
        whole, files.write_atomic = files.write_atomic, write_atomic
        save, mmengine_runner.save_checkpoint = mmengine_runner.save_checkpoint, save_checkpoint
    cfg = Config.fromfile(config)
    cfg.work_dir, cfg.resume = str(work_dir), work_dir.exists()
    PTQRunner.from_cfg(cfg).run()


def forked(*arguments):
    process = FORK.Process(target=run, args=arguments)
    process.start()
    return process


@pytest.fixture(scope='module')
def whole_run(tmp_path_factory) -> tuple[Path, Path, int, float]:
    """The config, the work directory of a run that nobody killed, how often it wrote, and how long it took."""
    folder = tmp_path_factory.mktemp('kills')
    cfg = tiny_config('retinanet', folder)
    cfg.ptq = RECIPE
    cfg.dump(folder / 'tiny.py')
    writes, start = FORK.Value('i', 0), time.monotonic()
    process = forked(folder / 'tiny.py', folder / 'whole', None, writes)
    process.join()
    assert process.exitcode == 0 and writes.value > 10
    return folder / 'tiny.py', folder / 'whole', writes.value, time.monotonic() - start


@pytest.mark.parametrize('seed', range(KILLS))
def test_a_killed_run_resumes_to_the_same_bytes(seed, whole_run, tmp_path):
    config, expected, writes, seconds = whole_run
    draw, work_dir = random.Random(seed), tmp_path / 'work_dir'
    if seed % 2:
        process = forked(config, work_dir, draw.randint(1, writes), FORK.Value('i', 0))
    else:
        process = forked(config, work_dir, None)
        time.sleep(draw.uniform(0.1, 0.9) * seconds)
        process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    again = forked(config, work_dir, None)
    again.join()
    assert again.exitcode == 0
    for name in ('quantized.pth', 'results.json'):
        assert (work_dir / name).is_file()
    assert (work_dir / 'quantized.pth').read_bytes() == (expected / 'quantized.pth').read_bytes()
    assert not list(work_dir.rglob(f'.*{files.TEMPORARY}'))
