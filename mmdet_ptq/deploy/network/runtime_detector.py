"""A runtime that answers like a detector: mmdet's data and decoding around an exported model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdet_ptq.deploy.network.build import build_detector
from mmdet_ptq.deploy.network.canvas import pad_to
from mmdet_ptq.deploy.network.parts import (
    constants_in,
    has_regions,
    image_heads,
    parameters_between,
    parts_of,
    region_inputs,
)
from mmdet_ptq.deploy.network.queries import as_layers, finds_boxes, finds_masks, unread_inputs
from mmdet_ptq.deploy.network.raw_outputs import (
    check_exportable,
    first_outputs,
    nest_outputs,
    only_head,
    output_shapes,
    region_shapes,
)
from mmdet_ptq.deploy.runtime import Runtime
from mmdet_ptq.errors import PTQError
from mmdet_ptq.predictions.prototypes import has_prototypes, prototype_heads
from mmdet_ptq.wrapping.names import layer_of
from mmdet_ptq.wrapping.watching.tensors import tensors_in


def runtime_detector(config: Config, runtime: Runtime, dataset_meta: dict | None = None) -> nn.Module:
    """Builds a detector whose network is an exported model.

    mmdet's data preprocessor is the config's own, and so are decoding and NMS where the model was not exported with
    ``end2end``; weights of the config's detector are not used.

    Args:
        config: The config the model was exported from.
        runtime: The opened model.
        dataset_meta: Class names and palette, as mmdet keeps them. Defaults to None: the model's own class names.

    Returns:
        A detector on the CPU, in eval mode, for mmdet's test loop and ``mmdet.apis.inference_detector``.

    Raises:
        PTQError: The config's detector is not the one that was exported.
    """
    detector = build_detector(config)
    detector.eval()  # not every detector of mmdet returns itself
    check_exportable(detector)
    _check_outputs(detector, runtime.meta)
    return with_runtime(detector, runtime, config, dataset_meta)


def _check_outputs(detector: nn.Module, meta: dict) -> None:
    """Refuses a model whose head returns something else than the config's; older models do not tell."""
    if 'raw_shapes' not in meta:
        return
    shape = (1, *meta['input_shape'][1:])
    expected = output_shapes(first_outputs(detector, shape))
    if meta.get('end2end'):
        expected += region_shapes(detector, torch.zeros(shape))
    if has_regions(detector) and not meta.get('end2end'):
        names = [part.name for part in parts_of(detector, torch.zeros(shape))[1:]]
        if names != list(meta.get('parts', {})):
            theirs = ', '.join(meta.get('parts', {})) or 'of one stage'
            raise PTQError(
                f"the model was exported from another detector than the config's: it has the networks {theirs}, "
                f"the config's {', '.join(names)}; give the config that it was exported from."
            )
    if expected != meta['raw_shapes']:
        pairs = zip_longest(expected, meta['raw_shapes'])
        place, (ours, theirs) = next((place, pair) for place, pair in enumerate(pairs) if pair[0] != pair[1])
        raise PTQError(
            f"the model was exported from another detector than the config's: of its {len(meta['raw_shapes'])} raw "
            f"outputs number {place + 1} has the shape {theirs}, the config's {len(expected)} have {ours} there; give "
            'the config that it was exported from.'
        )


def with_runtime(
    detector: nn.Module, runtime: Runtime, config: Config | None = None, dataset_meta: dict | None = None
) -> nn.Module:
    """Puts a runtime in place of a detector's network, in place.

    Args:
        detector: A detector of one or two stages.
        runtime: The opened model.
        config: Kept as ``detector.cfg``. Defaults to None.
        dataset_meta: Class names and palette. Defaults to None: the model's own class names.
    """
    check_exportable(detector)
    device = next(detector.parameters()).device
    # only what decodes stays: the network's own parts would be dead weight
    detector.backbone = nn.Identity()
    if finds_boxes(detector):
        detector.encoder = detector.decoder = nn.Identity()
    if detector.with_neck:
        detector.neck = nn.Identity()
    detector.extract_feat = _Features()
    if has_regions(detector) and runtime.meta.get('end2end'):
        detector.rpn_head.predict = _no_proposals
        detector.roi_head.predict = _RegionDetections(runtime, device, detector.roi_head)
    elif has_regions(detector):
        read = [detector.get_parameter(name) for name in parameters_between(detector)]
        detector.extract_feat = first = _FirstStage(runtime, device, read)
        for place, head in enumerate(image_heads(detector)):
            head.forward = partial(first.of_head, place)
        calls: dict[str, list[Runtime]] = {}
        for name, part in runtime.parts.items():
            calls.setdefault(layer_of(name), []).append(part)
        first.heads = [_Head(name, detector.get_submodule(name), parts, device) for name, parts in calls.items()]
        for head in first.heads:
            head.module.forward = head
    elif has_prototypes(detector):
        detector.extract_feat = network = _PrototypeNetwork(runtime, device)
        for place, head in enumerate(prototype_heads(detector)):
            head.forward = partial(network.of_head, place)
    elif finds_masks(detector):
        detector.panoptic_head.forward = _MaskQueries(runtime, device)
    elif finds_boxes(detector):
        detector.forward_transformer = _Transformer(runtime, device, detector.bbox_head)
        detector.bbox_head.forward = detector.forward_transformer.found
    elif runtime.meta.get('end2end'):
        clips = getattr(getattr(detector.bbox_head, 'bbox_coder', None), 'clip_border', False)
        detector.bbox_head.predict = _Detections(runtime, device, clips)
    else:
        kind = _RawHead if detector.with_bbox else _RawMaskHead
        only_head(detector).forward = kind(runtime, device)
    classes = runtime.meta.get('input', {}).get('classes')
    if 'size_divisor' not in runtime.meta:
        pad_to(detector, tuple(runtime.meta['input_shape'][2:]))
    detector.cfg = config
    detector.dataset_meta = dataset_meta or (dict(classes=tuple(classes)) if classes else {})
    detector.eval()
    return detector


class _Features:
    """Stands in for backbone and neck: the head's runtime reads the image itself."""

    def __call__(self, batch_inputs: Tensor) -> Tensor:
        return batch_inputs


class _Network:
    """The flat outputs of a runtime for a batch of any size."""

    def __init__(self, runtime: Runtime, device: torch.device) -> None:
        self.runtime = runtime
        self.device = device

    def outputs(self, *given: Tensor) -> list[Tensor]:
        batches = [self._run(*parts) for parts in zip(*map(self._parts, given), strict=True)]
        return [torch.from_numpy(np.concatenate(outputs)).to(self.device) for outputs in zip(*batches, strict=True)]

    def _parts(self, given: Tensor) -> list[Tensor]:
        if self.runtime.meta['dynamic_batch']:
            return [given]
        return list(given.split(self.runtime.meta['input_shape'][0]))

    def _run(self, image: Tensor, *others: Tensor) -> list[np.ndarray]:
        wanted = list(self.runtime.meta['input_shape'])
        divisor = self.runtime.meta.get('size_divisor')
        if divisor and any(side % divisor for side in image.shape[2:]):
            raise PTQError(
                f'the model was exported for images whose height and width are multiples of {divisor}, the test '
                f'pipeline gives {image.shape[2]}x{image.shape[3]}; set `pad_size_divisor={divisor}` in the data '
                'preprocessor.'
            )
        if list(image.shape[1:]) != wanted[1:] and not divisor:
            raise PTQError(
                f'the model was exported for images of {wanted[2]}x{wanted[3]} (height x width), the test pipeline '
                f'gives {image.shape[2]}x{image.shape[3]}; export it with --input-shape {image.shape[2]} '
                f'{image.shape[3]}: smaller images are padded.'
            )
        missing = 0 if self.runtime.meta['dynamic_batch'] else wanted[0] - len(image)
        given = image, *others
        if missing > 0:
            given = [torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) for tensor in given]
        outputs = self.runtime(*(tensor.detach().cpu().contiguous().numpy() for tensor in given))
        return [output[: len(output) - missing] if missing > 0 else output for output in outputs]


class _RawHead(_Network):
    """Stands in for the head's forward."""

    def __call__(self, image: Tensor) -> Any:
        return nest_outputs(self.outputs(image), self.runtime.meta['outputs'])


class _RawMaskHead(_RawHead):
    """The same of a detector of masks alone, which puts what its head returns in a tuple."""

    def __call__(self, image: Tensor) -> Any:
        (outputs,) = super().__call__(image)
        return outputs


class _MaskQueries(_RawHead):
    """Stands in for the forward of a head whose queries find masks."""

    def __call__(self, image: Tensor, batch_data_samples: list) -> tuple:
        return as_layers(super().__call__(image))


class _Transformer(_RawHead):
    """Stands in for the transformer of a detector with queries."""

    def __init__(self, runtime: Runtime, device: torch.device, head: nn.Module) -> None:
        super().__init__(runtime, device)
        self.unread = unread_inputs(head)

    def __call__(self, image: Tensor, batch_data_samples: list | None = None) -> dict[str, Tensor]:
        self.outputs_of_head = as_layers(super().__call__(image))
        return self.unread

    def found(self, *args: Any, **kwargs: Any) -> tuple:
        """What the head says of the image that it gave last."""
        return self.outputs_of_head


class _FirstStage(_Network):
    """Stands in for backbone, neck and the heads that read all features."""

    heads: Sequence[_Head] = ()

    def __init__(self, runtime: Runtime, device: torch.device, read: Sequence[nn.Parameter]) -> None:
        super().__init__(runtime, device)
        self.read = read

    def __call__(self, image: Tensor) -> tuple[Tensor, ...]:
        for head in self.heads:
            head.calls = 0
        features, *self.found = nest_outputs(self.outputs(image), self.runtime.meta['outputs'])
        # the model's own, which are the same for every image
        for parameter, values in zip(self.read, self.found[len(self.found) - len(self.read) :], strict=True):
            parameter.data = values[0]
        return features

    def of_head(self, place: int, features: tuple[Tensor, ...]) -> Any:
        """What a head said of the features that were given last."""
        return self.found[place]


class _PrototypeNetwork(_Network):
    """Stands in for backbone and neck of a detector with prototypes, and knows what its heads say."""

    def __call__(self, image: Tensor) -> tuple[Tensor]:
        self.found = nest_outputs(self.outputs(image), self.runtime.meta['outputs'])
        return (image,)

    def of_head(self, place: int, features: Any) -> Any:
        """What a head said of the image that was given last."""
        return self.found[place]


class _Head:
    """Stands in for the forward of a head behind regions; each call of it in a forward pass is a network."""

    def __init__(self, name: str, module: nn.Module, runtimes: list[Runtime], device: torch.device) -> None:
        self.name = name
        self.module = module
        self.runtimes = runtimes
        self.device = device
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        runtime = self.runtimes[min(self.calls, len(self.runtimes) - 1)]
        self.calls += 1
        meta = runtime.meta
        args, kwargs = region_inputs(self.module, args, kwargs)
        constants = constants_in((args, kwargs))
        if constants != meta['constants']:
            raise PTQError(
                f'{self.name} was exported as it is called with {meta["constants"]}, and is called with {constants}; '
                'such a detector cannot run in a runtime.'
            )
        tensors = zip(tensors_in((args, kwargs)), meta['inputs'], strict=True)
        inputs = [_rows(tensor.detach().cpu(), len(shape)).numpy() for tensor, shape in tensors]
        if len(inputs[0]):
            found = [runtime(*given) for given in self._calls(inputs, meta)]
            flat = [torch.from_numpy(np.concatenate(outputs)) for outputs in zip(*found, strict=True)]
        else:  # no runtime takes so few
            flat = [torch.zeros(0, *shape) for shape in meta['raw_shapes']]
        return nest_outputs([output.to(self.device) for output in flat], meta['outputs'])

    def _calls(self, inputs: list[np.ndarray], meta: dict) -> Iterable[Sequence[np.ndarray]]:
        """What the network is given, once where it takes any number of regions, otherwise image by image."""
        if meta['dynamic_batch']:
            return [inputs]
        images = max(1, len(inputs[0]) // meta['inputs'][0][0])
        shapes = [[len(given) / images, *given.shape[1:]] for given in inputs]
        if shapes != meta['inputs']:
            raise PTQError(
                f'{self.name} was exported for inputs of {meta["inputs"]}, and is given {shapes}; such a detector '
                'cannot run in a runtime.'
            )
        return zip(*(np.split(given, images) for given in inputs), strict=True)


def _rows(tensor: Tensor, dimensions: int) -> Tensor:
    """As many dimensions as were exported: some heads take regions as rows, and as rows of each image."""
    return tensor.flatten(0, max(0, tensor.ndim - dimensions)).contiguous()


def _no_proposals(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``predict`` of a head whose proposals stay inside of the model."""


class _Detections(_Network):
    """Stands in for the head's ``predict`` where the model decodes itself."""

    def __init__(self, runtime: Runtime, device: torch.device, clips: bool) -> None:
        super().__init__(runtime, device)
        self.clips = clips

    def __call__(self, image: Tensor, batch_data_samples: list, rescale: bool = False) -> list[InstanceData]:
        samples = [sample.metainfo for sample in batch_data_samples]
        # models of older versions know the padded size only
        sizes = [image.new_tensor([meta['img_shape'][:2] for meta in samples])] if 'inputs' in self.runtime.meta else []
        found = zip(*self.outputs(image, *sizes), samples, strict=True)
        return [self._instances(*values, meta=meta, rescale=rescale) for *values, meta in found]

    def _instances(self, boxes: Tensor, scores: Tensor, labels: Tensor, meta: dict, rescale: bool) -> InstanceData:
        real = labels >= 0
        boxes = boxes[real]
        if self.clips:
            # of a model that knows the padded size only
            height, width = meta['img_shape'][:2]
            boxes = torch.minimum(boxes, boxes.new_tensor([width, height] * 2))
        if rescale:
            boxes = boxes / boxes.new_tensor(meta['scale_factor']).repeat(2)
        return InstanceData(bboxes=boxes, scores=scores[real], labels=labels[real])


class _RegionDetections(_Detections):
    """Stands in for ``predict`` of a RoI head; mmdet draws the masks."""

    def __init__(self, runtime: Runtime, device: torch.device, roi_head: nn.Module) -> None:
        super().__init__(runtime, device, clips=False)
        self.test_cfg, self.mask_head = roi_head.test_cfg, None
        if roi_head.with_mask:
            head = roi_head.mask_head
            self.mask_head = head[-1] if isinstance(head, nn.ModuleList) else head
            # the model gives those of each detection's class
            self.mask_head.class_agnostic = True

    def __call__(
        self, image: Tensor, proposals: None, batch_data_samples: list, rescale: bool = False
    ) -> list[InstanceData]:
        return super().__call__(image, batch_data_samples, rescale)

    def _instances(
        self, boxes: Tensor, scores: Tensor, labels: Tensor, *masks: Tensor, meta: dict, rescale: bool
    ) -> InstanceData:
        if self.mask_head is None:
            return super()._instances(boxes, scores, labels, meta=meta, rescale=rescale)
        found = super()._instances(boxes, scores, labels, meta=meta, rescale=False)
        drawn = masks[0][labels >= 0][:, None]
        # boxes are rescaled there, too
        (found,) = self.mask_head.predict_by_feat([drawn], [found], [meta], self.test_cfg, rescale, activate_map=True)
        return found
