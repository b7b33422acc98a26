"""Other tools' int8 models of a float detector, quantized with those tools' own functions and default settings.

Each writes a model that carries what ours carry about themselves, so that the same runtime classes run both.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mmdet_ptq.deploy.network.meta import read_meta
from mmdet_ptq.deploy.onnx.export import model_meta
from mmdet_ptq.errors import PTQError
from mmdet_ptq.wrapping.folding import fold_norms
from mmdet_ptq.wrapping.preparing.find_folds import find_folds
from mmdet_ptq.wrapping.watching.probe import probe_detector

META = 'mmdet_ptq'
# images whose activations ONNX Runtime's calibrators hold in memory at once
IN_MEMORY = 4


def need(package: str) -> None:
    """Refuses to go on without a peer's package.

    Raises:
        PTQError: It is not installed.
    """
    if find_spec(package) is None:
        raise PTQError(f'the package {package} is not installed; pip install {package}.')


def package_version(package: str) -> str:
    """Version of an installed package, ``'missing'`` if it is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return 'missing'


class ImageReader:
    """What ONNX Runtime's calibrators read: single images, in order.

    Args:
        images: Arrays of (1, 3, H, W), float32, normalized.
    """

    def __init__(self, images: Sequence[np.ndarray]) -> None:
        self.images = images
        self.set_range(0, len(images))

    def __len__(self) -> int:
        return len(self.images)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Goes on with the images from one position up to another."""
        self._next = iter(self.images[start_index:end_index])

    def get_next(self) -> dict | None:
        """The next image by the name of the input."""
        image = next(self._next, None)
        return None if image is None else {'input': image}


def quantize_onnxruntime(
    float_path: Path, out: Path, images: Sequence[np.ndarray], method: str = 'MinMax', narrow: bool = False
) -> None:
    """ONNX Runtime's ``quantize_static``: QDQ, unsigned activations, signed weights per channel.

    Args:
        float_path: The float detector as ONNX.
        out: The int8 model.
        images: Calibration images.
        method: Name of its calibration method, 'MinMax' or 'Percentile' (99.999 by its default). Defaults to 'MinMax'.
        narrow: Its option against sums that overflow without VNNI: weights of 7 bits. Defaults to False.
    """
    need('onnxruntime')
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    out.parent.mkdir(parents=True, exist_ok=True)
    prepared = out.with_name('prepared.onnx.tmp')
    quant_pre_process(str(float_path), str(prepared), skip_symbolic_shape=True)
    # without a stride, percentiles keep every activation of every image in memory
    stride = max(n for n in range(1, IN_MEMORY + 1) if len(images) % n == 0)
    quantize_static(
        str(prepared),
        str(out),
        ImageReader(images),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[method],
        reduce_range=narrow,
        extra_options=dict(CalibStridedMinMax=stride),
    )
    prepared.unlink()
    model = onnx.load(out)
    kept = {entry.key: entry.value for entry in model.metadata_props}
    # without the checksum, which is of the float model
    onnx.helper.set_model_props(model, {**kept, META: json.dumps(model_meta(float_path))})
    onnx.save(model, out)


def quantize_nncf(
    float_path: Path, out: Path, images: Sequence[np.ndarray], preset: str = 'PERFORMANCE', narrow: bool = False
) -> None:
    """NNCF's ``quantize`` of an OpenVINO model.

    Args:
        float_path: The float detector, ``.xml``.
        out: The int8 model, ``.xml``.
        images: Calibration images.
        preset: Name of its preset, 'PERFORMANCE' (its default) or 'MIXED'. Defaults to 'PERFORMANCE'.
        narrow: Its option against sums that overflow without VNNI: weights of 7 bits in all layers, not only in the
            first. Defaults to False.
    """
    need('openvino')
    need('nncf')
    import nncf
    import openvino

    model = openvino.Core().read_model(str(float_path))
    # without the checksum, which is of the float model
    meta = json.dumps(read_meta(model.get_rt_info([META]).astype(str)))
    fix = nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE) if narrow else None
    quantized = nncf.quantize(
        model,
        nncf.Dataset(images),
        preset=nncf.QuantizationPreset[preset],
        subset_size=len(images),
        advanced_parameters=fix,
    )
    quantized.set_rt_info(meta, [META])
    out.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(quantized, str(out), compress_to_fp16=False)


def quantize_torch(detector: nn.Module, images: Sequence[np.ndarray]) -> tuple[nn.Module, int, int]:
    """``torch.ao.quantization`` in eager mode, static, with the engine's default settings.

    Eager mode knows no addition, concatenation or SiLU of quantized tensors, which mmdet's modules write as plain
    functions; so each convolution stands in a ``QuantWrapper`` of its own and what is between them stays float.

    Args:
        detector: The float detector, in eval mode; it is not changed.
        images: Calibration images.

    Returns:
        The quantized detector, how many of its convolutions compute in integers, and how many there are.

    Raises:
        PTQError: None of its convolutions is of a class that torch.ao knows.
    """
    from torch.ao import quantization

    detector = copy.deepcopy(detector)
    example = torch.from_numpy(images[0])
    probe = probe_detector(detector, lambda: detector(example, None, mode='tensor'))
    fold_norms(detector, find_folds(detector, probe)[0])
    layers = [module for module in detector.modules() if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    known = [module for module in layers if type(module) in (nn.Conv2d, nn.Linear)]
    if not known:
        names = ', '.join(sorted({type(layer).__name__ for layer in layers}))
        raise PTQError(
            f'torch.ao.quantization converts none of the {len(layers)} convolutions: it knows nn.Conv2d '
            f'itself, not {names}.'
        )
    qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
    for layer in known:
        layer.qconfig = qconfig
    quantization.add_quant_dequant(detector)
    quantization.prepare(detector, inplace=True)
    with torch.no_grad():
        for image in images:
            detector(torch.from_numpy(image), None, mode='tensor')
    quantization.convert(detector, inplace=True)
    return detector, len(known), len(layers)


def torch_bytes(detector: nn.Module, path: Path) -> int:
    """Size of a detector's state as torch writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(detector.state_dict(), path)
    return path.stat().st_size


def network(detector: nn.Module, image: np.ndarray):
    """A function that runs a detector's network once."""
    tensor: Tensor = torch.from_numpy(image)

    def run() -> None:
        with torch.inference_mode():
            detector(tensor, None, mode='tensor')

    return run
