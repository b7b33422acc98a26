"""Files made to run something, or to cost a machine: nothing runs, and each costs little.

Every file is built here, from a good one, as an attacker would: with a right checksum. What would have run leaves a
canary; memory is the kernel's own peak.
"""

from __future__ import annotations

import copy
import os
import pickle
import zipfile
import zlib

import numpy as np
import pytest
import torch
from hostile import LOADS, OLD, Payload, expect, within_limits

from mmdet_ptq import PTQError, load_quantized
from mmdet_ptq.deploy import read_quantized, save_quantized
from mmdet_ptq.deploy.checkpoint.text import TEXT
from mmdet_ptq.engine.float_checkpoint import load_float_checkpoint
from mmdet_ptq.testing import tiny_detector

PIPELINE = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64)), dict(type='PackDetInputs')]


# each may take seconds of its time bound; a process of its own keeps what is left of limits away from other tests


@pytest.fixture(scope='module')
def good():
    return read_quantized(OLD / 'quantized.pth')


def command(trap):
    return dict(type='os.system', command=trap.command)


def in_model(*path):
    """Puts a dict of the case where a path in the model leads."""

    def change(config, trap, value):
        place = config['model']
        for key in path[:-1]:
            place = place.setdefault(key, {}) if isinstance(place, dict) else place[key]
        place[path[-1]] = value(trap) if callable(value) else value

    return change


def config_case(change, value=command):
    return lambda config, trap: change(config, trap, value)


def top(key):
    def change(config, trap, value):
        config[key] = value(trap) if callable(value) else value

    return change


def pipeline(value, place=0):
    def change(config, trap):
        steps = copy.deepcopy(PIPELINE)
        steps[place] = value(trap) if callable(value) else value
        config['test_dataloader'] = dict(dataset=dict(type='CocoDataset', pipeline=steps))

    return change


def nested(depth):
    value = {}
    for _ in range(depth):
        value = dict(a=value)
    return value


SWIN = dict(type='SwinTransformer', embed_dims=3, num_heads=(1, 1, 1, 1), window_size=170, depths=(1, 1, 1, 1))
UNKNOWN, ACTS = 'none of the models', 'give the config file, or say trust_config=True'
CONFIGS = {
    'a detector that is a command': (top('model'), command, UNKNOWN),
    'a backbone that is a command': (in_model('backbone'), command, UNKNOWN),
    'a head that is a command': (in_model('bbox_head'), command, UNKNOWN),
    'a loss that is a command': (in_model('bbox_head', 'loss_cls'), command, UNKNOWN),
    'a norm that is a command': (in_model('backbone', 'norm_cfg'), command, UNKNOWN),
    'anchors that are a command': (in_model('bbox_head', 'anchor_generator'), command, UNKNOWN),
    'an assigner that is a command': (in_model('train_cfg', 'assigner'), command, UNKNOWN),
    'a preprocessor that is a command': (top('data_preprocessor'), command, UNKNOWN),
    'a process by its path': (
        in_model('neck'),
        lambda trap: dict(type='subprocess.run', args=trap.command, shell=True),
        UNKNOWN,
    ),
    'builtins': (in_model('neck'), lambda trap: dict(type='builtins.exec', source='1'), UNKNOWN),
    'a module by its name': (in_model('neck', 'type'), 'canary_module', UNKNOWN),
    'a class of a module': (in_model('neck', 'type'), 'canary_library.Neck', UNKNOWN),
    'a scope in a name': (in_model('neck', 'type'), 'canary_library.FPN', UNKNOWN),
    'a scope in a dict': (in_model('neck', '_scope_'), 'canary_library', 'another library'),
    'a default scope': (top('default_scope'), 'canary_library', 'another library'),
    'imports': (top('custom_imports'), dict(imports=['canary_module']), 'needs canary_module'),
    'imports that may fail': (
        top('custom_imports'),
        dict(imports='canary_module', allow_failed_imports=True),
        'needs canary_module',
    ),
    'imports that are no list': (top('custom_imports'), 5, 'needs 5'),
    'text for suppression': (
        in_model('test_cfg', 'nms', 'type'),
        lambda trap: f'__import__("os").system({trap.command!r})',
        UNKNOWN,
    ),
    'text for a camera': (
        in_model('neck'),
        lambda trap: dict(type='CameraMotionCompensation', warp_mode=f'__import__("os").system({trap.command!r})'),
        'evaluates text as code',
    ),
    'a teacher': (
        top('model'),
        lambda trap: dict(
            type='KnowledgeDistillationSingleStageDetector', teacher_config=str(trap.folder / 'config.py')
        ),
        'reads another config',
    ),
    'a language model': (
        in_model('backbone'),
        dict(type='BertModel', name='https://example.invalid'),
        'fetches a model',
    ),
    'a pooling layer': (
        in_model('roi_head'),
        dict(type='SingleRoIExtractor', roi_layer=dict(type='os.system')),
        UNKNOWN,
    ),
    'another role': (in_model('neck'), dict(type='MaxIoUAssigner', pos_iou_thr=1, neg_iou_thr=1), 'config inside'),
    'weights from a file': (
        in_model('backbone', 'init_cfg'),
        lambda trap: dict(type='Pretrained', checkpoint=str(trap.folder / 'payload.pth')),
        LOADS,
    ),
    'weights from a network': (
        in_model('backbone', 'init_cfg'),
        dict(type='Pretrained', checkpoint='https://example.invalid/w.pth'),
        LOADS,
    ),
    'an evaluator': (top('test_evaluator'), command, LOADS),
    'hooks': (top('custom_hooks'), lambda trap: [command(trap)], LOADS),
    'a visualizer': (top('visualizer'), command, LOADS),
    'training data': (top('train_dataloader'), lambda trap: dict(dataset=command(trap)), LOADS),
    'a checkpoint to begin with': (top('load_from'), 'https://example.invalid/w.pth', LOADS),
    'wide layers': (in_model('bbox_head', 'feat_channels'), 10**7, 'more than .* MiB'),
    'wider layers': (in_model('bbox_head', 'feat_channels'), 10**15, 'more than'),
    'many layers': (in_model('bbox_head', 'stacked_convs'), 10**9, 'takes more than'),
    'many anchors': (in_model('bbox_head', 'anchor_generator', 'scales_per_octave'), 10**10, 'takes more than'),
    'large windows': (in_model('backbone'), SWIN, 'takes more than'),
    'a large divisor': (in_model('data_preprocessor', 'pad_size_divisor'), 10**9, 'larger than any image'),
    'data sets that are no list': (top('test_dataloader'), dict(dataset=dict(datasets=dict(a=1))), LOADS),
    'arguments of another': (in_model('neck'), dict(type='FPN', no_such=1), 'gives no detector'),
    'no detector': (top('model'), dict(type='ReLU'), 'does not belong to this checkpoint'),
    'nesting': (top('extra'), nested(200), 'holds too much'),
}
PIPELINES = {
    'a step that is a command': (command, 'none of the transforms', 0),
    'a step within a step': (
        lambda trap: dict(type='RandomApply', transforms=[command(trap)], prob=1.0),
        'none of the transforms',
        1,
    ),
    'steps that look up names': (dict(type='Albu', transforms=[dict(type='load')]), 'looks names up', 1),
    'a folder for imports': (
        lambda trap: dict(
            type='LoadImageFromFile',
            backend_args=dict(backend='memcached', server_list_cfg='', client_cfg='', sys_path=str(trap.folder)),
        ),
        'other than files of this machine',
        0,
    ),
    'an endless image': (dict(type='Resize', scale=(10**6, 10**6)), 'larger than any image', 1),
    'an endless factor': (dict(type='Resize', scale_factor=(10**4, 10**4)), 'makes images larger than any', 1),
    'an endless border': (dict(type='Expand', ratio_range=(1, 10**4), prob=1.0), 'makes images larger than any', 1),
}


def save(state, path):
    save_quantized(path, state)
    return path


@pytest.mark.parametrize(('change', 'value', 'told'), CONFIGS.values(), ids=CONFIGS)
def test_a_stored_config_is_data(good, trap, change, value, told):
    state = copy.deepcopy(good)
    change(state['config'], trap, value)
    path = save(state, trap.folder / 'q.pth')
    expect(within_limits(lambda: load_quantized(path)), told)


@pytest.mark.parametrize(('value', 'told', 'place'), PIPELINES.values(), ids=PIPELINES)
def test_a_stored_pipeline_is_data(good, trap, value, told, place):
    state = copy.deepcopy(good)
    pipeline(value, place)(state['config'], trap)
    path = save(state, trap.folder / 'q.pth')
    expect(within_limits(lambda: load_quantized(path)), told)


def first_activation(state):
    return next(iter(state['structure']['activations'].values()))


def spec_of(value):
    return lambda state, trap: first_activation(state).update(spec=value(trap))


def weight_of(**changes):
    return lambda state, trap: state['structure']['layers'][0]['weight'].update(changes)


PROCESS = lambda trap: dict(type='subprocess.run', args=trap.command, shell=True)  # noqa: E731
STRUCTURES = {
    'a format that is a process': (spec_of(PROCESS), 'unknown format'),
    'a format that is a command': (spec_of(command), 'unknown format'),
    'a format by the name of a module': (spec_of(lambda trap: dict(type='canary_module')), 'unknown format'),
    'a format in our scope': (spec_of(lambda trap: dict(type='mmdet_ptq.os.system')), 'unknown format'),
    'a weight that is a command': (weight_of(type='os.system'), 'unknown format'),
    'an observer that is a command': (
        lambda state, trap: first_activation(state).update(observer=command(trap)),
        LOADS,
    ),
    'an operation of a module': (
        lambda state, trap: state['structure']['sites'].append(
            dict(module='os', call=0, function='system', index=0, activation=None)
        ),
        'lacks 1 layers',
    ),
    'endless channels': (weight_of(num_channels=10**12), 'channels'),
    'other channels': (weight_of(num_channels=2**19), 'output channels'),
    'endless neighbours': (weight_of(neighbours=dict(channels=10**6, kernel=[1000])), 'weights a channel'),
    'neighbours in a ring': (weight_of(neighbours=dict(channels=10**5, slices=10**5)), 'weights a channel'),
    'a name of Python': (
        lambda state, trap: state['structure']['folds'].append(['__class__', '__init__']),
        'followed by',
    ),
    'a name that a terminal obeys': (
        lambda state, trap: state['structure']['folds'].append(['\x1b[2J\n\x07', 'x']),
        r'no layer \\x1b\[2J\\n\\x07 followed by x',
    ),
    'an endless tensor': (
        lambda state, trap: state['tensors']['index'].append(['x', 'float32', [10**6, 10**6], -1, 'float32']),
        'not within the numbers',
    ),
    'one tensor many times': (
        lambda state, trap: state['tensors']['index'].extend(
            [f'x{n}', 'float32', [100], 0, 'float32'] for n in range(10**4)
        ),
        'not within the numbers',
    ),
    'a type that is a function': (
        lambda state, trap: state['tensors']['index'].append(['x', 'load', [1], -1, 'load']),
        "has the type 'load'",
    ),
    'an endless image': (lambda state, trap: state.update(input_shape=[1, 3, 2**16, 2**16]), 'no size of an image'),
}


@pytest.mark.parametrize(('change', 'told'), STRUCTURES.values(), ids=STRUCTURES)
def test_a_structure_is_data(good, trap, change, told):
    state = copy.deepcopy(good)
    change(state, trap)
    path = save(state, trap.folder / 'q.pth')
    expect(within_limits(lambda: load_quantized(path)), told)
    if told:
        # a config of the user's own makes the structure no better
        expect(within_limits(lambda: load_quantized(path, config=config_of(good))), told)


def config_of(state):
    from mmengine.config import Config

    return Config(copy.deepcopy(state['config']))


def repacked(path, change):
    packed = torch.load(OLD / 'quantized.pth', weights_only=True)
    change(packed)
    torch.save(packed, path)


def text(content):
    return lambda packed: packed.update(
        {TEXT: torch.from_numpy(np.frombuffer(zlib.compress(content, 9), np.uint8).copy())}
    )


def endless(packed):
    packed['codes'].update(uint8=torch.zeros(1, dtype=torch.uint8).expand(2**40))


def zip_bomb(path):
    """A hundred times what it is."""
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive, archive.open('archive/data/0', 'w') as entry:
        for _ in range(6):
            entry.write(bytes(1 << 24))
    with zipfile.ZipFile(path, 'a') as archive:
        archive.writestr('archive/data.pkl', pickle.dumps({}))


def overlapping(path):
    """A thousand names for the same bytes."""
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('archive/data/0', bytes(1 << 20))
        entry = archive.filelist[0]
        for number in range(1, 1000):
            other = copy.copy(entry)
            other.filename = f'archive/data/{number}'
            archive.filelist.append(other)
            archive.NameToInfo[other.filename] = other


def doubling(path):
    """A list of a list twice of a list twice ...: small in a pickle, endless to walk through."""
    value = []
    for _ in range(60):
        value = [value, value]
    state = read_quantized(OLD / 'quantized.pth')
    torch.save({**state, 'schema': 2, 'config': dict(model=value)}, path)


def legacy(path):
    """A file of torch before 1.6 that tells of a storage of 8 TiB."""
    import io

    buffer = io.BytesIO()
    torch.save({'a': torch.ones(3)}, buffer, _use_new_zipfile_serialization=False)
    content = buffer.getvalue()
    marker = b'cpuq'
    start = content.index(marker)
    place = content.index(b'K\x03', start)
    path.write_bytes(content[:place] + b'\x8a\x06' + (2**41).to_bytes(6, 'little') + content[place + 2 :])


PACKED = {
    'a pickle that runs a command': (lambda path, trap: torch.save(Payload(trap.command), path), 'pickled objects'),
    'a bare pickle': (lambda path, trap: path.write_bytes(pickle.dumps(Payload(trap.command))), 'checkpoint'),
    'a zip bomb': (lambda path, trap: zip_bomb(path), 'unpacks to more than it is'),
    'overlapping entries': (lambda path, trap: overlapping(path), 'unpacks to more than it is'),
    'a text bomb': (lambda path, trap: repacked(path, text(bytes(1 << 25))), 'longer than 16 MiB'),
    'a nested text': (lambda path, trap: repacked(path, text(b'[' * 10**6 + b']' * 10**6)), 'nested too deep'),
    'a text of many values': (
        lambda path, trap: repacked(path, text(b'[' + b'[],' * (12 * 10**5) + b'[]]')),
        'holds too much',
    ),
    'a list of itself': (lambda path, trap: doubling(path), 'holds too much'),
    'a storage that is not there': (lambda path, trap: legacy(path), 'damaged|takes more'),
    'endless codes': (lambda path, trap: repacked(path, endless), 'claims more numbers'),
    'nothing': (lambda path, trap: path.write_bytes(b''), 'damaged'),
    'noise': (lambda path, trap: path.write_bytes(np.random.default_rng(0).bytes(10**5)), 'damaged'),
}


@pytest.mark.parametrize(('write', 'told'), PACKED.values(), ids=PACKED)
def test_a_checkpoint_unpacks_to_data(trap, write, told):
    path = trap.folder / 'q.pth'
    write(path, trap)
    assert path.stat().st_size < 1 << 24
    expect(within_limits(lambda: load_quantized(path)), told)
    if 'unpacks' in told or 'pickle' in told:
        detector = tiny_detector('retinanet')
        expect(within_limits(lambda: load_float_checkpoint(detector, str(path))), told)


def test_there_are_at_least_forty():
    assert len(CONFIGS) + len(PIPELINES) + len(STRUCTURES) + len(PACKED) >= 40


def test_the_second_wall_stands_without_the_first(trap):
    """What the check of a config would have missed is stopped where it happens."""
    from mmengine.registry import MODELS as REGISTRY

    from mmdet_ptq.deploy.network.guard import only_registered

    def attempts():
        yield lambda: os.system(trap.command)
        yield lambda: __import__('subprocess').run(trap.command, shell=True, check=False)
        yield lambda: (trap.folder / 'canary').write_text('x')
        yield lambda: (trap.folder / 'config.py').read_text()
        yield lambda: __import__('socket').create_connection(('127.0.0.1', 9))
        yield lambda: REGISTRY.get('canary_module')
        yield lambda: REGISTRY.get('canary_library.X')

    for attempt in attempts():
        with only_registered('f'), pytest.raises((PTQError, RuntimeError)):
            attempt()
    # and stands no longer than it is needed
    assert os.system('true') == 0


def test_a_good_file_still_loads(good, trap):
    state = copy.deepcopy(good)
    state['config']['test_dataloader'] = dict(dataset=dict(type='CocoDataset', pipeline=PIPELINE))
    detector = load_quantized(save(state, trap.folder / 'q.pth'))
    from mmdet.apis import inference_detector

    assert inference_detector(detector, np.zeros((64, 64, 3), np.uint8)).pred_instances.bboxes.shape[1] == 4
