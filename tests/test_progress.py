"""What a person sees: one line a stage, one bar at a time on a terminal, a line in ten seconds elsewhere."""

import io
import logging
import warnings

import pytest
from mmengine.fileio import FileClient
from mmengine.logging import MMLogger, print_log
from rich.console import Console

from mmdet_ptq import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    time = [1000.0]
    monkeypatch.setattr(progress.time, 'monotonic', lambda: time[0])
    return time


def screen(terminal):
    out = io.StringIO()
    return out, Console(file=out, force_terminal=terminal, width=80)


@pytest.mark.parametrize('terminal', [True, False])
def test_without_a_screen_the_bar_is_for_terminals(terminal, monkeypatch):
    out, console = screen(terminal)
    monkeypatch.setattr(progress, 'Console', lambda: console)
    assert list(progress.track(iter('abc'), 'reading', total=3)) == ['a', 'b', 'c']
    assert ('reading' in out.getvalue()) is terminal
    assert terminal or out.getvalue() == ''


def test_a_stage_is_one_line(clock):
    out, console = screen(False)
    with progress.for_people(console):
        with progress.stage('evaluate_float', 60):
            assert list(progress.track('abc', 'images')) == ['a', 'b', 'c']
            clock[0] += 7
        progress.taken_over('observe')
    first, second = out.getvalue().splitlines()
    assert first.split() == ['evaluate', 'float', '7.0', 's'] and second.split() == ['observe', 'as', 'before']


def test_without_a_terminal_there_is_one_line_of_progress_in_ten_seconds(clock):
    out, console = screen(False)
    with progress.for_people(console), progress.stage('observe'):
        for _ in progress.track(range(100), 'images'):
            clock[0] += 1
    *lines, last = out.getvalue().splitlines()
    assert len(lines) == 10 and lines[0].strip() == 'observe: images, 10 of 100' and last.startswith('observe')
    assert '\r' not in out.getvalue() and '\x1b' not in out.getvalue()


def test_on_a_terminal_there_is_one_bar_at_a_time(clock):
    out, console = screen(True)
    with progress.for_people(console) as shown, progress.stage('observe', 90):
        for _ in progress.track(range(3), 'outer'):
            clock[0] += 1
            bar = shown.bar
            for _ in progress.track(range(3), 'inner'):
                clock[0] += 1
            assert shown.bar is bar and len(bar.tasks) == 1 and bar.tasks[0].description == 'observe: inner'
    assert shown.bar is None
    assert all(word in out.getvalue() for word in ('outer', 'inner', 'observe (about 2 min)'))


@pytest.mark.parametrize('terminal', [True, False])
def test_what_others_print_goes_to_the_log_file(terminal, tmp_path, capsys):
    out, console = screen(terminal)
    with progress.for_people(console), progress.stage('evaluate'):
        progress.step('batches', 1, 2)
        logger = MMLogger('people', logger_name='people', log_file=str(tmp_path / 'all.log'))
        progress.adopted(logger)
        MMLogger._instance_dict['people'] = logger
        try:
            print('Accumulating evaluation results...', end='')
            print('DONE\rand more')
            print_log('the environment', 'current')
            print_log('a layer stays float', 'current', logging.WARNING)
            warnings.warn('deprecated', UserWarning, stacklevel=1)
            FileClient('disk')
        finally:
            MMLogger._instance_dict.pop('people')
    shown = out.getvalue()
    assert 'warning: a layer stays float' in shown and 'evaluate  ' in shown
    assert not [words for words in ('DONE', 'more', 'environment', 'deprecated') if words in shown]
    assert capsys.readouterr().out == ''
    kept = (tmp_path / 'all.log').read_text()
    for words in (
        'Accumulating evaluation results...DONE',
        'and more',
        'the environment',
        'UserWarning: deprecated',
        '"FileClient" will be',
    ):
        assert words in kept


def test_afterwards_all_is_as_before(capsys):
    logger = MMLogger.get_current_instance()
    handlers = list(logger.handlers)
    with pytest.raises(KeyError), progress.for_people(screen(False)[1]):
        assert logger.handlers != handlers
        raise KeyError
    assert logger.handlers == handlers
    print('seen')
    assert capsys.readouterr().out == 'seen\n'


@pytest.mark.parametrize('terminal', [True, False])
def test_of_several_processes_one_speaks(terminal, clock, monkeypatch):
    monkeypatch.setattr(progress, 'is_main_process', lambda: False)
    out, console = screen(terminal)
    with progress.for_people(console), progress.stage('observe'):
        for _ in progress.track(range(9), 'images'):
            clock[0] += 20
    assert out.getvalue() == ''


@pytest.mark.parametrize(
    ('seconds', 'told'), [(0.04, '0.0 s'), (9.2, '9.2 s'), (61, '61 s'), (600, '10 min'), (7200, '2.0 h')]
)
def test_durations(seconds, told):
    assert progress.clock(seconds) == told
