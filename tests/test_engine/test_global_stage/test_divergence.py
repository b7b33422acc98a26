from __future__ import annotations

import math

import pytest

from mmdet_ptq import PTQError
from mmdet_ptq.engine.global_stage.divergence import check_divergence, mean_loss


def test_a_loss_that_explodes_is_refused_and_a_worse_one_is_told(monkeypatch):
    told = []
    monkeypatch.setattr('mmdet_ptq.engine.global_stage.divergence.print_log', lambda text, *_, **__: told.append(text))
    assert mean_loss(float, ['1', '3']) == 2
    check_divergence(0.9, 0.8)
    assert not told
    check_divergence(0.9, 1.2)
    assert 'was 0.9 before the global stage and is 1.2 after it' in told[0]
    for after in (14.8, 4.6e29, math.inf, math.nan):
        with pytest.raises(PTQError, match='training diverged'):
            check_divergence(0.9, after)
