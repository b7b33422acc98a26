"""What the tests of calibration share."""
from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope='module', autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny detectors are slower on several threads, and many times as slow while others compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
