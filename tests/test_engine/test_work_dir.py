"""A work directory is one run's at a time; what killed runs left in it goes."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from mmdet_ptq import PTQError
from mmdet_ptq.engine.work_dir import LOCK, leave_work_dir, take_work_dir
from mmdet_ptq.files import write_atomic

HOLD = """
import fcntl, os, sys, time
file = open(sys.argv[1], 'a+')
fcntl.lockf(file, fcntl.LOCK_EX)
print(os.getpid(), file=file, flush=True)
print('holds it', flush=True)
time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the work directory."""
    process = subprocess.Popen([sys.executable, '-c', HOLD, str(tmp_path / LOCK)], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_refuses_at_once_and_names_the_first(holder, make_runner, tmp_path):
    with pytest.raises(PTQError, match=rf'is in use by another run \(process {holder.pid}\)'):
        make_runner(work_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]  # nothing is written over


def test_a_run_that_was_killed_holds_nothing(holder, tmp_path):
    holder.kill()
    holder.wait()
    take_work_dir(tmp_path)
    take_work_dir(tmp_path)  # again, in this process
    leave_work_dir(tmp_path)
    take_work_dir(tmp_path)


def test_what_killed_runs_left_is_removed(tmp_path):
    def killed(file) -> None:
        file.write(b'half')
        file.flush()
        (left,) = (tmp_path / 'stages').iterdir()
        shutil.copy(left, tmp_path)

    write_atomic(tmp_path / 'stages' / 'observe.pth', killed)
    (tmp_path / 'stages' / 'observe.pth').unlink()
    assert len(list(tmp_path.glob('.observe.pth.*'))) == 1
    (tmp_path / 'reconstruct' / 'x' / 'activations-abc').mkdir(parents=True)
    (tmp_path / 'reconstruct' / 'x' / 'activations-abc' / '0.pt').touch()
    kept = tmp_path / 'reconstruct' / 'x' / '000.pth'
    kept.touch()
    take_work_dir(tmp_path)
    assert {path for path in tmp_path.rglob('*') if path.is_file()} == {kept, tmp_path / LOCK}
    assert not list(tmp_path.rglob('activations-*'))


@pytest.mark.thorough
def test_a_system_without_locks_is_told(tmp_path):
    """As Windows, which has neither of the two modules."""
    program = (
        'import sys; sys.modules.update(fcntl=None, resource=None); import mmdet_ptq.engine; '
        'from mmdet_ptq.engine.plan import peak_memory; from mmdet_ptq.engine.work_dir import take_work_dir; '
        f'take_work_dir({str(tmp_path)!r}); print(peak_memory())'
    )
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split()[-1] == '0', done.stderr
    assert 'cannot be locked (this system has no such locks)' in done.stdout + done.stderr
