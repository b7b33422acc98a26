"""Mistakes in what mmengine builds are one sentence with the place in the config."""

import pytest
from mmdet.registry import DATASETS, MODELS, TRANSFORMS
from mmengine.registry import init_default_scope

from mmdet_ptq.errors import PTQError, building, did_you_mean, lost_process, one_line


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')


@MODELS.register_module(force=True)
class NeedsPackage:
    def __init__(self):
        import a_package_that_nobody_has  # noqa: F401


@pytest.mark.parametrize(
    ('part', 'told'),
    [
        (
            dict(type='ResNett', depth=18),
            "`model.parts[1].type` is 'ResNett', which is unknown. Did you mean 'ResNet'?",
        ),
        (dict(type='ResNet', dept=18), "`model.parts[1]` (ResNet) takes no argument 'dept'. Did you mean 'depth'?"),
        (
            dict(type='nopackage.ConvNeXt'),
            '`model.parts[1]` (nopackage.ConvNeXt) needs the package nopackage, which is not installed; install it, '
            'or use another type.',
        ),
        (
            dict(type='Qxzwv'),
            "`model.parts[1].type` is 'Qxzwv', which is unknown. If it is your own, import it: `custom_imports`.",
        ),
        (
            dict(type='NeedsPackage'),
            '`model.parts[1]` (NeedsPackage) needs a package that is missing: No module named '
            "'a_package_that_nobody_has'.",
        ),
        (
            dict(type='ResNet', depth=19),
            "`model.parts[1]` (ResNet) cannot be built: KeyError: 'invalid depth 19 for resnet'.",
        ),
    ],
)
def test_a_mistake_has_its_place(part, told):
    config = dict(model=dict(parts=[dict(type='ResNet', depth=18), part]), other=1)
    with pytest.raises(PTQError) as caught, building(config, 'model'):
        for inner in config['model']['parts']:
            MODELS.build(inner)
    assert str(caught.value) == told


def test_a_step_of_a_pipeline_has_its_place():
    pipeline = [dict(type='LoadImageFromFile'), dict(type='Resiz', scale=(8, 8))]
    config = dict(loader=dict(dataset=dict(type='CocoDataset', ann_file='', pipeline=pipeline, lazy_init=True)))
    told = r"`loader.dataset.pipeline\[1\].type` is 'Resiz'.*Did you mean 'Resize'"
    with pytest.raises(PTQError, match=told), building(config, 'loader'):
        DATASETS.build(config['loader']['dataset'])
    with pytest.raises(PTQError, match="a type in `other` is 'Resiz'"), building(config, 'other'):
        TRANSFORMS.build(pipeline[1])


def test_what_stands_in_no_config_is_told_of_the_whole():
    with pytest.raises(PTQError, match=r'^`a` and `b` cannot be built: ValueError: one two.$'), building({}, 'a', 'b'):
        raise ValueError('one\n  two.')
    with pytest.raises(PTQError, match='^told already$'), building({}):
        raise PTQError('told already')
    with pytest.raises(KeyboardInterrupt), building({}):
        raise KeyboardInterrupt


def test_words():
    assert did_you_mean('bakbone', ['backbone', 'neck']) == " Did you mean 'backbone'?"
    assert did_you_mean('x', ['backbone']) == ''
    assert one_line(ValueError('a\n b.')) == 'ValueError: a b'


def test_an_error_of_the_connection_is_that_of_a_process_that_ended():
    gloo = '[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5190'
    assert lost_process(RuntimeError(gloo))
    assert lost_process(type('DistBackendError', (RuntimeError,), {})('NCCL error'))
    assert not lost_process(RuntimeError('mat1 and mat2')) and not lost_process(ValueError(gloo))


def test_an_assertion_without_a_message_is_told_by_its_code():
    with pytest.raises(AssertionError) as caught:
        raise AssertionError  # pytest gives its own assertions a message
    told = 'AssertionError: raise AssertionError'
    assert one_line(caught.value).startswith(told) and one_line(caught.value).endswith(' in test_errors.py')
    assert one_line(AssertionError()) == 'AssertionError: ' and one_line(ValueError('a.')) == 'ValueError: a'
