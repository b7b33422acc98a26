"""torch's attention as layers: its projections run inside one fused function, where nothing can be quantized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from mmdet_ptq.errors import PTQError


class OpenAttention(nn.Module):
    """The same as an ``nn.MultiheadAttention``, with a linear layer for each projection.

    Its products of activations are written out, too. Rounding apart, the outputs are the same.

    Args:
        attention: What it replaces; its weights are copied.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.dropout = attention.dropout
        self.batch_first = attention.batch_first
        if attention.in_proj_weight is not None:
            weights = attention.in_proj_weight.chunk(3)
        else:  # keys and values of other widths
            weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``nn.MultiheadAttention``; a causal mask must be given as such, as torch wants it, too."""
        if query.dim() == 2:  # no batch: its place is the second, or the first
            places = [x.unsqueeze(0 if self.batch_first else 1) for x in (query, key, value)]
            padding = None if key_padding_mask is None else key_padding_mask[None]
            found, weights = self(*places, padding, need_weights, attn_mask, average_attn_weights, is_causal)
            return found.squeeze(0 if self.batch_first else 1), None if weights is None else weights[0]
        queries, keys, values = (
            self._heads(project(x)) for project, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        scores = queries @ keys.transpose(-2, -1) * queries.shape[-1] ** -0.5
        if attn_mask is not None:
            attn_mask = _additive(attn_mask, scores)
            # one for all, or one for each head of each image
            scores = scores + (attn_mask.view_as(scores) if attn_mask.dim() == 3 else attn_mask)
        if key_padding_mask is not None:
            scores = scores + _additive(key_padding_mask, scores)[:, None, None]
        weights = scores.softmax(-1)
        found = functional.dropout(weights, self.dropout, self.training) @ values
        found = found.transpose(1, 2).flatten(2)
        found = self.out_proj(found if self.batch_first else found.transpose(0, 1))
        if not need_weights:
            return found, None
        return found, weights.mean(1) if average_attn_weights else weights

    def _heads(self, x: Tensor) -> Tensor:
        """(N, heads, L, channels) of (N, L, C), or of (L, N, C)."""
        x = x if self.batch_first else x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device='meta')
    layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return layer


def _additive(mask: Tensor, scores: Tensor) -> Tensor:
    """A mask as numbers that are added: True forbids a place."""
    if mask.dtype != torch.bool:
        return mask.to(scores.dtype)
    return scores.new_zeros(mask.shape).masked_fill(mask, float('-inf'))


def closed_attentions(detector: nn.Module) -> list[str]:
    """Paths of the attentions that can be opened: torch's own, without what only some of its options add."""
    return [name for name, module in detector.named_modules() if _can_open(module)]


def _can_open(module: nn.Module) -> bool:
    return (
        type(module) is nn.MultiheadAttention
        and module.bias_k is None
        and not module.add_zero_attn
        and not any(parametrize.is_parametrized(part) for part in (module, module.out_proj))
        and not (module._forward_pre_hooks or module._forward_hooks)
    )


def open_attentions(detector: nn.Module, names: Iterable[str]) -> None:
    """Replaces attentions by layers, in place and wherever they stand; what is open already stays.

    Args:
        detector: The detector.
        names: Their paths.

    Raises:
        PTQError: There is no attention of that name.
    """
    names = list(names)
    for name in names:
        try:
            module = detector.get_submodule(name)
        except AttributeError:
            module = None
        if isinstance(module, OpenAttention):
            continue
        if module is None or not _can_open(module):
            raise PTQError(
                f'the detector has no attention {name[:100]!r}, which the quantized checkpoint names; '
                'use the config the checkpoint was made with.'
            )
        _replace(detector, module, OpenAttention(module))
    if names:
        print_log(f'the projections of {len(names)} attentions became linear layers', 'current')


@contextmanager
def opened_attentions(detector: nn.Module) -> Iterator[None]:
    """Its attentions are open for a while."""
    closed = {name: detector.get_submodule(name) for name in closed_attentions(detector)}
    open_attentions(detector, closed)
    try:
        yield
    finally:
        for name, module in closed.items():
            _replace(detector, detector.get_submodule(name), module)


def _replace(detector: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module in the place of another, under every name that leads to it."""
    places = [name for name, module in detector.named_modules(remove_duplicate=False) if module is old]
    for parent, _, child in (name.rpartition('.') for name in places):
        setattr(detector.get_submodule(parent), child, new)
