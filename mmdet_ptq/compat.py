"""Every known fault of a torch / mmengine / mmcv / mmdet version that we work around, one entry each.

``apply_workarounds`` mends what can be mended once per process; ``replace_sync_bn``, ``start_without_gpu``,
``check_pkg_resources`` and ``typed_ranges`` are called where their fault bites.
"""

from __future__ import annotations

import functools
import json
import logging
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from mmengine.config import config as config_module
from mmengine.device import get_device
from mmengine.dist import is_distributed
from mmengine.logging import HistoryBuffer, print_log
from mmengine.utils import manager

from mmdet_ptq.errors import PTQError


@dataclass(frozen=True)
class Workaround:
    """A fault and its repair.

    Args:
        name: What the fault is about.
        versions: The versions known to have it.
        why: What goes wrong without the repair.
        applies: Whether the fault is there, found by looking rather than by version.
        apply: Repairs it; afterwards ``applies`` is false.
    """

    name: str
    versions: str
    why: str
    applies: Callable[[], bool]
    apply: Callable[[], None]


def apply_workarounds() -> list[str]:
    """Repairs what is broken in the installed stack; calling it again changes nothing.

    Returns:
        Names of the workarounds applied by this call.
    """
    applied = []
    for workaround in WORKAROUNDS:
        try:
            if not workaround.applies():
                continue
            workaround.apply()
        except (ImportError, AssertionError) as error:  # mmdet asserts the version of mmcv at import
            print_log(
                f"Workaround '{workaround.name}' is left out, because its package fails to import: {error}",
                logger='current',
                level=logging.WARNING,
            )
            continue
        print_log(
            f"Workaround '{workaround.name}' ({workaround.versions}): {workaround.why}",
            logger='current',
            level=logging.DEBUG,
        )
        applied.append(workaround.name)
    return applied


# ---- SSDHead without loss_cls ----


def _ssd_head_lacks_loss_cls() -> bool:
    from mmdet.models import SSDHead

    return 'loss_cls' not in SSDHead.__init__.__code__.co_names


def _give_ssd_head_loss_cls() -> None:
    from mmdet.models import SSDHead

    init = SSDHead.__init__

    # on the instance, after __init__: a class attribute would hide a submodule that a subclass registers
    @functools.wraps(init)
    def init_with_loss_cls(self, *args, **kwargs) -> None:
        init(self, *args, **kwargs)
        if not hasattr(self, 'loss_cls'):
            self.loss_cls = None

    SSDHead.__init__ = init_with_loss_cls


# ---- checkpoints of mmengine under weights_only ----


def history_statistic(owner: object, name: str) -> Callable:
    """Stands in for the ``getattr`` that pickled history buffers call for their statistics, and for nothing else."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise pickle.UnpicklingError(f'refused to look up {name!r} of {owner!r}')
    return getattr(HistoryBuffer, name)


def _mmengine_globals() -> list[Any]:
    """What mmengine's CheckpointHook pickles beyond tensors: logged scalars as numpy arrays in history buffers."""
    array_from_pickle, scalar_from_pickle = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    kinds = (np.bool_, np.uint8, np.int8, np.int16, np.int32, np.int64, np.float16, np.float32, np.float64)
    return [
        HistoryBuffer,
        np.ndarray,
        np.dtype,
        *sorted({type(np.dtype(kind)) for kind in kinds}, key=lambda cls: cls.__name__),
        # numpy 2 renamed `numpy.core`; a checkpoint names whichever its writer had
        *[
            (function, f'{module}.{name}')
            for function, name in ((array_from_pickle, '_reconstruct'), (scalar_from_pickle, 'scalar'))
            for module in ('numpy.core.multiarray', 'numpy._core.multiarray')
        ],
        (history_statistic, 'builtins.getattr'),
    ]


def _weights_only_refuses_history() -> bool:
    version = tuple(int(part) for part in torch.__version__.split('+')[0].split('.')[:2])
    return version >= (2, 6) and HistoryBuffer not in torch.serialization.get_safe_globals()


def _allow_history() -> None:
    torch.serialization.add_safe_globals(_mmengine_globals())


# ---- the lock of mmengine's loggers and other global instances ----


def _manager_keeps_its_lock() -> bool:
    class Nothing(manager.ManagerMixin):
        pass

    try:
        Nothing.get_current_instance()
    except RuntimeError:
        pass
    if not manager._lock._is_owned():
        return False
    manager._release_lock()
    return True


def _release_on_error(method: classmethod) -> classmethod:
    function = method.__func__

    @functools.wraps(function)
    def releasing(cls, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(cls, *args, **kwargs)
        except BaseException:
            manager._release_lock()
            raise

    return classmethod(releasing)


def _let_manager_release_its_lock() -> None:
    for name in ('get_instance', 'get_current_instance'):
        setattr(manager.ManagerMixin, name, _release_on_error(vars(manager.ManagerMixin)[name]))


# ---- lvis under NumPy's present names ----


def _lvis_calls_np_float() -> bool:
    if find_spec('lvis') is None:
        return False
    from lvis import eval as lvis_eval

    return not hasattr(lvis_eval.np, 'float') and 'float' in lvis_eval.LVISEval.accumulate.__code__.co_names


def _give_lvis_np_float() -> None:
    from lvis import eval as lvis_eval

    # for this module alone: numpy itself stays as it is
    lvis_eval.np = SimpleNamespace(**{**vars(np), 'float': float})


# ---- Python 3.14 ----


def _give_find_loader() -> None:
    pkgutil.find_loader = lambda name: getattr(find_spec(name), 'loader', None)


# ---- configs that are formatted again and again ----


def _configs_are_formatted_again() -> bool:
    # the onedl stack formats them in another way
    return hasattr(config_module, 'FormatCode') and not hasattr(config_module.FormatCode, 'cache')


def _give_formatter_a_memory() -> None:
    format_code = config_module.FormatCode

    @functools.lru_cache(maxsize=8)
    def formatted(text: str, options: str) -> tuple[str, bool]:
        return format_code(text, **json.loads(options))

    def remembered(text: str, **options: Any) -> tuple[str, bool]:
        return formatted(text, json.dumps(options, sort_keys=True))

    remembered.cache = formatted
    config_module.FormatCode = remembered


WORKAROUNDS: tuple[Workaround, ...] = (
    # first: importing mmdet may ask whether mmcv has its operators
    Workaround(
        name='pkgutil.find_loader',
        versions='Python >= 3.14 with mmengine <= 0.10.7 or mmcv 2.1',
        why='both ask with it whether the operators of mmcv are there, and it is gone',
        applies=lambda: not hasattr(pkgutil, 'find_loader'),
        apply=_give_find_loader,
    ),
    Workaround(
        name='SSDHead.loss_cls',
        versions='mmdet 3.3.0, onedl-mmdetection 3.5.1',
        why='BaseDenseHead._predict_by_feat_single reads self.loss_cls, which SSDHead does not have, so that every '
        'SSD detector crashes at inference',
        applies=_ssd_head_lacks_loss_cls,
        apply=_give_ssd_head_loss_cls,
    ),
    Workaround(
        name='mmengine checkpoints with weights_only',
        versions='torch >= 2.6 with mmengine <= 0.10.7',
        why="torch.load refuses the HistoryBuffer and numpy values of mmengine's own checkpoints",
        applies=_weights_only_refuses_history,
        apply=_allow_history,
    ),
    Workaround(
        name='lock of global instances',
        versions='mmengine <= 0.10.7',
        why='a visualizer or logger that cannot be built keeps the lock of all of them, so that another thread of the '
        'same process waits for ever as soon as it logs',
        applies=_manager_keeps_its_lock,
        apply=_let_manager_release_its_lock,
    ),
    Workaround(
        name='formatting of configs',
        versions='mmengine <= 0.10.7',
        why='each checkpoint and each log formats the whole config as Python code again, a tenth of a second each',
        applies=_configs_are_formatted_again,
        apply=_give_formatter_a_memory,
    ),
    Workaround(
        name='np.float in lvis',
        versions='lvis 0.5.3 with numpy >= 1.24',
        why='evaluation on LVIS ends in an AttributeError once all images have been detected on',
        applies=_lvis_calls_np_float,
        apply=_give_lvis_np_float,
    ),
)


# ---- called where the fault bites ----


def replace_sync_bn(model_cfg: Any) -> int:
    """Turns synchronized batch norms of a model config into plain ones when no process group exists.

    Both compute the same in evaluation mode and have the same state, but mmcv's ``MMSyncBN`` cannot even be built
    without a process group, nor can torch's ``SyncBN`` run on a CPU in older versions.

    Args:
        model_cfg: A model config, changed in place.

    Returns:
        How many norm configs were rewritten.
    """
    if is_distributed():
        return 0
    count = _replace_sync_bn(model_cfg)
    if count:
        print_log(
            f'Replaced {count} synchronized batch norm configs by BN: there is no process group.', logger='current'
        )
    return count


def _replace_sync_bn(cfg: Any) -> int:
    if isinstance(cfg, dict):
        count = 0
        if getattr(cfg.get('type'), '__name__', cfg.get('type')) in ('SyncBN', 'MMSyncBN', 'SyncBatchNorm'):
            cfg['type'] = 'BN'
            count = 1
        return count + sum(_replace_sync_bn(value) for value in cfg.values())
    if isinstance(cfg, (list, tuple)):
        return sum(_replace_sync_bn(value) for value in cfg)
    return 0


def start_without_gpu(launcher: str) -> None:
    """Makes the process group on a machine without an accelerator, where mmengine asks for a GPU.

    Args:
        launcher: The launcher that started the process.

    Raises:
        PTQError: The launcher needs a GPU.
    """
    if get_device() != 'cpu' or is_distributed():
        return
    if launcher != 'pytorch':
        raise PTQError(
            f'--launcher {launcher} needs a GPU in mmengine, and there is none; on a CPU start with `torchrun`, and '
            '--launcher pytorch.'
        )
    # of the config's `dist_cfg` the back end is for GPUs
    torch.distributed.init_process_group('gloo')


def check_pkg_resources() -> None:
    """Makes sure that mmengine can resolve ``_base_ = 'mmdet::...'``, which it does through ``pkg_resources``.

    Raises:
        PTQError: setuptools is missing or too new (82 removed ``pkg_resources``).
    """
    if find_spec('pkg_resources') is None:
        raise PTQError(
            "pkg_resources is missing, which mmengine needs to resolve `_base_ = 'mmdet::...'`; "
            "install it with: pip install 'setuptools<82'."
        )


@contextmanager
def typed_ranges() -> Iterator[None]:
    """``torch.arange`` between an integer and a float tells its type meanwhile.

    torch's ONNX exporter (2.13 with onnxscript 0.7) writes such a range with limits of two types, which ONNX refuses.
    """
    arange = torch.arange

    @functools.wraps(arange)
    def typed(*limits: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get('dtype') is None and len({type(limit) for limit in limits} & {int, float}) == 2:
            kwargs['dtype'] = torch.get_default_dtype()
        return arange(*limits, **kwargs)

    with mock.patch.object(torch, 'arange', typed):
        yield
