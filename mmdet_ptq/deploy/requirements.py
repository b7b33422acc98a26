"""Optional packages: whether they are installed, and new enough for what we write and read."""
from __future__ import annotations

import importlib
import importlib.metadata

from mmengine.utils import digit_version

from mmdet_ptq.errors import PTQError

# The oldest versions that pyproject.toml takes, by module. ONNX Runtime 1.20 is the first with 4-bit initializers and
# opset 21; TensorRT's parser comes with ONNX 1.17, that is with opset 21, since 10.6.
OLDEST = {'onnx': '1.18', 'onnxscript': '0.5', 'onnxruntime': '1.20', 'openvino': '2025.0', 'ncnn': '1.0.20250503',
          'tensorrt': '10.6'}


def require(*modules: str, extra: str) -> None:
    """Refuses to go on without an optional package.

    Args:
        modules: What must be importable.
        extra: The extra of this package that brings them.

    Raises:
        PTQError: A package is missing or too old; names the extra to install.
    """
    for name in modules:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise PTQError(f"the package {name} is not installed; pip install 'mmdet-ptq[{extra}]'.") from error
        found = _version(name, module)
        if name in OLDEST and found and digit_version(found) < digit_version(OLDEST[name]):
            raise PTQError(f'{name} {found} is too old, exported models need {OLDEST[name]}; '
                           f"pip install -U 'mmdet-ptq[{extra}]'.")


def _version(name: str, module) -> str | None:
    """A package's version; builds for other devices are distributed under other names than their module's."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return getattr(module, '__version__', None)
