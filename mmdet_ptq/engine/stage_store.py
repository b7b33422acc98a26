"""Stages of a run: what each left in the work directory, and whether it still holds."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import barrier, broadcast_object_list, get_rank, is_main_process
from mmengine.logging import print_log
from torch import Tensor

from mmdet_ptq.config.block import GONE_WITHIN, needed_products
from mmdet_ptq.errors import PTQError
from mmdet_ptq.files import load_tensors, save_tensors, write_json
from mmdet_ptq.version import STATE_FORMAT

STAGES = ('prepare', 'observe', 'protect', 'reconstruct', 'global', 'evaluate', 'export', 'report')
# calibration stages after observe, in their order: stage -> key of the `ptq` block that it alone depends on
_OWN_KEYS = {
    'protect': 'protect',
    'reconstruct': 'reconstruct',
    'bias_correction': 'bias_correction',
    'global': 'global_loss',
}
# keys of the `ptq` block that are gone, as they stood in the hashes of work directories of before
_GONE = {'equalize': None, 'bias_correction': False}
_GONE_WITHIN = {name: {**gone, 'type': f'mmdet_ptq.{gone["type"]}'} for name, gone in GONE_WITHIN.items()}
# keys that came later, with what they stood for before: left out of the hashes, where they say nothing else
_ADDED = {'global_loss': dict(weight_scale_lr=None, mask_weight=1.0)}


def fingerprint(*parts: Any) -> str:
    """A short hash of anything JSON can hold; equal inputs give equal hashes."""
    text = json.dumps([STATE_FORMAT, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stage_inputs(recipe: dict[str, Any], *others: Any) -> dict[str, str]:
    """Hash of all that each calibration stage depends on, which includes what the stages before it depend on.

    Args:
        recipe: The whole ``ptq`` block.
        *others: What every stage depends on besides: model, checkpoint, images, seed.
    """
    recipe = {**_GONE, **recipe}
    for section, gone in _GONE_WITHIN.items():
        if isinstance(recipe[section], dict):
            recipe[section] = {**gone, **recipe[section]}
    for section, added in _ADDED.items():
        if isinstance(recipe[section], dict):
            recipe[section] = {k: v for k, v in recipe[section].items() if k not in added or v != added[k]}
    # older versions knew no products: where the block says nothing else, what they began is finished as it began
    if recipe.get('products') == needed_products(recipe.get('export', [])):
        recipe = {key: value for key, value in recipe.items() if key != 'products'}
    if recipe.get('rounding') == 'nearest':  # as it always was before there was a key
        recipe = {key: value for key, value in recipe.items() if key != 'rounding'}
    # what the preset and the runtimes stand for is in the other keys
    skipped = ('preset', 'export', 'export_size', *_OWN_KEYS.values())
    first = {key: value for key, value in recipe.items() if key not in skipped}
    inputs = dict.fromkeys(('prepare', 'observe'), fingerprint(first, *others))
    for stage, key in _OWN_KEYS.items():
        # protection alone asks for the runtimes: they compute 16 bits in float
        own = [recipe[key], recipe['export']] if key == 'protect' and recipe[key] is not None else [recipe[key]]
        inputs[stage] = fingerprint(list(inputs.values())[-1], *own)
    return inputs


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors; unlike a file's, it is the same however they were written."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def state_hash(state: Any) -> str:
    """SHA-256 of plain containers of tensors, numbers and text, whatever holds them."""
    digest = hashlib.sha256()
    _add(digest, state)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        digest.update(f'dict {len(value)} '.encode())
        for key, inner in value.items():
            digest.update(f'{key!r} '.encode())
            _add(digest, inner)
    elif isinstance(value, list | tuple):
        digest.update(f'list {len(value)} '.encode())
        for inner in value:
            _add(digest, inner)
    elif isinstance(value, Tensor):
        digest.update(tensor_hash({'': value}).encode())
    else:
        digest.update(f'{value!r} '.encode())


def latest_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint of mmengine's loop that can be read; a run may be killed while it writes one.

    Args:
        folder: Holds ``iter_N.pth``.
    """

    def iteration(path: Path) -> int:
        return int(path.stem.removeprefix('iter_'))

    for path in sorted(Path(folder).glob('iter_*.pth'), key=iteration, reverse=True):
        if _is_whole(path):
            return str(path)
        print_log(f'the checkpoint {path} is incomplete, the one before it is taken', 'current', level=logging.WARNING)
    return None


def _is_whole(path: Path) -> bool:
    """Whether an archive has its directory, which stands at its end, and every entry its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError):
        return False


def _spent(path: Path, inputs: str) -> float:
    """Seconds that an interrupted stage had taken, as its file tells; zero where it is absent, damaged or another's."""
    try:
        before = json.loads(path.read_text(encoding='utf-8'))
        return float(before['seconds']) if before['inputs'] == inputs else 0.0
    except FileNotFoundError:
        return 0.0
    except (ValueError, KeyError, TypeError, OSError) as error:
        print_log(f'{path} is damaged ({error}): the time of the interrupted stage is not counted', 'current')
        return 0.0


@dataclass
class StageRecord:
    """What a finished stage left."""

    inputs: str
    seconds: float
    state: Any
    seal: str = ''  # of older versions: none

    def check(self) -> None:
        """Refuses a record that is not what was written.

        Raises:
            PTQError: The state does not have its seal, or is empty.
        """
        damaged = self.seal != state_hash(self.state) if self.seal != '' else not self.state
        if damaged:
            raise PTQError('its state does not have the checksum that it was written with')


class StageStore:
    """The stages of one work directory.

    A stage is skipped on resume when the hash of its inputs (which includes the inputs of the stage before) is the
    one it finished with.

    Args:
        work_dir: The run's work directory; stages go to its folder ``stages``.
        resume: Whether finished stages may be taken over.
    """

    def __init__(self, work_dir: str | Path, resume: bool) -> None:
        self.folder = Path(work_dir) / 'stages'
        self.resume = resume
        self.seconds: dict[str, float] = {}
        self.current: str | None = None
        self.part, self.whole = '', self

    def within(self, part: str) -> StageStore:
        """The stages of a part of the run, in a folder of their own; their times stand beside the others."""
        store = copy.copy(self)
        store.folder, store.part = self.folder / part, f'{part}_'
        return store

    def path(self, name: str) -> Path:
        """File of a stage."""
        return self.folder / f'{name}.pth'

    def finished(self, name: str, inputs: str) -> StageRecord | None:
        """What the stage left for these inputs in an earlier run, if it may be taken over."""
        if not self.resume or not self.path(name).is_file():
            return None
        told = self.part + name
        try:
            record = StageRecord(**load_tensors(self.path(name)))
            record.check()
        except (PTQError, TypeError) as error:
            print_log(
                f'stage {told}: its file cannot be used ({error}); it runs again', 'current', level=logging.WARNING
            )
            return None
        if record.inputs != inputs:
            print_log(f'stage {told}: config, checkpoint, images, seed or format changed; it runs again', 'current')
            return None
        self.seconds[told] = record.seconds
        print_log(f'stage {told}: taken over from the earlier run', 'current')
        return record

    def run(self, name: str, inputs: str, work: Callable[[], Any]) -> tuple[Any, bool]:
        """Runs a stage unless it is finished.

        Args:
            name: One of :data:`STAGES`.
            inputs: Hash of all the stage depends on.
            work: Does the stage and returns its state, in plain containers and tensors.

        Returns:
            The state, and whether it was taken over.

        Raises:
            PTQError: Of several processes only some can take it over.
        """
        record, told = self.finished(name, inputs), self.part + name
        # all processes or none: one that works alone waits for the others for ever
        taken_over = [record is not None]
        broadcast_object_list(taken_over)
        if taken_over[0] and record is None:
            raise PTQError(
                f'process {get_rank()} of this run cannot take over the stage {told}, and process 0 can; all need the '
                'same work directory and files.'
            )
        if taken_over[0]:
            return record.state, True
        with self._added_up(name, inputs), self.timed(name):
            state = work()
        if is_main_process():
            record = StageRecord(inputs, self.seconds[told], state, state_hash(state))
            save_tensors(self.path(name), vars(record))
        barrier()
        return state, False

    @contextmanager
    def _added_up(self, name: str, inputs: str) -> Iterator[None]:
        """Keeps the time of an interrupted stage, and adds it to that of the run that finishes it."""
        path, told = self.folder / f'{name}_interrupted.json', self.part + name
        spent = _spent(path, inputs) if self.resume else 0.0
        start = time.perf_counter()
        try:
            yield
        except BaseException:
            if is_main_process():
                write_json(path, dict(inputs=inputs, seconds=round(spent + time.perf_counter() - start, 2)))
            raise
        self.seconds[told] = round(self.seconds[told] + spent, 2)
        if is_main_process():
            path.unlink(missing_ok=True)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Announces and times a stage."""
        self.whole.current = told = self.part + name
        print_log(f'stage {told}: begins', 'current')
        start = time.perf_counter()
        yield
        self.seconds[told] = round(time.perf_counter() - start, 2)
        print_log(f'stage {told}: done in {self.seconds[told]:.1f} s', 'current')
