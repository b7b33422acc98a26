import importlib.metadata
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmdet_ptq.deploy import get_runtime
from mmdet_ptq.deploy.requirements import ONNX, require
from mmdet_ptq.errors import PTQError
from mmdet_ptq.registry import runtime_names

PROJECT = Path(__file__).resolve().parents[2] / 'pyproject.toml'


def test_the_oldest_versions_are_those_of_the_project():
    text = PROJECT.read_text(encoding='utf-8')
    runtimes = [get_runtime(name) for name in runtime_names()]
    asked = {*ONNX, *(package for runtime in runtimes for package in (*runtime.packages, *runtime.export_packages))}
    for package in asked:
        name, _, version = package.partition('>=')
        assert set(re.findall(rf"'{name}(?:>=([0-9.]+))?'", text)) == {version}, package


@pytest.mark.parametrize('version,refused', [('2024.6.0', True), ('2025.0', False), ('2026.4.1', False)])
def test_a_version_that_is_too_old_is_refused(monkeypatch, version, refused):
    monkeypatch.setitem(sys.modules, 'openvino', SimpleNamespace())
    monkeypatch.setattr(importlib.metadata, 'version', lambda name: version)
    if refused:
        with pytest.raises(PTQError, match=r"openvino 2024.6.0 is too old.*pip install -U 'mmdet-ptq\[openvino\]'"):
            require('openvino>=2025.0', extra='openvino')
    else:
        require('openvino>=2025.0', extra='openvino')


def test_a_build_under_another_name_tells_its_own_version(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, 'version', version)
    monkeypatch.setitem(sys.modules, 'onnxruntime', SimpleNamespace(__version__='1.19.2'))
    with pytest.raises(PTQError, match='onnxruntime 1.19.2 is too old'):
        require('onnxruntime>=1.20', extra='onnxruntime')


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pnnx', None)
    with pytest.raises(PTQError, match=r"pnnx is not installed; pip install 'mmdet-ptq\[ncnn\]'"):
        require('pnnx', extra='ncnn')


def test_a_missing_package_of_no_extra_is_named_itself(monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnx', None)
    with pytest.raises(PTQError, match=r"onnx is not installed; pip install 'onnx>=1.18'"):
        require('onnx>=1.18')
