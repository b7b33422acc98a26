"""The quantized detector as ONNX graphs with explicit QuantizeLinear and DequantizeLinear: one for each network."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmdet_ptq.compat import typed_ranges
from mmdet_ptq.deploy.integers.biases import float_shared_biases
from mmdet_ptq.deploy.network.known_sizes import known_sizes
from mmdet_ptq.deploy.network.meta import called, checked_meta, input_meta, write_meta
from mmdet_ptq.deploy.network.parts import part_path, parts_of
from mmdet_ptq.deploy.network.raw_outputs import (
    RawOutputs,
    check_exportable,
    first_outputs,
    output_layout,
    output_shapes,
    region_shapes,
)
from mmdet_ptq.deploy.network.seal import seal
from mmdet_ptq.deploy.network.standard_operations import standard_operations
from mmdet_ptq.deploy.onnx.deformable import deformable_nodes
from mmdet_ptq.deploy.onnx.dialect import Dialect
from mmdet_ptq.deploy.onnx.end2end import check_end2end, end_to_end
from mmdet_ptq.deploy.onnx.end2end.choice import INPUTS
from mmdet_ptq.deploy.onnx.nodes import OPSET, expand_quantizers, quantizer_nodes
from mmdet_ptq.deploy.onnx.slices import slice_translations
from mmdet_ptq.deploy.onnx.trouble import failing_place
from mmdet_ptq.deploy.requirements import ONNX, require
from mmdet_ptq.deploy.runtime import file_digest, fixed_size, get_runtime, remove_parts, runtime_of
from mmdet_ptq.errors import PTQError, first_line
from mmdet_ptq.files import write_atomic
from mmdet_ptq.version import __version__
from mmdet_ptq.wrapping import is_quantized, quantization_mode
from mmdet_ptq.wrapping.state import only_read_tensors

if TYPE_CHECKING:
    import onnx_ir as ir

FORMAT = 'mmdet_ptq.onnx'


def export_onnx(
    detector: nn.Module,
    path: str | os.PathLike,
    input_shape: tuple[int, int, int, int],
    *,
    runtime: str | None = None,
    dynamic_batch: bool = False,
    dynamic_size: int = 0,
    packed: bool = True,
    end2end: bool = False,
) -> dict:
    """Writes a detector as ONNX, one graph from the normalized image to the head's raw outputs or to detections.

    Of a detector with two stages that is the first one; each head behind its regions has a file beside it
    (:func:`mmdet_ptq.deploy.network.parts.part_path`).

    The quantized detector itself is exported, its quantizers writing their nodes
    (:mod:`mmdet_ptq.deploy.onnx.nodes`), with torch's exporter (``torch.onnx.export(dynamo=True)``).

    Args:
        detector: A calibrated quantized detector, or a float one, in eval mode.
        path: The ``.onnx`` file; it is complete or absent.
        input_shape: (N, C, H, W).
        runtime: Name of the runtime whose graph it is. Defaults to None: the one that reads such files.
        dynamic_batch: Whether N stays open. Defaults to False.
        dynamic_size: H and W stay open, as multiples of this. Defaults to 0: they are those of ``input_shape``.
        packed: Whether weights of at most 16 levels are stored as 4-bit codes with their table, and biases that fit as
            int16, where the runtime's dialect knows them. Defaults to True.
        end2end: Whether the graph decodes and suppresses too, see :func:`.end2end.end_to_end`. Defaults to False.

    Returns:
        What the file says about itself, see :func:`model_meta`.

    Raises:
        PTQError: An extra is not installed, the detector has a forward of its own, does not take such images or so
            many of them, an operation has no ONNX form, or ``end2end`` does not know the head or an open size.
    """
    check_exportable(detector)
    if end2end:
        check_end2end(detector)
    chosen = get_runtime(runtime) if runtime else runtime_of(path)
    if dynamic_size:
        chosen.check_dynamic_size(detector)
    if dynamic_size and end2end:
        raise PTQError('an end-to-end model takes images of one size; leave out --end2end or --dynamic-size.')
    require(*ONNX, extra=chosen.name)
    outputs = first_outputs(detector, input_shape)
    image = torch.zeros(input_shape, device=next(detector.parameters()).device)
    others = [] if end2end else parts_of(detector, image)[1:]
    if others and not dynamic_batch and input_shape[0] > 1:
        raise PTQError('a detector with two stages is exported for batches of 1, or with --dynamic-batch.')
    remove_parts(path)
    told = dict(runtime=chosen.name, input_shape=list(input_shape), input=input_meta(detector, input_shape[1]))
    digests, saturating = {}, []
    for part in others:
        example = part.run(detector, *part.inputs)
        told_part = dict(
            told,
            dynamic_batch=part.any_number,
            outputs=output_layout(example),
            raw_shapes=output_shapes(example),
            inputs=[list(tensor.shape) for tensor in part.inputs],
            constants=part.constants,
        )
        network, file = RawOutputs(detector, part), part_path(path, part.name)
        saturating += _export(detector, network, part.inputs, file, told_part, chosen.dialect(), packed)['saturating']
        digests[part.name] = file_digest(file)
    network, inputs = RawOutputs(detector), (image,)
    if end2end:
        network, inputs = end_to_end(detector, outputs), (image, image.new_tensor([input_shape[2:]] * input_shape[0]))
        told['inputs'] = [list(tensor.shape) for tensor in inputs]
    meta = dict(
        told,
        dynamic_batch=dynamic_batch,
        outputs=list(range(len(network.names))) if end2end else output_layout(outputs),
        end2end=end2end,
        raw_shapes=output_shapes(outputs) + (region_shapes(detector, image) if end2end else []),
        **(dict(size_divisor=dynamic_size) if dynamic_size else {}),
        **(dict(regions=network.regions) if end2end and network.regions else {}),
        **(dict(parts=digests) if others else {}),
    )
    return _export(detector, network, inputs, path, meta, chosen.dialect(), packed, saturating)


def _export(
    detector: nn.Module,
    network: nn.Module,
    inputs: tuple[Tensor, ...],
    path: str | os.PathLike,
    told: dict,
    dialect: Dialect,
    packed: bool,
    saturating: Sequence[str] = (),
) -> dict:
    """Writes one graph; its first dimension stays open where ``told`` says so. Returns all that the file says."""
    model = exported_program(detector, network, inputs, dialect, told)
    from mmdet_ptq.deploy.onnx.compact import compact
    from mmdet_ptq.deploy.onnx.graph import name_layers
    from mmdet_ptq.deploy.onnx.products import name_products
    from mmdet_ptq.deploy.onnx.saturation import saturating_layers
    from mmdet_ptq.deploy.onnx.space_to_depth import fold_space_to_depth

    graph, meta = model.graph, dict(told, format=FORMAT, version=__version__)
    meta['layers'] = name_layers(graph, detector)
    if is_quantized(detector):
        expand_quantizers(graph, detector, dialect.clip_codes, dialect.unsigned, dialect.rounds_wide)
        if products := name_products(graph):
            # they stood under the module that computes them
            meta['layers'] = {call: layer for call, layer in meta['layers'].items() if call not in products}
            meta['products'] = list(products.values())
        # a float detector stays what PyTorch exports
        folded = fold_space_to_depth(graph, into_kernel=dialect.slices_into_kernel)
        meta['space_to_depth'] = {fold.activation: fold.offsets for fold in folded if fold.activation is not None}
        if dialect.slices_into_kernel:
            meta['folded'] = {fold.layer: fold.offsets for fold in folded}
    for change in dialect.passes:
        change(graph)
    meta['saturating'] = [*saturating_layers(graph), *saturating]
    for pack in dialect.packings if packed else ():
        pack(graph)
    if dialect.compact:
        compact(model, called(meta))
    _write(model, meta, path, dialect)
    return meta


def exported_program(
    detector: nn.Module, network: nn.Module, inputs: tuple[Tensor, ...], dialect: Dialect, told: dict
) -> ir.Model:
    names = INPUTS[:1] if len(inputs) == 1 else [f'input_{number}' for number in range(len(inputs))]
    with (
        _writing(detector, dialect),
        deformable_nodes(),
        standard_operations(),
        known_sizes(),
        typed_ranges(),
        _quiet(),
    ):
        try:
            program = torch.onnx.export(
                network.eval(),
                inputs,
                dynamo=True,
                opset_version=OPSET,
                input_names=INPUTS if told.get('end2end') else names,
                output_names=network.names if told.get('end2end') else None,
                dynamic_shapes=_open_shapes(network, inputs, told),
                custom_translation_table=slice_translations(),
                verbose=False,
                external_data=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            cause = _cause(error)
            if 'size_divisor' in told:
                raise PTQError(fixed_size(cause.rstrip('.'))) from error
            where = failing_place(network, inputs, cause)
            raise PTQError(
                f'the detector cannot be exported to ONNX{where and f", in {where}"}: {cause.rstrip(".")}; '
                'replace that operation, or leave out the export.'
            ) from error
    if told['dynamic_batch'] and any(isinstance(given.shape[0], int) for given in program.model.graph.inputs):
        raise PTQError(
            "--dynamic-batch leaves the number of images open, and the detector's own code fixes it; leave "
            'the option out: batches are split then.'
            if 'constants' not in told
            else "the detector's own code fixes the number of regions, which must stay open; remove `ptq.export`."
        )
    from mmdet_ptq.deploy.onnx.graph import note_calls, own_constants

    own_constants(program.model.graph)
    note_calls(program, detector)
    return program.model


def _open_shapes(network: nn.Module, inputs: tuple[Tensor, ...], told: dict) -> tuple | None:
    """What stays open of each input, None where nothing does; the arguments of a network of any number are one."""
    shapes = tuple({} for _ in inputs)
    if told['dynamic_batch']:
        batch = torch.export.Dim('batch', min=1)
        shapes = tuple({0: batch} for _ in inputs)
    if divisor := told.get('size_divisor'):
        # of one input, the image
        sides = (torch.export.Dim(name, min=1) for name in ('height', 'width'))
        shapes[0].update(enumerate((side if divisor == 1 else divisor * side for side in sides), 2))
    if not any(shapes):
        return None
    return (shapes,) if isinstance(network, RawOutputs) else shapes


@contextmanager
def _writing(detector: nn.Module, dialect: Dialect) -> Iterator[None]:
    """The quantizers that a runtime wants write their nodes."""
    if not is_quantized(detector):
        yield
        return
    wanted = quantization_mode(detector, 'quantize') if dialect.between_layers else only_read_tensors(detector)
    with wanted, quantizer_nodes(detector), float_shared_biases(detector):
        yield


def _cause(error: BaseException) -> str:
    """The first line of what lies at the root of an exporter's error, and where it happened."""
    while error.__cause__ is not None:
        error = error.__cause__
    if 'data is not allocated yet' in str(error):
        return "an operation that is compiled, and none of torch's own, has no ONNX form"
    return first_line(error)[:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's remarks about its own dependencies out of the log."""
    loggers = [logging.getLogger(name) for name in ('torch.onnx', 'onnxscript')]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _write(model, meta: dict, path: str | os.PathLike, dialect: Dialect) -> None:
    import onnx
    import onnx_ir as ir
    from onnx_ir.passes import common

    # stack traces of the exporting machine are no business of the file
    common.ClearMetadataAndDocStringPass()(model)
    common.RemoveUnusedNodesPass()(model)
    model.graph.name = 'detector'
    model.producer_name, model.producer_version = 'mmdet-ptq', __version__
    model.metadata_props['mmdet_ptq'] = write_meta(meta)
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise PTQError(
            f'the detector cannot be exported: PyTorch wrote a graph that ONNX refuses '
            f'({first_line(error)[:200]}); leave out the export, and report it.'
        ) from error
    if dialect.check is not None:
        dialect.check(proto)
    content = seal(proto.SerializeToString())
    write_atomic(path, lambda file: file.write(content))


def model_meta(path: str | os.PathLike) -> dict:
    """What an exported ONNX file says about itself.

    Returns:
        ``dict(runtime, input_shape, input, dynamic_batch, outputs, end2end, raw_shapes, format, version, layers,
        saturating)``:
        ``input`` is :func:`mmdet_ptq.deploy.network.meta.input_meta`, ``outputs`` is the nesting of the raw outputs,
        ``raw_shapes`` are theirs for one image of ``input_shape``, ``layers`` names each convolution's layer,
        ``products`` (where there are any) those of two activations, ``saturating`` the calls of layers that processors
        without VNNI compute wrongly. A quantized detector's has ``space_to_depth``, too: what
        :func:`mmdet_ptq.deploy.onnx.space_to_depth.fold_space_to_depth` changed, each activation to the offsets of the
        slices in the order of the detector's channels; and ``folded`` the same by layer, where its convolution reads
        the image itself. A detector with two stages has ``parts``, the name of each other network to the digest of its
        file; such a file has ``inputs``, the shapes that it read of an empty image (the first dimension is open), and
        ``constants``, what else its module was called with. An end-to-end model has ``inputs``, too. One whose size is
        open has ``size_divisor``: heights and widths are multiples of it. One with regions inside
        has ``regions``, how many of an image.

    Raises:
        PTQError: The file is missing, damaged or not ours.
    """
    require(*ONNX[:1])
    import onnx

    try:
        proto = onnx.load(os.fspath(path), load_external_data=False)
        entries = {entry.key: entry.value for entry in proto.metadata_props}
    except FileNotFoundError as error:
        raise PTQError(f'there is no model {str(path)!r}; check the path.') from error
    except Exception as error:  # protobuf fails in its own ways
        raise PTQError(f'{str(path)!r} is damaged or no ONNX model; export it again with tools/export.py.') from error
    if 'mmdet_ptq' not in entries:
        raise PTQError(f'{str(path)!r} was not exported by mmdet-ptq; make one with tools/export.py.')
    return checked_meta(entries['mmdet_ptq'], path)
