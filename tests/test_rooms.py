"""The house: imports point one way, without a circle; rooms stay small; a runtime is known by its own folder alone."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from mmdet_ptq.registry import RUNTIMES, runtime_names

ROOT = Path(__file__).resolve().parents[1] / 'mmdet_ptq'
# what every room may know
GROUND = {'compat', 'doctor', 'errors', 'fields', 'files', 'limits', 'progress', 'registry', 'startup', 'version'}
# room: what else it may know
ROOMS = {
    'quantizers': set(),
    'predictions': set(),
    'datasets': set(),
    'config': {'quantizers'},
    'wrapping': {'config', 'quantizers'},
    'calibration': {'config', 'predictions', 'quantizers', 'wrapping'},
    'deploy': {'predictions', 'quantizers', 'wrapping'},
    'analysis': {'calibration', 'predictions', 'quantizers', 'wrapping'},
    'engine': {'analysis', 'calibration', 'config', 'deploy', 'predictions', 'quantizers', 'wrapping'},
    'testing': {'calibration', 'config', 'wrapping'},
    'cli': {'analysis', 'config', 'deploy', 'engine', 'wrapping'},
}
# the same within rooms: folder to what it may know of its room, '.' for the room's own files
FOLDERS = {
    'wrapping.watching': set(),
    'wrapping.preparing': {'.', 'wrapping.watching'},
    'calibration.reconstruction': {'.'},
    'calibration.protection': {'.'},
    'deploy.integers': set(),
    'deploy.checkpoint': {'deploy.integers'},
    'deploy.network': {'.'},
    'deploy.onnx': {'.', 'deploy.integers', 'deploy.network'},
    'deploy.onnxruntime': {'.', 'deploy.integers', 'deploy.network', 'deploy.onnx'},
    'deploy.openvino': {'.', 'deploy.network', 'deploy.onnx'},
    'deploy.tensorrt': {'.', 'deploy.network', 'deploy.onnx'},
    'deploy.ncnn': {'.', 'deploy.integers', 'deploy.network'},
    'analysis.detected': set(),
    'engine.global_stage': {'.'},
    'engine.stages': {'.', 'engine.global_stage'},
}
# most files and folders in a room
LIMITS = {'deploy': 12, 'calibration': 10, 'wrapping': 10}
MOST_FILES, MOST_LINES = 15, 500
# where a runtime's name may stand in code
KNOWN_TO = {'registry.py', 'testing/processors.py'}


def module_name(path: Path) -> str:
    return '.'.join(('mmdet_ptq', *path.relative_to(ROOT).with_suffix('').parts)).removesuffix('.__init__')


FILES = {module_name(path): path for path in sorted(ROOT.rglob('*.py'))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def imported(name: str) -> Iterator[tuple[str, str]]:
    """What a module imports of the package, in functions and for type checkers, too."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f'{name} imports relatively'
            if (node.module or '').partition('.')[0] == 'mmdet_ptq':
                yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith('mmdet_ptq') for alias in node.names)


EXPORTS = {
    (package, name): (module, name)
    for package, path in FILES.items()
    if path.name == '__init__.py'
    for module, name in imported(package)
}


def source(module: str, name: str) -> str:
    """The module that an imported name really stands in."""
    while f'{module}.{name}' not in FILES and (module, name) in EXPORTS:
        module, name = EXPORTS[module, name]
    # a name that a package takes over from a module of that name is not the module
    return module if (module, name) in EXPORTS or f'{module}.{name}' not in FILES else f'{module}.{name}'


# a package's __init__ only hands on: who imports from it imports what it hands on
EDGES = {
    name: {source(*entry) for entry in imported(name)} - {name}
    for name, path in FILES.items()
    if path.name != '__init__.py'
}


def room(module: str) -> str:
    return [*module.split('.'), 'mmdet_ptq'][1]


def folder(module: str) -> str:
    parts = module.split('.')[1:]
    return '.'.join(parts[:2]) if len(parts) > 2 else '.'


def test_no_module_imports_itself_by_way_of_others():
    try:
        list(TopologicalSorter(EDGES).static_order())
    except CycleError as error:
        pytest.fail(' -> '.join(reversed(error.args[1])))


def test_rooms_know_only_what_the_rules_allow():
    wrong = {
        f'{module} imports {other}'
        for module, others in EDGES.items()
        for other in others
        if room(module) in ROOMS and room(other) not in {room(module), *ROOMS[room(module)], *GROUND}
    }
    assert not wrong
    assert {room(module) for module in EDGES} <= ROOMS.keys() | GROUND | {'mmdet_ptq'}


def test_folders_of_a_room_know_only_what_the_rules_allow():
    wrong = {
        f'{module} imports {other}'
        for module, others in EDGES.items()
        for other in others
        if folder(module) != '.'
        and room(module) == room(other)
        and folder(other) not in {folder(module), *FOLDERS[folder(module)]}
    }
    assert not wrong


def test_what_lies_at_the_bottom_knows_no_room():
    assert not {
        f'{module} imports {other}'
        for module, others in EDGES.items()
        for other in others
        if room(module) in GROUND and room(other) not in GROUND
    }


def test_rooms_stay_small():
    for path in {path.parent for path in FILES.values()}:
        assert sum(entry.name != '__init__.py' for entry in path.glob('*.py')) <= MOST_FILES, path
    for name, limit in LIMITS.items():
        entries = [entry for entry in (ROOT / name).iterdir() if entry.name not in ('__init__.py', '__pycache__')]
        assert len(entries) <= limit, entries
    assert not {name for name, path in FILES.items() if len(path.read_text().splitlines()) > MOST_LINES}


def words(path: Path) -> Iterator[str]:
    """Names and strings of a file's code, without comments and docstrings."""
    text = path.read_text()
    prose = {
        node.value.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.NAME, tokenize.STRING) and token.start[0] not in prose:
            yield from re.findall('[a-z]+', token.string.lower())


def test_a_runtime_is_named_in_its_own_folder_alone():
    for name in runtime_names():
        own = RUNTIMES.get(name).__module__.split('.')[2]
        strangers = [
            path.relative_to(ROOT).as_posix()
            for path in FILES.values()
            if path.parent.name != own and name in words(path)
        ]
        assert set(strangers) <= KNOWN_TO, (name, strangers)


def private_names(path: Path) -> Iterator[str]:
    """Private names of the package's modules that a file uses."""
    tree, modules = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('mmdet_ptq'):
            yield from (
                alias.name for alias in node.names if alias.name.startswith('_') and not alias.name.startswith('__')
            )
            modules |= {alias.asname or alias.name for alias in node.names if f'{node.module}.{alias.name}' in FILES}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r'^mmdet_ptq[\w.]*\._[a-zA-Z]\w*', node.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            if node.attr.startswith('_') and not node.attr.startswith('__'):
                yield f'{node.value.id}.{node.attr}'


def test_no_test_reaches_into_a_private_name():
    tests = Path(__file__).parent
    used = {path.relative_to(tests).as_posix(): sorted(set(private_names(path))) for path in tests.rglob('*.py')}
    assert {name: names for name, names in used.items() if names} == {}


def test_no_module_uses_a_private_name_of_another():
    used = {name: sorted(set(private_names(path))) for name, path in FILES.items()}
    assert {name: names for name, names in used.items() if names} == {}
