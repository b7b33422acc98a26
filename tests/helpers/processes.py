"""How a process of the tests is set up."""

import gc

import torch


def one_thread() -> None:
    """Tiny detectors are slower on several threads, and many times as slow while others compute."""
    torch.set_num_threads(1)


def look_through_less() -> None:
    """Less garbage collection: what was imported is garbage never, and looking through it takes a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def set_up() -> None:
    """Both, for a process that a test starts."""
    one_thread()
    look_through_less()
