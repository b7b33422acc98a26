"""Optional packages: whether they are installed, and new enough for what we write and read."""

from __future__ import annotations

import importlib
import importlib.metadata

from mmengine.utils import digit_version

from mmdet_ptq.errors import PTQError

# what writes ONNX files
ONNX = ('onnx>=1.18', 'onnxscript>=0.5')


def require(*requirements: str, extra: str | None = None) -> None:
    """Refuses to go on without an optional package.

    Args:
        requirements: What must be importable, with the oldest version that will do: ``'onnx>=1.18'``, ``'pnnx'``.
        extra: The extra of this package that brings them. Defaults to None: they are installed by themselves.

    Raises:
        PTQError: A package is missing or too old; says what to install.
    """
    for requirement in requirements:
        name, _, oldest = requirement.partition('>=')
        source = f'mmdet-ptq[{extra}]' if extra else requirement
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise PTQError(f"the package {name} is not installed; pip install '{source}'.") from error
        found = _version(name, module)
        if oldest and found and digit_version(found) < digit_version(oldest):
            raise PTQError(f"{name} {found} is too old, exported models need {oldest}; pip install -U '{source}'.")


def _version(name: str, module) -> str | None:
    """A package's version; builds for other devices are distributed under other names than their module's."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return getattr(module, '__version__', None)
