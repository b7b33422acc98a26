"""What the tests of hostile files share: a trap that shows what ran, and bounds on what a file may cost."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from mmdet_ptq import PTQError

OLD = Path(__file__).resolve().parents[1] / 'old_files' / 'schema_3'
MOST_SECONDS, MOST_MEMORY = 10, 1 << 30
# what a case ends in, where it is no refusal
LOADS = ''


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A folder with modules that leave a canary when they are imported, and a command that does."""
    canary = tmp_path / 'canary'
    act = f'open({str(canary)!r}, "w").close()\n'
    (tmp_path / 'canary_module.py').write_text(act)
    (tmp_path / 'mc.py').write_text(act)
    (tmp_path / 'canary_library').mkdir()
    for name in ('__init__', 'registry'):
        (tmp_path / 'canary_library' / f'{name}.py').write_text(act)
    (tmp_path / 'config.py').write_text(act + 'model = dict()\n')
    torch.save(Payload(f'touch {canary}'), tmp_path / 'payload.pth')
    monkeypatch.syspath_prepend(str(tmp_path))
    # as long as a good file of this size takes, several times over
    monkeypatch.setattr('mmdet_ptq.engine.api.LOADING_SECONDS', 1.5)
    yield Trap(tmp_path, f'touch {canary}')
    assert not canary.exists(), 'the file ran something'
    assert not [name for name in sys.modules if name.startswith('canary')]


class Trap:
    def __init__(self, folder, command):
        self.folder, self.command = folder, command


class Payload:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def peak() -> int:
    status = Path('/proc/self/status').read_text()
    return 1024 * int(status.split('VmHWM:')[1].split()[0])


def within_limits(work):
    """Runs a case; returns the sentence that refuses it, or LOADS."""
    Path('/proc/self/clear_refs').write_text('5')
    before, start = peak(), time.process_time()
    try:
        work()
        told = LOADS
    except PTQError as error:
        told = str(error)
        assert told and told.isprintable() and len(told) < 1000
    assert time.process_time() - start < MOST_SECONDS
    assert peak() - before < MOST_MEMORY
    return told


def expect(found, told):
    assert (found == LOADS) == (told == LOADS), found
    assert re.search(told, found), found
