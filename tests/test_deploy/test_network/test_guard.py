"""The wall around the building of a stored config: what it lets through, whom it binds, and that it comes down."""

import os
import sys
import threading
from pathlib import Path

import pytest
import torch
from mmengine.registry import registry as lookups

from mmdet_ptq.deploy.network.guard import Refused, only_registered
from mmdet_ptq.errors import PTQError


def state():
    return lookups.get_object_from_string, lookups.import_module, sys.dont_write_bytecode


def test_what_is_refused_is_told_with_the_file_that_asks_for_it(tmp_path):
    file = tmp_path / 'secret'
    file.write_text('x')
    for asked, told in (
        (file.read_text, f"the config inside 'q.pth' leads to open '{file}"[:60]),
        (file.unlink, "the config inside 'q.pth' leads to os.remove"),
        (lambda: os.putenv('A', 'b'), "the config inside 'q.pth' leads to os.putenv b'A'"),
        (lambda: lookups.get_object_from_string('os.system'), "the config inside 'q.pth' asks for 'os.system'"),
        (lambda: lookups.import_module('stranger.registry'), "the config inside 'q.pth' asks for 'stranger.registry'"),
    ):
        with only_registered('q.pth'), pytest.raises(Refused) as raised:
            asked()
        assert str(raised.value).startswith(told)
    assert file.read_text() == 'x'


def test_who_can_do_without_a_file_does_without_it(tmp_path):
    assert issubclass(Refused, PTQError) and issubclass(Refused, OSError)
    with only_registered('q.pth'):
        try:
            (tmp_path / 'cache').write_text('x')
        except OSError as error:
            # one sentence, and no number of an error as the system's have
            assert str(error).startswith('the config inside') and error.errno is None
    assert not (tmp_path / 'cache').exists()


def test_installed_packages_may_be_read_and_not_written_to():
    installed = Path(torch.__file__)
    with only_registered('q.pth'):
        assert installed.read_bytes()
        Path('/proc/self/statm').read_text()
        for mode in ('a', 'r+b', 'x'):
            with pytest.raises(Refused):
                installed.open(mode)
        with pytest.raises(Refused):
            os.open(installed, os.O_RDWR)


def test_a_link_in_a_folder_of_the_system_does_not_lead_out_of_it(tmp_path):
    file = tmp_path / 'secret'
    file.write_text('x')
    with file.open() as opened, only_registered('q.pth'):
        with pytest.raises(Refused):
            Path(f'/proc/self/fd/{opened.fileno()}').read_text()
        # what is open already may be read
        assert opened.read() == 'x'


def test_other_threads_go_on_with_their_work(tmp_path):
    done = []

    def work():
        (tmp_path / 'other').write_text('x')
        done.append((tmp_path / 'other').read_text())

    other = threading.Thread(target=work)
    with only_registered('q.pth'):
        other.start()
        other.join()
    assert done == ['x']


def test_everything_is_as_before_however_the_building_ends(tmp_path):
    before = state()
    with pytest.raises(KeyError), only_registered('q.pth'):
        assert sys.dont_write_bytecode and state() != before
        assert lookups.import_module('mmdet.registry') is sys.modules['mmdet.registry']
        raise KeyError
    assert state() == before
    (tmp_path / 'mine').write_text('x')
