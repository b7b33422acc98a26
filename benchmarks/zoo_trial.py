"""One architecture of mmdet through everything: quantized, reloaded, trained for a step, exported, compared.

python benchmarks/zoo_trial.py retinanet/retinanet_r18_fpn_1x_coco.py

Weights are random, and so are the images. What is shown is that the integers of each runtime are those that were
simulated, whatever they detect.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from mmcv.ops import DeformConv2d, ModulatedDeformConv2d, SAConv2d
from mmdet.models import MobileNetV2, ResNet, TwoStageDetector
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.structures import InstanceData
from torch import Tensor, nn
from zoo_architectures import without_folders, zoo_config

from mmdet_ptq import load_quantized, quantize
from mmdet_ptq.deploy import build_detector, get_runtime, integer_arithmetic, open_model, read_quantized
from mmdet_ptq.deploy.agreement import TensorAgreement, compare_layer_inputs
from mmdet_ptq.deploy.network.parts import Part, part_path, parts_of
from mmdet_ptq.deploy.network.raw_outputs import RawOutputs
from mmdet_ptq.deploy.onnxruntime.compare import compare_codes
from mmdet_ptq.deploy.openvino.layer_inputs import openvino_choices, openvino_inputs
from mmdet_ptq.errors import PTQError
from mmdet_ptq.predictions import check_raw_outputs
from mmdet_ptq.predictions.queries import chooses_queries
from mmdet_ptq.testing.detectors import randomise
from mmdet_ptq.wrapping import integer_mac_share
from mmdet_ptq.wrapping.state import only_read_tensors
from mmdet_ptq.wrapping.structure import Structure

# the first that the detector takes
SIZES = ((160, 192), (256, 256), (320, 320), (512, 512))
RUNTIMES = ('onnxruntime', 'openvino')
# what bounds the work behind the network: regions, and detections that are read for masks
FEW = dict(max_per_img=20, nms_pre=200, max_per_image=20, num_proposals=20)
# what repeats the same layers
FEW_LAYERS = dict(num_layers=2, depths=2, stacked_convs=1, num_blocks=1, num_modules=1, stage_blocks=1, num_stacks=1)
# widths that no other part of a config has to agree with, in most of them
NARROW = dict(feat_channels=64, fc_out_channels=64, feedforward_channels=128)
BASE = 16  # channels of the first stage of ResNet and its kin, 64 as they are published
_BLOCKS = (2, 1, 1, 1)
PTQ = dict(
    # as the presets do it, but random weights and ranges of two images are not worth a search
    weights=dict(observer=dict(type='mmdet_ptq.MinMaxObserver')),
    activations=dict(observer=dict(type='mmdet_ptq.MinMaxObserver')),
    global_loss=dict(iters=1, batch_size=1, holdout=0, val_interval=1, checkpoint_interval=1, log_interval=1),
    # the finest of what runtimes take; OpenVINO leaves out what it does not
    dataflow='auto',
)
# equal: so many codes of the worst tensor, each from the same codes, and so close outputs
CODES, DECIBEL = 0.99, 20.0


def zoo_batch(detector: nn.Module, size: tuple[int, int], seed: int) -> dict:
    """One image of coarse blocks and fine noise, as mmdet's dataloaders yield it to a detector."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 200, (1, 3, 8, 8), generator=generator).float()
    image = torch.nn.functional.interpolate(coarse, size)[0]
    image = (image + torch.randint(0, 56, (3, *size), generator=generator)).to(torch.uint8)
    meta = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), size)
    meta |= dict(scale_factor=(1.0, 1.0), img_id=seed, border=(0, size[0], 0, size[1]))
    sample = DetDataSample(metainfo=meta)
    if isinstance(detector, TwoStageDetector) and not detector.with_rpn:  # Fast R-CNN is given its regions
        sample.proposals = InstanceData(bboxes=torch.tensor([[10.0, 20.0, 90.0, 120.0], [40.0, 10.0, 150.0, 80.0]]))
    return dict(inputs=[image], data_samples=[sample])


def reduced(value: object, bounds: dict[str, int] = FEW | FEW_LAYERS) -> None:
    """Bounds proposals, detections and repeated layers of a model's config, in place."""
    if isinstance(value, dict):
        for key, most in bounds.items():
            if isinstance(value.get(key), int):
                value[key] = min(value[key], most)
            elif isinstance(value.get(key), list | tuple) and all(isinstance(item, int) for item in value[key]):
                value[key] = type(value[key])(min(item, most) for item in value[key])
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            reduced(item, bounds)


def few_refinements(model: dict) -> None:
    """Two of the stages that refine boxes one after the other, in place."""
    head = model.get('roi_head') or {}
    if isinstance(head.get('num_stages'), int):
        head['num_stages'] = min(2, head['num_stages'])
        settings = (model.get('train_cfg') or {}, model.get('test_cfg') or {})
        lists = [(head, key) for key in ('bbox_head', 'mask_head', 'stage_loss_weights')]
        for owner, key in lists + [(owner, 'rcnn') for owner in settings]:
            if isinstance(owner.get(key), list | tuple):
                owner[key] = owner[key][: head['num_stages']]


def narrow_backbone(model: dict) -> None:
    """A quarter of the channels in ResNet and its kin, and in what the neck reads of them, in place."""
    backbone, neck = model.get('backbone', {}), model.get('neck')
    neck = neck[0] if isinstance(neck, list) else neck
    kind = MODELS.get(backbone.get('type')) if isinstance(backbone.get('type'), str) else backbone.get('type')
    if neck and kind is not None and issubclass(kind, ResNet) and isinstance(neck.get('in_channels'), list):
        factor = backbone.get('base_channels', 64) // BASE
        backbone['base_channels'] = BASE
        neck['in_channels'] = [channels // factor for channels in neck['in_channels']]


def with_random_weights(detector: nn.Module) -> tuple[int, int]:
    """Gives a detector weights with which it predicts, in place; the size that it takes."""
    detector.eval()
    detector.init_weights()  # some allocate parameters without values
    randomise(detector, lambda: damp_refinements(detector) or first_size(detector))
    return first_size(detector)


def smallest(config: Config) -> tuple[Config, nn.Module, tuple[int, int]]:
    """The narrowest detector of an architecture that builds and predicts, its config and the size that it takes.

    Raises:
        Exception: None does; as the detector's own code says it.
    """
    few = FEW | FEW_LAYERS
    for narrow, bounds in ((True, few | NARROW), (False, few | NARROW), (False, few), (False, FEW)):
        tried = copy.deepcopy(config)
        reduced(tried['model'], bounds)
        few_refinements(tried['model'])
        if narrow:
            narrow_backbone(tried['model'])
        try:
            detector = build_detector(tried)
            return tried, detector, with_random_weights(detector)
        except Exception as error:
            why = error
    raise why


def shallow_stages() -> None:
    """Few blocks in each stage of ResNet and its kin, and of MobileNetV2, for this process."""
    for name in list(MODELS.module_dict):
        settings = getattr(MODELS.module_dict[name], 'arch_settings', None)
        if isinstance(settings, dict):
            for depth, (block, *stages) in [(d, s) for d, s in settings.items() if isinstance(s, tuple)]:
                if stages and isinstance(stages[0], tuple) and all(isinstance(n, int) for n in stages[0]):
                    settings[depth] = (block, tuple(min(most, n) for most, n in zip(_BLOCKS, stages[0], strict=False)))
    # rows of expansion, channels, blocks and stride
    MobileNetV2.arch_settings = [[*row[:2], min(2, row[2]), *row[3:]] for row in MobileNetV2.arch_settings]


def damp_refinements(detector: nn.Module) -> None:
    """Stages that refine boxes again and again do it by little, as trained ones: else boxes grow without bounds."""
    for name, module in detector.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition('.')[2] == 'fc_reg':
            with torch.no_grad():
                module.weight.mul_(0.05)


def first_size(detector: nn.Module) -> tuple[int, int]:
    """The first of the sizes that the detector predicts on.

    Raises:
        RuntimeError: It takes none of them; as its own code says it.
    """
    # of one image, a map may have a single value: too few for the statistics of a normalisation
    for images, size in itertools.product((1, 2), SIZES):
        batches = [zoo_batch(detector, size, seed) for seed in range(images)]
        try:
            _predict(detector, {key: [item for batch in batches for item in batch[key]] for key in batches[0]})
            return size
        except (RuntimeError, AssertionError, ValueError, IndexError) as error:
            why = error
    raise why


@torch.no_grad()
def _predict(detector: nn.Module, batch: dict) -> list:
    return detector(**detector.data_preprocessor(copy.deepcopy(batch), False), mode='predict')


def trial(name: str, folder: Path, runtimes: Sequence[str] = RUNTIMES) -> dict:
    """Runs one architecture.

    Args:
        name: The config, relative to mmdet's folder.
        folder: Takes what is written.
        runtimes: To which it is exported.

    Returns:
        What was found; ``reason`` fields are one sentence, '' where nothing failed.
    """
    start = time.process_time()
    torch.manual_seed(0)
    shallow_stages()
    found = dict(config=name)
    try:
        config, detector, size = smallest(Config(dict(model=zoo_config(name)['model'], default_scope='mmdet')))
    except Exception as error:
        return dict(found, predicts=_sentence(error))
    found |= dict(predicts='', size='x'.join(map(str, size)))
    ptq, preset = dict(PTQ), 'w8a8'
    try:
        check_raw_outputs(detector)
    except PTQError as error:
        found['global_loss'] = str(error)
        preset = 'w8a8_observe'
        ptq.pop('global_loss')
    images = [zoo_batch(detector, size, seed) for seed in (1, 2)]
    detector.cfg = copy.deepcopy(config)
    try:
        quantized = _quiet(lambda: quantize(detector, images, preset, ptq=ptq, work_dir=str(folder)))
    except Exception as error:
        return dict(found, quantized=_sentence(error), seconds=round(time.process_time() - start))
    path = folder / 'quantized.pth'
    state = read_quantized(path)
    found |= dict(quantized='', integer_mac_share=round(integer_mac_share(Structure.from_dict(state['structure'])), 4))
    found.setdefault('global_loss', '')
    found['reloaded'] = _tried(lambda: _reloaded(quantized, path, config, images[0]))
    image = quantized.data_preprocessor(copy.deepcopy(images[0]), False)['inputs']
    for runtime in runtimes:
        found |= {f'{runtime}_{key}': value for key, value in _exported(quantized, runtime, folder, image).items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return dict(found, seconds=round(time.process_time() - start), peak_gib=round(peak, 2))


def _reloaded(quantized: nn.Module, path: Path, config: Config, batch: dict) -> str:
    again = load_quantized(path, config)
    mine, theirs = (_flat(_predict(detector, batch)) for detector in (quantized, again))
    same = len(mine) == len(theirs) and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    return '' if same else 'predicts otherwise'


def _flat(samples: list) -> list[Tensor]:
    found = []
    for sample in samples:
        for key in ('pred_instances', 'pred_panoptic_seg'):
            fields = getattr(sample, key, {})
            found += [torch.as_tensor(np.asarray(v)) for _, v in sorted(fields.items()) if not hasattr(v, 'tensor')]
    return found


def _exported(quantized: nn.Module, name: str, folder: Path, image: Tensor) -> dict:
    """One runtime's columns."""
    runtime = get_runtime(name)
    try:
        runtime.check_detector(quantized)
        path = _quiet(lambda: runtime.export(copy.deepcopy(quantized), folder / name, tuple(image.shape)))
        model = open_model(path, threads=1)
        coverage = model.whole_coverage()
        layers = f'{len(coverage.integer)} of {len(coverage.integer) + len(coverage.float)}'
        codes, outputs, beside = _compared(quantized, name, path, model, image)
    except Exception as error:
        return dict(state='refused' if isinstance(error, PTQError) else 'failed', reason=_sentence(error))
    equal = outputs >= DECIBEL and (codes is None or codes >= CODES)
    return dict(
        state='equal' if equal else 'differs',
        layers=layers,
        codes='' if codes is None else round(codes, 5),
        decibel=round(outputs, 1),
        reason='',
        **{key: round(value, 1) for key, value in beside.items()},
    )


def _followed(quantized: nn.Module, path: Path, image: Tensor, outputs: list[Tensor]) -> list[TensorAgreement] | None:
    """What layers read in OpenVINO; None, and the outputs as they are, where it fuses otherwise while it is watched."""
    parts, inputs = parts_of(quantized, image), {}
    try:
        for part in parts:
            inputs |= openvino_inputs(part_path(path, part.name) if part.name else path, *part.inputs)
    except PTQError as error:
        if 'computes other outputs' not in str(error):
            raise
        with only_read_tensors(quantized):
            for part in parts:
                outputs += RawOutputs(quantized, part)(*part.inputs)
        return None
    choices = openvino_choices(path, image) if chooses_queries(quantized) else None
    return compare_layer_inputs(quantized, inputs, image, True, only_read_tensors, outputs, choices)


@torch.no_grad()
def _compared(
    quantized: nn.Module, name: str, path: Path, model: Callable, image: Tensor
) -> tuple[float | None, float, dict[str, float]]:
    """The share of the worst tensor's codes that are the simulation's, and signal to noise of the worst raw output.

    ONNX Runtime is compared as it is evaluated, from the image to the outputs. In OpenVINO float arithmetic is not the
    simulation's to the last bit, and random weights make much of single codes: there the simulation goes on with what
    each layer of the runtime read, and with the queries that its encoder chose. Single codes change the order of such
    queries: outputs are compared in the order of their values, and in ONNX Runtime codes on the mean of all tensors.

    Where outputs in ONNX Runtime are not near from the image on, there is more beside them: the noise where the
    simulation goes on with the codes of each of its tensors (``followed``; outputs of the session whose tensors are
    read), and how near the simulation is to itself when no more than last bits of float results change (``itself``).
    """
    parts, ours, followed = parts_of(quantized, image), [], []
    theirs = [out for p in parts for out in (model.parts[p.name] if p.name else model)(*(x.numpy() for x in p.inputs))]
    theirs, chosen = [torch.from_numpy(out) for out in theirs], chooses_queries(quantized)
    if name == 'onnxruntime':
        found = compare_codes(quantized, path, image, follow=True, outputs=followed)
        with integer_arithmetic(quantized):
            ours = _simulated(quantized, parts)
    else:
        found = _followed(quantized, path, image, ours)
    worst, beside = _worst_noise(ours, theirs, chosen), {}
    if followed and worst < DECIBEL and not chosen:
        with integer_arithmetic(quantized), other_last_bits(quantized):
            beside = dict(itself=_worst_noise(ours, _simulated(quantized, parts), chosen))
        beside['followed'] = _worst_noise(*zip(*followed, strict=True), chosen)
    if found is None:
        return None, worst, beside
    shares = [entry.identical for entry in found] or [0.0]
    return (sum(shares) / len(shares) if chosen and name == 'onnxruntime' else min(shares)), worst, beside


def _simulated(quantized: nn.Module, parts: list[Part]) -> list[Tensor]:
    return [output for part in parts for output in RawOutputs(quantized, part)(*part.inputs)]


def _worst_noise(ours: Sequence[Tensor], theirs: Sequence[Tensor], in_order: bool) -> float:
    """Signal to noise of the worst of some outputs, in decibel; in the order of their values if these have no other."""
    worst = 200.0
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.double(), b.double()
        if in_order:
            a, b = a.sort(1).values, b.sort(1).values
        noise, signal = float((a - b).square().mean()), float((a - a.mean()).square().mean())
        if noise:
            worst = min(worst, 10 * np.log10(max(signal, 1e-30) / noise))
    return worst


@contextmanager
def other_last_bits(detector: nn.Module) -> Iterator[None]:
    """What computes in float returns numbers whose last bit may be another: no two programs sum up alike."""
    generator = torch.Generator().manual_seed(0)

    def changed(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        steps = torch.randint(-1, 2, output.shape, generator=generator)
        return output * (1 + steps * (torch.finfo(output.dtype).eps / 2))

    with ExitStack() as stack:
        for module in detector.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm | DeformConv2d | ModulatedDeformConv2d | SAConv2d):
                stack.callback(module.register_forward_hook(changed).remove)
        yield


def _tried(work: Callable[[], str]) -> str:
    try:
        return _quiet(work)
    except Exception as error:
        return _sentence(error)


def _quiet(work: Callable) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return work()


def _sentence(error: Exception) -> str:
    said = without_folders(' '.join(str(error).split()))[:240]
    return said if isinstance(error, PTQError) else f'{type(error).__name__}: {said}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help="relative to mmdet's configs")
    parser.add_argument('--work-dir', type=Path, help='keeps what is written')
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        found = trial(args.config, args.work_dir or Path(temporary))
    sys.stdout.flush()
    print(json.dumps(found))


if __name__ == '__main__':
    main()
