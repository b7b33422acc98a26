from dataclasses import replace

import pytest

from mmdet_ptq.config import PTQConfig
from mmdet_ptq.errors import PTQError
from mmdet_ptq.wrapping.preparing.policy import LayerRole, resolve_policies
from mmdet_ptq.wrapping.watching.layers import matches

ROLES = [
    LayerRole('backbone.stem.conv', in_head=False, first=True, last=False),
    LayerRole('backbone.stage1.conv', in_head=False, first=False, last=False),
    LayerRole('bbox_head.cls_convs.0.conv', in_head=True, first=False, last=False),
    LayerRole('bbox_head.retina_cls', in_head=True, first=False, last=True),
]


def _bits(**block):
    policies = resolve_policies(PTQConfig.from_dict(dict(preset='w8a8') | block), ROLES)
    return [policies[role.name].weights.bits for role in ROLES]


def test_later_entries_win():
    assert _bits(weights=dict(bits=7)) == [7, 7, 7, 7]
    block = dict(
        weights=dict(bits=7),
        head=dict(weights=dict(bits=6)),
        first=dict(weights=dict(bits=5)),
        last=dict(weights=dict(bits=4)),
    )
    assert _bits(**block) == [5, 7, 6, 4]
    assert _bits(**block, overrides={'*.retina_cls': dict(weights=dict(bits=3))}) == [5, 7, 6, 3]


def test_the_last_matching_override_wins():
    wide, narrow = dict(weights=dict(bits=3)), dict(weights=dict(bits=2))
    assert _bits(overrides={'backbone': wide, 'backbone.stem': narrow}) == [2, 3, 8, 8]
    assert _bits(overrides={'backbone.stem': narrow, 'backbone': wide}) == [3, 3, 8, 8]


def test_overrides_change_only_what_they_name():
    cfg = PTQConfig.from_dict(
        dict(
            overrides={
                'backbone': dict(weights=dict(bits=4), activations=dict(bits=16)),
                'backbone.stem': dict(weights=dict(observer=dict(type='mmdet_ptq.MinMaxObserver'))),
            }
        )
    )
    stem = resolve_policies(cfg, ROLES)['backbone.stem.conv']
    assert (stem.weights.bits, stem.activations.bits) == (4, 16)
    assert stem.weights.observer['type'] == 'mmdet_ptq.MinMaxObserver'
    assert stem.activations.observer['type'] == 'mmdet_ptq.FisherObserver'


def test_an_override_may_say_half_of_a_format():
    cfg = PTQConfig.from_dict(
        dict(preset='w4a8', overrides={'bbox_head.cls_convs': dict(weights=dict(quantizer=dict(mode='exact')))})
    )
    assert resolve_policies(cfg, ROLES)['bbox_head.cls_convs.0.conv'].weights.quantizer['mode'] == 'exact'
    with pytest.raises(PTQError, match=r"`ptq.overrides\['backbone.stem'\].weights.quantizer`.*no option 'mode'"):
        # 8 bits, uniform, by the preset
        resolve_policies(
            PTQConfig.from_dict(
                dict(preset='w4a8', overrides={'backbone.stem': dict(weights=dict(quantizer=dict(mode='exact')))})
            ),
            ROLES,
        )


def test_float_override():
    policies = resolve_policies(PTQConfig.from_dict(dict(overrides={'bbox_head.retina_*': 'float'})), ROLES)
    assert [policies[r.name].weights.float for r in ROLES] == [False, False, False, True]
    assert [policies[r.name].activations.float for r in ROLES] == [False, False, False, True]


@pytest.mark.parametrize(
    'pattern, near',
    [('backbone.stm', 'backbone.stem'), ('bbox_head.retina_clss', 'bbox_head.retina_cls'), ('nothing.like.it', None)],
)
def test_a_pattern_without_match_is_an_error(pattern, near):
    with pytest.raises(PTQError, match='matches no layer') as error:
        _bits(overrides={'backbone': 'float', pattern: 'float'})
    assert repr(pattern) in str(error.value)
    assert (f"Did you mean '{near}'" if near else 'matches no layer of this detector.') in str(error.value)


@pytest.mark.parametrize(
    ('pattern', 'told'),
    [
        (r'backbone\..*', "no regular expressions: * stands for anything. Did you mean 'backbone.*'?"),
        ('^bbox_head', "Did you mean 'bbox_head'?"),
        ('.*', "Did you mean '*'?"),
        ('backbone.stem|bbox_head', 'no regular expressions: * stands for anything.'),
        ('retina_cls', 'of this detector.'),
        ('(', 'of this detector.'),
    ],
)
def test_a_regular_expression_is_told(pattern, told):
    with pytest.raises(PTQError, match='matches no layer') as error:
        _bits(overrides={pattern: 'float'})
    assert told in str(error.value) and ('regular' in str(error.value)) == (pattern not in ('retina_cls', '('))


def test_patterns_name_layers_or_their_parents():
    assert matches('backbone', 'backbone.stem.conv')
    assert matches('backbone.*', 'backbone.stem.conv')
    assert matches('*.conv', 'backbone.stem.conv')
    assert not matches('back', 'backbone.stem.conv')
    assert not matches('stem', 'backbone.stem.conv')


@pytest.mark.parametrize(('key', 'attribute'), [('head', 'in_head'), ('first', 'first'), ('last', 'last')])
def test_a_policy_for_layers_that_are_not_there_is_refused(key, attribute):
    roles = [replace(role, **{attribute: False}) for role in ROLES]
    asked = PTQConfig.from_dict({'preset': 'w8a8', key: 'float'})
    with pytest.raises(PTQError, match=f'`ptq.{key}` applies to nothing: the detector has no .* `ptq.overrides`'):
        resolve_policies(asked, roles)
    asleep = [replace(role, runs=not getattr(role, attribute)) for role in ROLES]
    with pytest.raises(PTQError, match=f'`ptq.{key}` applies to nothing'):
        resolve_policies(asked, asleep)
    resolve_policies(asked, ROLES)


def test_what_only_the_preset_says_of_such_layers_is_a_warning(monkeypatch):
    lines = []
    monkeypatch.setattr('mmdet_ptq.wrapping.preparing.policy.print_log', lambda text, *_, **__: lines.append(text))
    resolve_policies(PTQConfig.from_dict(dict(preset='w4a8')), [replace(role, first=False) for role in ROLES])
    assert len(lines) == 1 and lines[0].startswith('`ptq.first` applies to nothing')
    with pytest.raises(PTQError, match='applies to nothing'):
        resolve_policies(
            PTQConfig.from_dict(dict(preset='w4a8', first=dict(weights=dict(bits=6)))),
            [replace(role, first=False) for role in ROLES],
        )


def test_an_override_of_layers_that_never_run_is_told(monkeypatch):
    told = []
    monkeypatch.setattr('mmdet_ptq.wrapping.preparing.policy.print_log', lambda text, *_, **__: told.append(text))
    roles = [*ROLES, LayerRole('aux_head.conv', in_head=True, first=False, last=False, runs=False)]
    change = dict(weights=dict(bits=4))
    cfg = PTQConfig.from_dict(dict(preset='w8a8', overrides={'*.conv': change, 'backbone': change}))
    resolve_policies(cfg, roles)
    assert not told
    resolve_policies(PTQConfig.from_dict(dict(preset='w8a8', overrides={'aux_head.*': change})), roles)
    assert told[0].startswith("`ptq.overrides['aux_head.*']` changes nothing") and 'aux_head.conv' in told[0]
