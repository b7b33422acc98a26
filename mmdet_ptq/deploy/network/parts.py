"""A detector as the networks that a runtime computes: one that reads the image, and one for each head behind regions.

Between the networks of a detector with two stages stands mmdet's own code, which proposes regions, reads their features
and merges what the heads find.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from mmdet.models.detectors import TwoStagePanopticSegmentor
from mmdet.models.roi_heads.roi_extractors import GenericRoIExtractor
from mmdet.models.roi_heads.roi_extractors.base_roi_extractor import BaseRoIExtractor
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_iter, tree_map_only

from mmdet_ptq.deploy.network.queries import has_queries, last_layer, whole_image, whole_images
from mmdet_ptq.errors import PTQError
from mmdet_ptq.predictions.prototypes import has_prototypes, prototype_network
from mmdet_ptq.predictions.stock import runs_as
from mmdet_ptq.predictions.two_stage import is_two_stage
from mmdet_ptq.wrapping.names import call_name, call_of, layer_of
from mmdet_ptq.wrapping.state import STATE
from mmdet_ptq.wrapping.watching.tensors import tensors_in

# where a detector has the heads behind its regions
HEADS = 'roi_head'
# a dimension of one region would be taken for a constant
_FEWEST = 2
# what a head may be called with besides tensors, and a file can hold
_PLAIN = {'bool', 'int', 'float', 'str', 'NoneType'}
_REHEARSAL: ContextVar[bool] = ContextVar('rehearsal', default=False)


def is_rehearsal() -> bool:
    """Returns whether a call of a head is made for nothing but the count of its calls."""
    return _REHEARSAL.get()


@dataclass(frozen=True)
class Part:
    """One network.

    Attributes:
        name: Path of the module that computes it, with ``#k`` for its further calls; '' for the network that reads the
            image.
        args: What the module is called with, tensors and constants; the first dimension of the tensors are regions, or
            images where heads compare the regions of each.
        kwargs: The same by keyword.
    """

    name: str
    args: tuple
    kwargs: dict = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors of its call, flat."""
        return tuple(tensors_in((self.args, self.kwargs)))

    @property
    def any_number(self) -> bool:
        """Whether it takes any number of regions: regions are the first dimension of all that it reads."""
        return len({len(tensor) for tensor in self.inputs}) == 1

    @property
    def constants(self) -> list:
        """What else it was called with."""
        return constants_in((self.args, self.kwargs))

    def with_inputs(self, inputs: Iterable[Tensor]) -> Part:
        """The same called with other tensors, given flat."""
        given = iter(inputs)
        args, kwargs = tree_map_only(Tensor, lambda _: next(given), (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def run(self, detector: nn.Module, *inputs: Tensor) -> Any:
        """What it computes, as nested as the detector's own code returns it."""
        if not self.name and has_queries(detector):
            return last_layer(detector(*inputs, whole_images(detector, *inputs), mode='tensor'))
        if self.name:
            run = partial(self._call, detector.get_submodule(layer_of(self.name)))
        elif has_regions(detector):
            run = _first_stage(detector)
        elif has_prototypes(detector):
            run = prototype_network(detector)
        else:
            return detector(*inputs, None, mode='tensor')
        with called(detector, run):
            return detector(*inputs)

    def _call(self, module: nn.Module, *inputs: Tensor) -> Any:
        def call() -> Any:
            given = self.with_inputs(inputs)
            if isinstance(module, BaseRoIExtractor):
                return _from_pooled(module, *given.args, **given.kwargs)
            return module(*given.args, **given.kwargs)

        # each call has ranges of its own: those before it are made, too, and nobody reads what they give
        token = _REHEARSAL.set(True)
        try:
            for _ in range(call_of(self.name)):
                call()
        finally:
            _REHEARSAL.reset(token)
        return call()


FIRST = Part('', ())


def has_regions(detector: nn.Module) -> bool:
    """Returns whether a detector has heads that read regions of its features."""
    return is_two_stage(detector) or runs_as(detector, TwoStagePanopticSegmentor)


def _first_stage(detector: nn.Module) -> Callable[[Tensor], tuple]:
    """Features, what the heads say that read all of them, and what mmdet's own code reads of the detector itself."""
    read = [detector.get_parameter(name) for name in parameters_between(detector)]

    def forward(image: Tensor) -> tuple:
        features = detector.extract_feat(image)
        constants = (values.expand(len(image), *values.shape) for values in read)
        return (features, *(head(features) for head in image_heads(detector)), *constants)

    return forward


def image_heads(detector: nn.Module) -> list[nn.Module]:
    """The heads of a detector with regions that read all of its features."""
    return [getattr(detector, name) for name in _image_head_names(detector)]


def proposes(detector: nn.Module) -> bool:
    """Whether a detector of two stages has a region proposal network that reads the features alone."""
    return detector.with_rpn and type(detector.rpn_head).forward is not nn.Module.forward


def parameters_between(detector: nn.Module) -> list[str]:
    """Names of the parameters that no network computes with, such as queries that stand for regions of every image.

    mmdet's own code reads them between the networks. Layers are none of them.
    """
    layers = {name for name, module in detector.named_modules() if isinstance(module, _ConvNd | nn.Linear)}
    inside = ['backbone', 'neck', STATE, *_image_head_names(detector), *(name for name, _ in region_heads(detector))]
    return [
        name
        for name, _ in detector.named_parameters()
        if not _is_in(name, inside) and name.rpartition('.')[0] not in layers
    ]


def _image_head_names(detector: nn.Module) -> list[str]:
    # by name: while a graph is traced, an attribute is not the module itself where one stands under two names
    names = ['rpn_head'] if proposes(detector) else []
    return names + (['semantic_head'] if isinstance(detector, TwoStagePanopticSegmentor) else [])


def _is_in(name: str, modules: Iterable[str]) -> bool:
    return name.startswith(tuple(f'{module}.' for module in modules))


@contextmanager
def called(detector: nn.Module, forward: Callable) -> Iterator[None]:
    """A call of the detector, with all its hooks and what runs between its layers, computes something else."""
    own, state = vars(detector).get('forward'), getattr(detector, STATE, None)

    def inside(*inputs: Tensor) -> Any:
        with nullcontext() if state is None or state.flow is None else state.flow.running(whole=True):
            return forward(*inputs)

    detector.forward = inside
    try:
        yield
    finally:
        del detector.forward
        if own is not None:
            detector.forward = own


def constants_in(value: Any) -> list:
    """Everything in nested containers that is no tensor, in order."""
    return [leaf for leaf in tree_iter(value) if not isinstance(leaf, Tensor)]


def part_path(path: str | os.PathLike, name: str) -> Path:
    """The file of a part beside the model whose part it is."""
    path = Path(path)
    return path.with_name(f'{path.stem}-{name}{path.suffix}')


@torch.no_grad()
def parts_of(detector: nn.Module, image: Tensor) -> list[Part]:
    """The networks of a detector, the one that reads the image first, with what they read of an image.

    Args:
        detector: The detector, in eval mode.
        image: (N, C, H, W), normalized; heads behind regions read those of its first image.

    Raises:
        PTQError: The detector computes with weights outside of them.
    """
    first = Part('', (image,))
    if not has_regions(detector):
        return [first]
    parts = [first, *_region_parts(detector, image)]
    _check_complete(detector, [part.name for part in parts])
    return parts


def _region_parts(detector: nn.Module, image: Tensor) -> list[Part]:
    """The calls of the heads behind the regions of an image, in their order."""
    calls: dict[str, list[Part]] = {}
    flow = getattr(getattr(detector, STATE, None), 'flow', None)

    def note(name: str) -> Callable:
        def noted(module: nn.Module, args: tuple, kwargs: dict) -> None:
            # pooling for the note is no operation of the detector's
            with nullcontext() if flow is None else flow.muted():
                calls.setdefault(name, []).append(Part(name, *region_inputs(module, args, kwargs)))

        return noted

    def run(mode: str, heads: list[tuple[str, nn.Module]]) -> None:
        with ExitStack() as stack:
            for name, head in heads:
                stack.callback(head.register_forward_pre_hook(note(name), with_kwargs=True).remove)
            detector(image[:1], _sample(detector, image), mode=mode)

    heads = region_heads(detector)
    for name, head in heads:
        if isinstance(head, BaseRoIExtractor) and type(head).forward is not GenericRoIExtractor.forward:
            raise PTQError(
                f'{type(detector).__name__} cannot be exported: {name} reads regions in a way of its own, and has '
                'weights; remove `ptq.export`.'
            )
    run('tensor', heads)
    left = [(name, head) for name, head in heads if name not in calls]
    if left and 'score_thr' in (detector.roi_head.test_cfg or {}):
        # heads that refine what others found run where something is found
        with mock.patch.dict(detector.roi_head.test_cfg, score_thr=-1.0):
            run('predict', left)
    found = [replace(part, name=call_name(name, k)) for name, parts in calls.items() for k, part in enumerate(parts)]
    for part in found:
        strange = {type(constant).__name__ for constant in part.constants} - _PLAIN
        if strange:
            raise PTQError(
                f'{type(detector).__name__} cannot be exported: {part.name} reads {min(strange)} in a forward pass; '
                'remove `ptq.export`.'
            )
    return [_widened(part) for part in found]


def _sample(detector: nn.Module, image: Tensor) -> list[DetDataSample]:
    """Meta information of an image, with regions for a detector that proposes none itself."""
    (sample,) = whole_image(image)
    if not detector.with_rpn:
        height, width = image.shape[2:]
        boxes = image.new_tensor([[0, 0, width, height], [width / 4, height / 4, 3 * width / 4, 3 * height / 4]])
        sample.proposals = InstanceData(bboxes=boxes)
    return [sample]


def region_heads(detector: nn.Module) -> list[tuple[str, nn.Module]]:
    """The heads behind the regions, with their paths."""
    return list(_heads(detector.roi_head, HEADS))


def _heads(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _heads(child, f'{path}.{name}')
        elif next(child.parameters(), None) is not None:
            yield f'{path}.{name}', child


def region_inputs(head: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """What the network of a head behind regions reads, from what the head is called with.

    Heads read what they are called with. An extractor with layers of its own is called with features and regions: its
    network reads what the pooling, mmdet's own code, takes out of them, one tensor for each level.

    Args:
        head: The head, or the extractor.
        args: What it is called with.
        kwargs: The same by keyword.
    """
    if not isinstance(head, BaseRoIExtractor):
        return args, kwargs
    given = inspect.signature(head.__class__.forward).bind(head, *args, **kwargs).arguments
    factor = {key: given[key] for key in ('roi_scale_factor',) if given.get(key) is not None}
    return _pooled(head, given['feats'], given['rois'], **factor), factor


def _pooled(
    extractor: GenericRoIExtractor, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None
) -> tuple[Tensor, ...]:
    if len(feats) > 1 and roi_scale_factor is not None:
        rois = extractor.roi_rescale(rois, roi_scale_factor)
    layers = zip(extractor.roi_layers, feats, strict=False)
    if not len(rois):
        return tuple(level.new_zeros(0, level.shape[1], *layer.output_size) for layer, level in layers)
    return tuple(layer(level, rois) for layer, level in layers)


def _from_pooled(extractor: GenericRoIExtractor, *pooled: Tensor, **factor: float) -> Tensor:
    """What an extractor makes of what was pooled before."""
    with ExitStack() as stack:
        for layer in extractor.roi_layers:
            stack.enter_context(mock.patch.object(layer, 'forward', lambda level, rois: level))
        return extractor(pooled, pooled[0].new_zeros(pooled[0].shape[0], 5), **factor)


def _widened(part: Part) -> Part:
    """The same with enough regions that none is taken for a constant, where any number may come."""
    if not part.any_number:
        return part
    wide = (
        torch.cat([tensor, tensor.new_zeros(max(0, _FEWEST - len(tensor)), *tensor.shape[1:])])
        for tensor in part.inputs
    )
    return part.with_inputs(wide)


def _check_complete(detector: nn.Module, names: list[str]) -> None:
    """Refuses weights that no network has."""
    known = ['backbone', 'neck', STATE, *map(layer_of, names[1:]), *_image_head_names(detector)]
    between = parameters_between(detector)
    left = [name for name, _ in detector.named_parameters() if not _is_in(name, known) and name not in between]
    if left:
        raise PTQError(
            f'{type(detector).__name__} cannot be exported: its own code computes with {left[0]} between the networks '
            'that runtimes take; remove `ptq.export`.'
        )
