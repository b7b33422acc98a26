"""What every test shares: few threads, fixed seeds, and the detector zoo where there is one."""
from __future__ import annotations

import logging
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# tiny detectors are slower on several threads, and many times as slow while others compute
torch.set_num_threads(1)
# mmengine keeps the logger of every run, and with it a stream that pytest has closed by the next test
logging.raiseExceptions = False


@pytest.fixture(autouse=True)
def seeded():
    """Seeds every generator, so that a test does not depend on the ones before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


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
