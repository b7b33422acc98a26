"""What every runtime offers: export into a folder, a session, which convolutions it runs in integers."""

from __future__ import annotations

import functools
import glob
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from mmengine.logging import MMLogger, print_log
from torch import Tensor, nn

from mmdet_ptq.deploy.network.memory import bounds, memory_limit
from mmdet_ptq.deploy.network.parts import HEADS, has_regions, part_path
from mmdet_ptq.deploy.network.program import Opening
from mmdet_ptq.deploy.network.queries import has_queries
from mmdet_ptq.deploy.network.raw_outputs import RawOutputs, check_exportable
from mmdet_ptq.deploy.onnx.dialect import Dialect
from mmdet_ptq.deploy.requirements import require
from mmdet_ptq.errors import PTQError, did_you_mean, one_line
from mmdet_ptq.files import remove
from mmdet_ptq.limits import MIB
from mmdet_ptq.registry import RUNTIMES, runtime_names
from mmdet_ptq.wrapping import Structure, is_quantized

# what opening a model may take besides what its size asks for
OPENING, OPENING_SECONDS = 768 * MIB, 60


@dataclass
class IntegerCoverage:
    """What a runtime's own optimized graph shows.

    Attributes:
        integer: Names of the calls of layers, and products of activations, that it computes in integers.
        float: Names of those that it does not.
    """

    integer: list[str] = field(default_factory=list)
    float: list[str] = field(default_factory=list)


class Runtime:
    """One exported detector, ready to run.

    Args:
        path: The exported model.
        threads: Threads of a run. Defaults to None: as many as the runtime takes.

    Attributes:
        name: As it stands in ``ptq.export``; also the extra that installs it.
        suffix: Of the model's file.
        weights: Suffix of the file beside it that holds its weights; None where they are inside.
        source: Suffix of the file beside it that it was built from, which tells it from other models; None where
            there is none.
        packages: What running takes, as requirements.
        export_packages: What exporting takes.
        evidence: What :meth:`coverage` reads.
        dataflow: ``ptq.dataflow`` that its integers take, where the config says nothing.
        saturation: ``ptq.saturation`` that its kernels take, where the config says nothing.
        products: ``ptq.products``, in the same way.
        end2end: Whether its models can decode and suppress, too.
        opening: How a program without us runs such a model.
        packs: Whether it stores fewer than 8 bits a weight.
        compares: Whether :meth:`report_agreement` works.
        takes_parts: Whether a detector may be several networks, see :mod:`mmdet_ptq.deploy.network.parts`.
        dynamic_size: Whether the height and the width of images may stay open.
        sized: Whether the size of each of its tensors was known, and checked, before it was opened.
        parts: The other networks of the detector, opened, by name.
        meta: What the model says about itself, see :func:`mmdet_ptq.deploy.onnx.export.model_meta`.
    """

    name: str
    suffix: str
    weights: str | None = None
    source: str | None = None
    packages: tuple[str, ...] = ()
    export_packages: tuple[str, ...] = ()
    evidence: str = 'its own optimized graph'
    dataflow: str | None = None
    saturation: str = 'safe'
    products: str = 'integer'
    end2end: bool = False
    opening: Opening | None = None
    packs: bool = False
    compares: bool = False
    takes_parts: bool = False
    dynamic_size: bool = False
    sized: bool = False
    parts: Mapping[str, Runtime] = MappingProxyType({})
    meta: dict

    def __init__(self, path: str | os.PathLike, threads: int | None = None) -> None:
        raise NotImplementedError

    @classmethod
    def check(cls) -> None:
        """Refuses an environment without this runtime.

        Raises:
            PTQError: A package is missing or too old.
        """
        require(*cls.packages, extra=cls.name)

    @staticmethod
    def saturates() -> bool:
        """Whether this runtime, on this processor, adds products of 8-bit weights in 16 bits, which overflow.

        x86 processors without VNNI multiply unsigned with signed bytes by ``VPMADDUBSW``, which adds the products in
        pairs and saturates. The runtime is tried on :func:`worst_case`, once per process.
        """
        return False

    def remark(self) -> str:
        """What makes the model's results wrong on this processor, and the way out, in one sentence; '' if nothing does.

        Files tell their ``saturating`` layers; those of older versions do not, and may have some.
        """
        meta, quantized = self.meta, 'space_to_depth' in self.meta
        layers = meta.get('saturating')
        if layers == [] or (layers is None and not quantized) or not self.saturates():
            return ''
        where = 'its 8-bit products' if layers is None else f'the products of {len(layers)} of its layers'
        may = 'may saturate' if layers is None else 'saturate'
        how = (
            'export its checkpoint again'
            if layers is None
            else "calibrate again with this version of mmdet-ptq and `ptq.saturation='safe'`"
        )
        return (
            f'{self.name}: this processor adds products of bytes in 16 bits (it lacks VNNI), in which {where} '
            f'{may}, so that its results are wrong here; {how}.'
        )

    @classmethod
    def check_export(cls) -> None:
        """Refuses an environment in which no model can be written for this runtime.

        Raises:
            PTQError: A package is missing or too old.
        """
        require(*cls.export_packages, extra=cls.name)

    @classmethod
    def check_detector(cls, detector: nn.Module) -> None:
        """Refuses detectors that have no form in this runtime.

        Raises:
            PTQError: The detector has a forward of its own, or a second stage and the runtime takes one network.
        """
        check_exportable(detector)
        if has_regions(detector) and not cls.takes_parts:
            able = [name for name in runtime_names() if RUNTIMES.get(name).takes_parts]
            raise PTQError(
                f'{type(detector).__name__} has two stages, and {cls.name} takes detectors of one; '
                f'export it to {" or ".join(able)}.'
            )

    @classmethod
    def check_dynamic_size(cls, detector: nn.Module) -> None:
        """Refuses to leave the size of images open where that is not known.

        Raises:
            PTQError: The runtime takes one size, or the detector takes all of its tensor for the image.
        """
        if cls.dynamic_size and not has_queries(detector):
            return
        able = ' and '.join(name for name in runtime_names() if RUNTIMES.get(name).dynamic_size)
        why = (
            f'{type(detector).__name__} takes all of its tensor for the image'
            if cls.dynamic_size
            else f'{cls.name} takes images of one size, {able} any'
        )
        raise PTQError(fixed_size(why))

    @classmethod
    @torch.no_grad()
    def check_other_size(cls, path: Path, detector: nn.Module, shape: Sequence[int], divisor: int) -> None:
        """Refuses a model with open sizes whose graph knows one size nevertheless, and removes it.

        Args:
            path: The model.
            detector: The detector that it was exported from.
            shape: (N, C, H, W) that it was exported with.
            divisor: What heights and widths are multiples of.

        Raises:
            PTQError: It fails on an image of another size, or gives other outputs.
        """
        image = torch.rand(*shape[:2], shape[2] + divisor, shape[3] + 2 * divisor) * 2 - 1
        try:
            expected = [output.numpy() for output in RawOutputs(detector)(image)]
            found = open_model(path)(image.numpy())
            same = [output.shape for output in found] == [output.shape for output in expected]
        except Exception:  # of the runtime, or of the detector's own code
            same = False
        if same:
            # of integers other arithmetic may flip a code here and there
            least, pairs = (0.5 if is_quantized(detector) else 1e-2), zip(found, expected, strict=True)
            same = all(np.abs(ours - theirs).mean() <= least * theirs.std() for ours, theirs in pairs)
        if not same:
            for file in model_files(path):
                remove(file)
            raise PTQError(fixed_size('the exported graph is wrong on other sizes'))

    @classmethod
    def needed_activations(cls, bits: int) -> dict:
        """Arguments of the activations' quantizer that its number formats take, where the config says nothing.

        Args:
            bits: Of the activations.
        """
        return {}

    @classmethod
    def check_formats(cls, structure: Structure) -> None:
        """Refuses number formats that this runtime does not know.

        Args:
            structure: The structure of the quantized detector.

        Raises:
            PTQError: A format has no counterpart; names the key to change.
        """
        raise NotImplementedError

    @classmethod
    def export(
        cls, detector: nn.Module, folder: str | os.PathLike, input_shape: tuple[int, int, int, int], **options
    ) -> Path:
        """Writes the model into a folder and returns its path."""
        raise NotImplementedError

    @classmethod
    def dialect(cls) -> Dialect:
        """How an ONNX file is written for it, by :func:`mmdet_ptq.deploy.export_onnx`."""
        raise PTQError(f'{cls.name} reads no ONNX files; export to it with `mmdet-ptq-export --to {cls.name}`.')

    @classmethod
    def explain_float(cls, structure: Structure) -> str:
        """Why layers of a model stay float, where the detector's structure tells, and the way out; '' otherwise."""
        return ''

    @classmethod
    def report_agreement(cls, logger: MMLogger, detector: nn.Module, path: Path, image: Tensor) -> None:
        """Logs how far a model's integers are the simulation's, and names the first tensor that diverges.

        Args:
            logger: Where.
            detector: The quantized detector that the model was exported from.
            path: The model.
            image: (N, C, H, W), normalized.
        """
        raise NotImplementedError

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """Raw head outputs, flat.

        Args:
            *inputs: The image, (N, C, H, W), float32, normalized as mmdet's data preprocessor does; or what another
                network of the detector reads.
        """
        raise NotImplementedError

    @contextmanager
    def running(self, inputs: Sequence[np.ndarray]) -> Iterator[None]:
        """A run of the network, bounded where the sizes of its tensors were not known beforehand.

        Args:
            inputs: What it reads.

        Raises:
            PTQError: It took more memory than its inputs explain, or the runtime failed.
        """
        shapes = [list(given.shape) for given in inputs]
        try:
            known = self.sized and not self.meta.get('size_divisor')
            most = memory_limit(shapes, self.meta.get('regions', 0))
            with nullcontext() if known else bounds(f'running a model of {self.name}', most):
                yield
        except PTQError:
            raise
        except Exception as error:  # runtimes raise classes of their own
            raise PTQError(
                f'{self.name} cannot run the model on what has the shapes {shapes}: {one_line(error)[:300]}.'
            ) from error

    def coverage(self) -> IntegerCoverage:
        """Which convolutions of this network run in integers, by the runtime's own optimized graph."""
        raise NotImplementedError

    def whole_coverage(self) -> IntegerCoverage:
        """The same of all networks of the detector."""
        found = [self.coverage(), *(part.coverage() for part in self.parts.values())]
        return IntegerCoverage([c for f in found for c in f.integer], [c for f in found for c in f.float])

    def run_all(self, image: np.ndarray) -> None:
        """Runs every network of the detector once, for its time: an image and as many regions as an empty one has."""
        self(image)
        random = np.random.default_rng(0)
        for part in self.parts.values():
            part(*(random.standard_normal(shape, dtype=np.float32) for shape in part.meta['inputs']))


def fixed_size(why: str) -> str:
    """Why the size of images cannot stay open, and what to do."""
    return (
        f'the size of images cannot stay open: {why}; give a height and a width in place of '
        "`ptq.export_size='dynamic'` (`--dynamic-size`), or leave it out."
    )


def get_runtime(name: str, key: str = 'ptq.export') -> type[Runtime]:
    """The class of a runtime.

    Args:
        name: Its name.
        key: Where the name stands, for messages.

    Raises:
        PTQError: There is no such runtime.
    """
    names = runtime_names()
    if name not in names:
        raise PTQError(f'`{key}` knows {", ".join(map(repr, names))}, got {name!r}.{did_you_mean(name, names)}')
    return RUNTIMES.get(name)


def open_model(path: str | os.PathLike, threads: int | None = None) -> Runtime:
    """Opens an exported model with the runtime that its suffix tells.

    Raises:
        PTQError: No runtime reads such files, the file is missing, damaged or foreign.
    """
    if not Path(path).is_file():
        raise PTQError(f'there is no model {str(path)!r}; check the path.')
    kind = runtime_of(path)
    size = model_bytes(path)
    # runtimes compute what is constant, however large
    with bounds(f'opening {str(path)!r}', OPENING + 12 * size, OPENING_SECONDS + size / MIB):
        model = kind(path, threads)
        model.parts = {
            name: _opened_part(kind, part_path(path, name), digest, threads)
            for name, digest in model.meta.get('parts', {}).items()
        }
    if remark := model.remark():
        warn_once(remark)
    return model


def _opened_part(kind: type[Runtime], path: Path, digest: str, threads: int | None) -> Runtime:
    told = path.with_suffix(kind.source or path.suffix)
    there = path.is_file() and told.is_file()
    if not there or file_digest(told) != digest:
        state = 'of another model' if there else 'missing'
        raise PTQError(
            f'{str(path)!r}, a network of the same detector, is {state}; keep all files together or export again.'
        )
    return kind(path, threads)


def file_digest(path: Path) -> str:
    """Tells a file from all others."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def runtime_of(path: str | os.PathLike) -> type[Runtime]:
    """The runtime that reads a file, by its suffix.

    Raises:
        PTQError: No runtime reads such files.
    """
    known = {RUNTIMES.get(name).suffix: RUNTIMES.get(name) for name in runtime_names()}
    if Path(path).suffix not in known:
        raise PTQError(f'{str(path)!r} is no model of a known runtime; their suffixes are {", ".join(sorted(known))}.')
    return known[Path(path).suffix]


def model_files(path: str | os.PathLike) -> list[Path]:
    """All files of an exported model: of each of its networks, with their weights."""
    path = Path(path)
    beside = {runtime.suffix: runtime.weights for runtime in map(RUNTIMES.get, runtime_names())}.get(path.suffix)
    found = [path, *_part_files(path)]
    files = [f for file in found for f in (file, file.with_suffix(beside or path.suffix)) if f.is_file()]
    return list(dict.fromkeys(files))


def remove_parts(path: str | os.PathLike) -> None:
    """Removes a model that has several networks, the file that names them first."""
    for file in model_files(path) if _part_files(Path(path)) else []:
        file.unlink()


def _part_files(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f'{glob.escape(path.stem)}-{HEADS}.*{path.suffix}'))


def model_bytes(path: str | os.PathLike) -> int:
    """Size of an exported model, all its files together."""
    return sum(file.stat().st_size for file in model_files(path))


def worst_case() -> tuple[np.ndarray, np.ndarray, int]:
    """A convolution whose sums of two products are as large as 8 bits allow.

    Returns:
        The input, (1, 16, 1, 1), uint8, the weight, (16, 16, 1, 1), int8, and each of the sums.
    """
    channels, code, weight = 16, 255, 127
    return (
        np.full((1, channels, 1, 1), code, np.uint8),
        np.full((channels, channels, 1, 1), weight, np.int8),
        channels * code * weight,
    )


@functools.cache
def warn_once(text: str) -> None:
    """Logs a warning, once per process."""
    print_log(text, 'current', logging.WARNING)
