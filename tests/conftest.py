"""What every test shares: few threads, fixed seeds, and the detector zoo where there is one."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import trap  # noqa: F401
from processes import look_through_less, one_thread

from mmdet_ptq.analysis import versions
from mmdet_ptq.testing.processors import cannot_emulate, environment

ROOT = Path(__file__).resolve().parent.parent

one_thread()
# the programs that tests start, too
os.environ.setdefault('OMP_NUM_THREADS', '1')
# mmengine keeps the logger of every run, and with it a stream that pytest has closed by the next test
logging.raiseExceptions = False


@pytest.fixture(autouse=True)
def seeded():
    """Seeds every generator, so that a test does not depend on the ones before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_report_header() -> str:
    """The processor: figures and kernels differ with it."""
    return f'processor: {versions()["processor"]}'


def pytest_collection_finish() -> None:
    """Everything is imported by then."""
    look_through_less()


@pytest.fixture(scope='session')
def on_processor() -> Callable[..., str]:
    """Runs Python code in a process of its own, here or where it finds no VNNI; returns what it prints."""

    def run(processor: str, code: str, *arguments: str) -> str:
        if processor != 'here' and (reason := cannot_emulate()):
            pytest.skip(reason)
        env = dict(os.environ) if processor == 'here' else environment(processor)
        env['OMP_NUM_THREADS'] = '1'
        done = subprocess.run(
            [sys.executable, '-c', code, *arguments], capture_output=True, text=True, timeout=280, env=env
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture(scope='session')
def zoo() -> Path:
    """The folder of stock detectors with their checkpoints and images."""
    path = Path(os.environ.get('MMDET_PTQ_ZOO', ROOT.parent / 'shared' / 'zoo')).resolve()
    if not (path / 'configs').is_dir():
        pytest.skip(f'no detector zoo at {path}: set MMDET_PTQ_ZOO to its folder')
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what uses the zoo, and skips CUDA tests on machines without a device."""
    no_cuda = pytest.mark.skip(reason='no CUDA device')
    for item in items:
        if 'zoo' in getattr(item, 'fixturenames', ()):
            item.add_marker('zoo')
        if item.get_closest_marker('cuda') and not torch.cuda.is_available():
            item.add_marker(no_cuda)
