"""Runs of a tiny detector: one whole run for all, and a quick way to more."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config

from mmdet_ptq.engine import PTQRunner
from mmdet_ptq.testing import tiny_config

RUNS = itertools.count()


@pytest.fixture(scope='session', autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny detectors are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def own_visualizer() -> None:
    """mmengine keeps one visualizer of a name, and its folder, for the whole process."""
    DetLocalVisualizer._instance_dict.pop('visualizer', None)


@pytest.fixture(scope='session')
def config_file(tmp_path_factory) -> Path:
    """The config of a tiny RetinaNet with its data and float checkpoint; its head is log-affine."""
    folder = tmp_path_factory.mktemp('retinanet')
    cfg = tiny_config('retinanet', folder)
    cfg.ptq.head = dict(weights=dict(quantizer=dict(type='mmdet_ptq.LogAffineQuantizer', mode='log1p')))
    cfg.dump(folder / 'tiny.py')
    return folder / 'tiny.py'


@pytest.fixture
def make_runner(config_file, tmp_path, monkeypatch) -> Callable[..., PTQRunner]:
    """Builds a runner of the tiny config with changes, in a fresh work directory, without the pictures."""
    monkeypatch.setattr('mmdet_ptq.engine.stages.measure.build_report', lambda *args: None)

    def make(changes: dict | None = None, work_dir: Path | None = None, resume: bool = False) -> PTQRunner:
        cfg = Config.fromfile(config_file)
        cfg.merge_from_dict(changes or {})
        cfg.work_dir, cfg.resume = str(work_dir or tmp_path / 'work_dir'), resume
        # mmengine tells loggers apart by the second in which they were made
        cfg.experiment_name = f'run_{next(RUNS)}'
        return PTQRunner.from_cfg(cfg)

    return make


@pytest.fixture(scope='session')
def finished(config_file, one_thread) -> PTQRunner:
    """A runner after a whole run; tests must not change it, or its work directory."""
    DetLocalVisualizer._instance_dict.pop('visualizer', None)
    runner = PTQRunner.from_cfg(Config.fromfile(config_file))
    runner.run()
    return runner


@pytest.fixture
def finished_copy(finished, tmp_path) -> Path:
    """The work directory of the whole run, to be changed."""
    return Path(shutil.copytree(finished.work_dir, tmp_path / 'work_dir'))
