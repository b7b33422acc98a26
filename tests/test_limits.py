"""Bounds on memory and time: what breaks them is told in one sentence, and nothing is left of them afterwards."""

import mmap
import os
import sys
import threading
import time

import pytest

from mmdet_ptq.errors import PTQError
from mmdet_ptq.limits import MIB, bounded

linux = pytest.mark.skipif(sys.platform != 'linux', reason='memory is bounded on Linux')
# what threads reserve does not count: a bound lets all of them start
RESERVED = 72 * MIB * (os.cpu_count() or 1)


def address_space():
    import resource

    return resource.getrlimit(resource.RLIMIT_AS)


def reserve(size):
    mmap.mmap(-1, size).close()


def compute(seconds=20.0):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@linux
def test_more_address_space_than_was_granted_is_refused():
    before, size = address_space(), RESERVED + 256 * MIB
    reserve(size)
    with pytest.raises(PTQError, match='^opening it takes more than 16 MiB of memory; the file is damaged') as raised:
        with bounded('opening it', 16 * MIB):
            reserve(8 * MIB)
            reserve(size)
    assert isinstance(raised.value.__cause__, OSError)
    assert address_space() == before
    reserve(size)


@linux
def test_an_inner_block_may_not_take_more_than_the_outer_one_left():
    before = address_space()
    with bounded('outer', 16 * MIB):
        outer = address_space()
        with bounded('inner', 2**20 * MIB):
            assert address_space() == outer
        with bounded('inner', MIB):
            assert address_space()[0] < outer[0]
        assert address_space() == outer != before
    assert address_space() == before


@pytest.mark.parametrize(
    'error', [MemoryError(), RuntimeError('std::bad_alloc'), ValueError('DefaultCPUAllocator: can not allocate memory')]
)
def test_a_lack_of_memory_is_recognized_in_the_words_of_every_runtime(error):
    with pytest.raises(PTQError, match='reading it takes more than 3 MiB of memory') as raised:
        with bounded('reading it', 3 * MIB):
            raise error
    assert raised.value.__cause__ is error


@pytest.mark.parametrize('error', [ValueError('wrong'), PTQError('cannot allocate memory'), KeyboardInterrupt()])
def test_other_errors_pass_as_they_are(error):
    with pytest.raises(type(error)) as raised, bounded('reading it', 1024 * MIB, 60):
        raise error
    assert raised.value is error


def test_what_takes_too_long_is_interrupted_and_nobody_watches_any_more():
    with pytest.raises(PTQError, match='^reading it takes more than 0 s; the file is damaged') as raised:
        with bounded('reading it', 1024 * MIB, 0.01):
            compute()
    assert raised.value.__cause__ is None
    assert 'mmdet_ptq.limits' not in [thread.name for thread in threading.enumerate()]
    # an interruption that was sent twice would arrive here
    compute(0.01)


def test_time_counts_where_it_is_bounded_and_not_in_other_threads():
    done = threading.Event()
    other = threading.Thread(target=lambda: (compute(0.2), done.set()))
    with bounded('waiting', 1024 * MIB, 0.05):
        other.start()
        assert done.wait(60)
    other.join()
    assert 'mmdet_ptq.limits' not in [thread.name for thread in threading.enumerate()]
