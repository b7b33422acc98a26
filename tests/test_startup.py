"""Ctrl-C while a command line imports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize('name', ['ptq.py', 'test.py'])
def test_ctrl_c_during_the_imports_ends_a_command_line_of_ours(name, tmp_path):
    # a program of a user may have the name of one of ours
    program = ROOT / 'tools' / name if name == 'ptq.py' else tmp_path / name
    # a module that the imports wait for, in the middle of them
    (tmp_path / 'mmengine.py').write_text(
        'import time\ntry:\n    print("imports", flush=True)\n    time.sleep(60)\n'
        'except KeyboardInterrupt as error:\n    raise ImportError("half") from error\n'
    )
    if name != 'ptq.py':
        program.write_text('import mmdet_ptq\n')
    process = subprocess.Popen(
        [sys.executable, str(program), 'config.py'],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, 'PYTHONPATH': f'{tmp_path}{os.pathsep}{ROOT}'},
        # ignored, where these tests run in the background of a shell
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    if name == 'ptq.py':
        assert process.returncode == 130
        assert told.strip() == 'interrupted; nothing was begun, run the same command again.'
    else:
        assert 'ImportError: half' in told
