"""The progress bar shows itself on a terminal, and nowhere else."""

import io

import pytest
from rich.console import Console

from mmdet_ptq import progress


@pytest.mark.parametrize('terminal', [True, False])
def test_the_bar_is_for_terminals(terminal, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(progress, 'Console', lambda: Console(file=out, force_terminal=terminal, width=80))
    assert list(progress.track(iter('abc'), 'reading', total=3)) == ['a', 'b', 'c']
    assert ('reading' in out.getvalue()) is terminal
    assert terminal or out.getvalue() == ''
