"""Which batch normalisations the convolutions before them can take over."""

from __future__ import annotations

from collections import Counter, defaultdict

from torch import nn

from mmdet_ptq.wrapping.watching.layers import is_plain
from mmdet_ptq.wrapping.watching.probe import Probe


def find_folds(detector: nn.Module, probe: Probe) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Chooses which normalisations can be folded.

    A pair is folded when the convolution feeds this normalisation in every call, nothing else reads it or what the two
    hold, both do no more than their base classes in torch, and the convolution computes with its own weight as it is
    stored. A convolution shared by several normalisations (RTMDet's SepBN head, NAS-FPN, FPG) keeps them: folding would
    need one weight per normalisation. So does one that standardises its weight (DetectoRS): the folded gain would be
    normalised away.

    Args:
        detector: The float detector, in eval mode.
        probe: What a pass of the detector showed.

    Returns:
        The (convolution, normalisation) names to fold, and the normalisations that stay with the reason for each.
    """
    norms_of, convs_of = defaultdict(set), defaultdict(set)
    for conv, norm in probe.norms:
        norms_of[conv].add(norm)
        convs_of[norm].add(conv)
    modules, owners = dict(detector.named_modules()), _owners(detector)
    folds, kept = [], {}
    for name, module in modules.items():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if len(convs_of[name]) != 1:
            kept[name] = 'no single convolution feeds it, and nothing else'
            continue
        conv = next(iter(convs_of[name]))
        parameters = modules[conv]._parameters
        weight = parameters.get('weight')
        # a weight changes in place, for all who hold it; a bias is replaced
        shared = [
            part
            for part, tensor in parameters.items()
            if id(tensor) in probe.borrowed or (tensor is weight and owners[id(tensor)] > 1)
        ]
        odd = next((part for part in (conv, name) if not is_plain(modules[part])), None)
        if len(norms_of[conv]) != 1:
            kept[name] = f'its convolution {conv} is shared by several normalisations'
        elif module.running_mean is None:
            kept[name] = 'it has no running statistics'
        elif conv not in probe.direct or weight is None:
            kept[name] = f'its convolution {conv} transforms its weight in the forward pass'
        elif shared:
            kept[name] = f'something else reads the {shared[0]} of its convolution {conv}'
        elif any(id(tensor) in probe.borrowed for tensor in (*module._parameters.values(), *module._buffers.values())):
            kept[name] = 'something else reads its parameters or statistics'
        elif odd is not None:
            kept[name] = f'{odd} ({type(modules[odd]).__name__}) has a forward or hooks of its own'
        else:
            folds.append((conv, name))
    return folds, kept


def _owners(detector: nn.Module) -> Counter[int]:
    """How many modules hold each parameter, by its id."""
    return Counter(id(parameter) for module in detector.modules() for parameter in module._parameters.values())
