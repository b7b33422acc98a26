"""torch's attention as layers that can be quantized: the same outputs, with every mask that torch takes."""

from __future__ import annotations

import copy

import architectures
import pytest
import torch
from torch import nn

from mmdet_ptq.errors import PTQError
from mmdet_ptq.testing import predict, tiny_batch, tiny_detector, tiny_quantized
from mmdet_ptq.wrapping import apply_structure
from mmdet_ptq.wrapping.watching.attention import OpenAttention, closed_attentions, open_attentions, opened_attentions


def inputs(batch_first=False, key_width=16):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 5, 16), torch.randn(3, 7, key_width), torch.randn(3, 7, key_width)
    return tuple(x if batch_first else x.transpose(0, 1) for x in (query, key, value))


@torch.no_grad()
@pytest.mark.parametrize('batch_first', [False, True])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('key_width', [16, 8])
def test_outputs_are_those_of_torch(batch_first, bias, key_width):
    attention = nn.MultiheadAttention(16, 4, bias=bias, batch_first=batch_first, kdim=key_width, vdim=key_width).eval()
    for parameter in attention.parameters():
        parameter.normal_()
    mine = OpenAttention(attention)
    given = inputs(batch_first, key_width)
    none = torch.zeros(3, 7, dtype=torch.bool)
    none[:, 5:] = True
    for masks in (
        dict(),
        dict(key_padding_mask=none),
        dict(attn_mask=torch.rand(5, 7) > 0.7),
        dict(attn_mask=torch.randn(5, 7)),
        dict(attn_mask=torch.rand(12, 5, 7) > 0.7),
        dict(key_padding_mask=none, attn_mask=torch.rand(12, 5, 7) > 0.9),
        dict(average_attn_weights=False),
    ):
        for ours, theirs in zip(mine(*given, **masks), attention(*given, **masks), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert mine(*given, need_weights=False)[1] is None


@torch.no_grad()
@pytest.mark.parametrize('batch_first', [False, True])
def test_one_sequence_without_a_batch(batch_first):
    attention = nn.MultiheadAttention(16, 4, batch_first=batch_first).eval()
    query, key = torch.randn(5, 16), torch.randn(7, 16)
    none = torch.tensor([False] * 5 + [True] * 2)
    for masks in (dict(key_padding_mask=none), dict(attn_mask=torch.rand(5, 7) > 0.7), dict(need_weights=False)):
        mine = OpenAttention(attention)(query, key, key, **masks)
        for ours, theirs in zip(mine, attention(query, key, key, **masks), strict=True):
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert mine[1] is None or 'need_weights' not in masks


def test_an_attention_in_two_places_stays_one():
    shared = nn.MultiheadAttention(8, 2)
    net = nn.ModuleDict(dict(first=nn.ModuleList([shared]), second=shared))
    open_attentions(net, closed_attentions(net))
    assert isinstance(net['second'], OpenAttention) and net['first'][0] is net['second']
    net = nn.ModuleDict(dict(first=nn.ModuleList([shared]), second=shared))
    with opened_attentions(net):
        assert net['first'][0] is net['second'] is not shared
    assert net['first'][0] is net['second'] is shared


def test_gradients_are_those_of_torch():
    attention = nn.MultiheadAttention(16, 4).eval()
    mine = OpenAttention(attention)
    query, key, value = inputs()
    for module in (attention, mine):
        module(query, key, value)[0].square().sum().backward()
    theirs = attention.in_proj_weight.grad.chunk(3)
    for layer, grad in zip((mine.q_proj, mine.k_proj, mine.v_proj), theirs, strict=True):
        torch.testing.assert_close(layer.weight.grad, grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mine.out_proj.weight.grad, attention.out_proj.weight.grad, atol=1e-4, rtol=1e-4)


def test_what_options_add_stays_closed():
    class Own(nn.MultiheadAttention):
        pass

    net = nn.ModuleDict(
        dict(
            plain=nn.MultiheadAttention(8, 2),
            biased=nn.MultiheadAttention(8, 2, add_bias_kv=True),
            zero=nn.MultiheadAttention(8, 2, add_zero_attn=True),
            own=Own(8, 2),
        )
    )
    assert closed_attentions(net) == ['plain']
    with opened_attentions(net):
        assert isinstance(net['plain'], OpenAttention) and closed_attentions(net) == []
    assert type(net['plain']) is nn.MultiheadAttention
    with pytest.raises(PTQError, match="no attention 'own'"):
        open_attentions(net, ['own'])
    with pytest.raises(PTQError, match="no attention 'lost'"):
        open_attentions(net, ['lost'])


def test_projections_compute_in_integers_and_are_built_again(monkeypatch):
    architectures.register(monkeypatch)
    detector, structure = tiny_quantized('deformable_detr')
    names = structure.attentions
    assert names == [f'decoder.layers.{i}.self_attn.attn' for i in (0, 1)]
    integer = {layer.name for layer in structure.layers if layer.integer}
    assert {f'{name}.{part}_proj' for name in names for part in ('q', 'k', 'v', 'out')} <= integer
    again = tiny_detector('deformable_detr')
    apply_structure(again, copy.deepcopy(structure))
    again.load_state_dict(detector.state_dict())
    again.eval()
    ours, theirs = (predict(d, tiny_batch(1))[0].pred_instances for d in (detector, again))
    assert torch.equal(ours.scores, theirs.scores) and torch.equal(ours.bboxes, theirs.bboxes)
