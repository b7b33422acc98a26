"""Two-stage DETRs: the quantized decoder answers for the queries that the float encoder chose.

Their encoder scores every position and hands the best ones to the decoder, in the order of their scores. Quantization
changes the order, and then the i-th outputs of both detectors are of different objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmdet_ptq.predictions.dispatch import announce


def chooses_queries(detector: nn.Module) -> bool:
    """Returns whether the decoder's queries are positions that the encoder chose (Deformable DETR, DINO, ...)."""
    return getattr(detector, 'as_two_stage', False) is True


@contextmanager
def chosen_queries(
    model: nn.Module, given: list[Tensor] | None, own: list[Tensor] | None = None
) -> Iterator[list[Tensor]]:
    """Collects the indices that a forward pass chooses by ``torch.topk``; puts the given ones in their place, if any.

    Args:
        model: A detector that :func:`chooses_queries`.
        given: What another detector chose, choice after choice.
        own: Takes what the pass would have chosen itself, if given. Defaults to None.
    """
    choices = _Choices(given, [] if own is None else own)
    with choices:
        yield choices.seen
    if not choices.seen:
        announce(
            f'{type(model).__name__} chooses its queries in another way than by their scores, so outputs of the '
            'float and the quantized detector may belong to different queries.'
        )


class _Choices(TorchFunctionMode):
    def __init__(self, given: list[Tensor] | None, own: list[Tensor]) -> None:
        super().__init__()
        self.given = given
        self.own = own
        self.seen: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func not in (torch.topk, Tensor.topk):
            return out
        self.own.append(out.indices)
        if self.given:
            values = args[0] if args else kwargs['input']
            dim = args[2] if len(args) > 2 else kwargs.get('dim', -1)
            indices = self.given[len(self.seen)]
            out = torch.return_types.topk((values.gather(dim, indices), indices))
        self.seen.append(out.indices)
        return out
