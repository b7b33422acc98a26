import pytest
import torch

from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers import (
    AffineQuantizer,
    LogAffineQuantizer,
    build_quantizer,
    fit_best,
    resolve_auto,
    weight_error,
)

AUTO = dict(type='LogAffineQuantizer', bits=4, num_channels=4, mode='auto')


def test_auto_follows_the_distribution():
    torch.manual_seed(0)
    laplace, uniform = torch.distributions.Laplace(0.0, 1.0).sample((4, 2000)), torch.rand(4, 2000) * 2 - 1
    log = resolve_auto(AUTO, laplace)
    assert isinstance(log, LogAffineQuantizer) and log.mode == 'log1p'
    assert isinstance(resolve_auto(AUTO, uniform), AffineQuantizer)
    with pytest.raises(PTQError, match="mode='auto'"):
        resolve_auto({**AUTO, 'mode': 'log1p'}, laplace)


def test_fit_best_takes_the_least_error_and_the_first_of_equals():
    w = torch.randn(4, 200)
    few, many, same = (AffineQuantizer(b, True, 4, 0) for b in (3, 6, 6))
    assert fit_best([few, many, same], w) is many
    assert weight_error(many, w) < weight_error(few, w)
    with pytest.raises(PTQError, match='at least one'):
        fit_best([], w)


@pytest.mark.parametrize(
    'spec,told',
    [
        (dict(type='AffineQuantiser'), "Did you mean 'AffineQuantizer'"),
        (dict(type='AffineQuantizer', symetric=True), "Did you mean 'symmetric'"),
        (dict(bits=4), 'with a `type`'),
    ],
)
def test_bad_specs(spec, told):
    with pytest.raises(PTQError, match=told):
        build_quantizer(spec)
