import pytest
import torch
from mmdet.models.dense_heads import RetinaHead

from mmdet_ptq.errors import PTQError
from mmdet_ptq.predictions import AlignedPredictions, align_head, dispatch


@pytest.fixture
def messages(monkeypatch):
    seen = []
    monkeypatch.setattr(dispatch, 'print_log', lambda text, **kwargs: seen.append(text))
    dispatch.announce.cache_clear()
    yield seen
    dispatch.announce.cache_clear()


class SameDecoding(RetinaHead):
    def loss_by_feat(self, *args, **kwargs):
        raise NotImplementedError


class OwnDecoding(RetinaHead):
    def _predict_by_feat_single(self, *args, **kwargs):
        raise NotImplementedError


def outputs_of(head):
    return head([torch.randn(1, 8, 4, 4) for _ in range(5)])


def test_an_unknown_head_falls_back_and_says_so_once(messages):

    class Unheard:
        pass

    outputs = {'scores': [torch.ones(2, 3)], 'boxes': (torch.zeros(2, 4), torch.tensor([1]))}
    for _ in range(2):
        aligned = align_head(Unheard(), outputs, [{}])
    assert [t.shape for t in aligned.raw] == [(2, 3), (2, 4)]
    assert aligned.cls_logits is None
    assert len(messages) == 1
    assert 'Unheard' in messages[0] and 'align_head.register(Unheard)' in messages[0]


def test_a_subclass_that_decodes_as_its_parent_is_aligned(messages):
    head = SameDecoding(3, 8, feat_channels=8, stacked_convs=1).eval()
    assert align_head(head, outputs_of(head), [{}]).raw is None
    assert not messages


def test_a_subclass_that_redefines_decoding_is_not(messages):
    head = OwnDecoding(3, 8, feat_channels=8, stacked_convs=1).eval()
    assert align_head(head, outputs_of(head), [{}]).raw is not None
    assert 'OwnDecoding' in messages[0] and '_predict_by_feat_single' in messages[0]


def test_a_user_registers_an_adapter():

    class Taught:
        pass

    @align_head.register(Taught)
    def align_taught(head, outputs, batch_img_metas):
        return AlignedPredictions(cls_logits=outputs, level_sizes=(outputs.shape[1],))

    logits = torch.zeros(1, 4, 2)
    assert align_head(Taught(), logits, [{}]).cls_logits is logits


def test_training_mode_is_refused():
    head = RetinaHead(3, 8, feat_channels=8, stacked_convs=1)
    with pytest.raises(PTQError, match='eval'):
        align_head(head, outputs_of(head), [{}])
