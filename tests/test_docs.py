"""The documentation against the code: tables, commands, links, code blocks.

The tables of docs/config.md are written from the dataclasses and classes: ``python tests/test_docs.py`` does it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import re
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import yaml
from mmengine.config import Config

from mmdet_ptq import cli
from mmdet_ptq.config import (
    KEYS,
    CalibrationConfig,
    GlobalLossConfig,
    ProtectConfig,
    PTQConfig,
    ReconstructConfig,
    TensorConfig,
)
from mmdet_ptq.config.presets import HEAD_POLICIES, PRESETS, RECONSTRUCTION_METHODS
from mmdet_ptq.quantizers import (
    AffineQuantizer,
    FisherObserver,
    KLObserver,
    LogAffineQuantizer,
    MinMaxObserver,
    MovingAverageObserver,
    MSEObserver,
    PercentileObserver,
)
from mmdet_ptq.registry import OBSERVERS, QUANTIZERS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [
        *(ROOT / 'docs').rglob('*.md'),
        *(ROOT / 'configs').rglob('*.md'),
        *(ROOT / name for name in ('README.md', 'CHANGELOG.md', 'CONTRIBUTING.md')),
    ]
)
BLOCKS = {
    'ptq': PTQConfig,
    'ptq.calibration': CalibrationConfig,
    'ptq.weights': TensorConfig,
    'ptq.protect': ProtectConfig,
    'ptq.reconstruct': ReconstructConfig,
    'ptq.global_loss': GlobalLossConfig,
}
FORMATS = (
    AffineQuantizer,
    LogAffineQuantizer,
    FisherObserver,
    MSEObserver,
    MinMaxObserver,
    MovingAverageObserver,
    PercentileObserver,
    KLObserver,
)
# arguments that the wrapping sets from the layer
SET_BY_LAYER = ('num_channels', 'channel_axis', 'neighbours')


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


# ------------------------------------------------------------------ tables from the code


def meanings(cls: type) -> dict[str, str]:
    """Argument name to its text in the class's docstring, without the default."""
    lines = inspect.getdoc(cls).partition('Args:\n')[2].splitlines()
    found, name = {}, None
    for line in lines:
        entry = re.match(r' {4}(\w+)(?: \([^)]*\))?: (.*)', line)
        if entry:
            name = entry[1]
            found[name] = entry[2]
        elif name and line.startswith(' ' * 8):
            found[name] += ' ' + line.strip()
        else:
            break
    return {
        key: re.sub(r':\w+:`', '`', re.sub(r'\s*Defaults to .*$', '', text).replace('``', '`').replace('|', r'\|'))
        for key, text in found.items()
    }


def row(*cells: str) -> str:
    return f'| {" | ".join(cells)} |'


def default_of(field: dataclasses.Field) -> str:
    factory = field.default_factory
    if dataclasses.is_dataclass(factory):
        return 'see below'
    value = field.default if factory is dataclasses.MISSING else factory()
    return f'`{value!r}`'


def block_table(cls: type) -> str:
    told = meanings(cls)
    lines = [row('key', 'type', 'default', 'meaning'), '|---|---|---|---|']
    for field in dataclasses.fields(cls):
        kind = re.sub(r'\w+Config', 'dict', field.type).replace('|', r'\|')
        lines.append(row(f'`{field.name}`', kind, default_of(field), told[field.name]))
    return '\n'.join(lines)


def format_table(cls: type) -> str:
    told = meanings(cls)
    options = [p for p in inspect.signature(cls).parameters.values() if p.name not in SET_BY_LAYER]
    if not options:
        return 'No options.'
    lines = [row('option', 'default', 'meaning'), '|---|---|---|']
    for option in options:
        # the block's own key says how many bits
        default = 'set by `bits` of the block' if option.name == 'bits' else f'`{option.default!r}`'
        lines.append(row(f'`{option.name}`', default, told[option.name]))
    return '\n'.join(lines)


def named_blocks(blocks: dict[str, dict]) -> str:
    def written(value: object) -> str:
        if isinstance(value, dict):
            return f'dict({", ".join(f"{k}={written(v)}" for k, v in value.items())})'
        return repr(value)

    return '\n'.join(
        [
            row('name', 'the same as'),
            '|---|---|',
            *(row(f"`'{name}'`", f'`{written(block)}`') for name, block in blocks.items()),
        ]
    )


@cache
def tables() -> dict[str, Callable[[], str]]:
    return {
        **{key: lambda cls=cls: block_table(cls) for key, cls in BLOCKS.items()},
        **{cls.__name__: lambda cls=cls: format_table(cls) for cls in FORMATS},
        'presets': lambda: named_blocks(PRESETS),
        'policies': lambda: named_blocks(HEAD_POLICIES),
        'methods': lambda: named_blocks(RECONSTRUCTION_METHODS),
    }


def written_anew(text: str) -> str:
    """A page with every marked table replaced by the one the code gives."""

    def replace(match: re.Match) -> str:
        return f'<!-- table: {match[1]} -->\n\n{tables()[match[1]]()}\n\n<!-- /table -->'

    return re.sub(r'<!-- table: (\S+) -->\n.*?<!-- /table -->', replace, text, flags=re.DOTALL)


def test_the_config_reference_is_what_the_code_says():
    text = (ROOT / 'docs' / 'config.md').read_text()
    assert text == written_anew(text), 'docs/config.md is stale: run `python tests/test_docs.py`'


def test_the_config_reference_is_complete():
    text = (ROOT / 'docs' / 'config.md').read_text()
    assert set(re.findall(r'<!-- table: (\S+) -->', text)) == set(tables())
    assert {field.name for field in dataclasses.fields(PTQConfig)} == set(KEYS)
    registered = {
        cls
        for registry in (QUANTIZERS, OBSERVERS)
        for cls in registry.module_dict.values()
        if cls.__module__.startswith('mmdet_ptq.')
    }
    assert registered == set(FORMATS)


# ------------------------------------------------------------------ links, blocks, commands


def code_blocks(path: Path, *languages: str) -> list[str]:
    pattern = rf'^( *)```({"|".join(languages)})\n(.*?)^\1```'
    found = re.finditer(pattern, path.read_text(), re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(match[3]) for match in found]


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and mkdocs make them."""
    prose = re.sub(r'^```.*?^```', '', path.read_text(), flags=re.DOTALL | re.MULTILINE)
    heads = re.findall(r'^#+ (.*)$', prose, re.MULTILINE)
    return {re.sub(r'\s+', '-', re.sub(r'[^\w\s-]', '', head.lower()).strip()) for head in heads}


@pytest.mark.parametrize('path', PAGES, ids=names(PAGES))
def test_links_resolve(path):
    prose = re.sub(r'^```.*?^```', '', path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r'\]\(([^)\s]*)\)', prose):
        assert link, f'{path.name} has an empty link'
        if '://' in link:
            continue
        file, _, anchor = link.partition('#')
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f'{path.name} links to {link}, which does not exist'
        # the site is built from docs/ alone
        docs = ROOT / 'docs'
        assert not path.is_relative_to(docs) or target.is_relative_to(docs), f'{link} leaves docs/'
        assert not anchor or anchor in anchors(target), f'{path.name} links to {link}, which has no such heading'


@pytest.mark.parametrize('path', PAGES, ids=names(PAGES))
def test_python_blocks_compile_and_their_names_exist(path):
    for block in code_blocks(path, 'python'):
        compile(block, str(path), 'exec')
        for module, imported in re.findall(r'^from (mmdet_ptq[\w.]*) import (.+)$', block, re.MULTILINE):
            for name in imported.split(','):
                assert hasattr(__import__(module, fromlist=[name.strip()]), name.strip()), f'{module}.{name}'
        for kind in re.findall(r"type='mmdet_ptq\.(\w+)'", block):
            assert kind in {*QUANTIZERS.module_dict, *OBSERVERS.module_dict}, kind


@pytest.mark.parametrize('path', PAGES, ids=names(PAGES))
def test_ptq_blocks_validate(path, tmp_path):
    own = path.name == 'extending.md'  # registers what it uses
    (tmp_path / 'my_detector.py').write_text("_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'\n")
    for block in code_blocks(path, 'python'):
        if own or not re.search(r'^ptq = ', block, re.MULTILINE):
            continue
        (tmp_path / 'block.py').write_text(block)
        assert PTQConfig.from_dict(Config.fromfile(tmp_path / 'block.py').ptq)


@cache
def help_of(tool: str) -> str:
    command = {'ptq': cli.ptq, 'export': cli.export, 'test': cli.test, 'analyze': cli.analyze}[tool]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        command(['--help'])
    return out.getvalue()


@pytest.mark.parametrize('path', PAGES, ids=names(PAGES))
def test_commands_exist(path):
    targets = set(re.findall(r'^([a-z-]+):.*##', (ROOT / 'Makefile').read_text(), re.MULTILINE))
    text = path.read_text()
    for target in re.findall(r'(?:`|^)make ([a-z-]+)', text, re.MULTILINE):
        assert target in targets, f'{path.name}: make {target}'
    for line in re.findall(r'python (tools/\w+\.py[^\n`]*)', text.replace('\\\n', ' ')):
        script, *words = line.split()
        assert (ROOT / script).is_file(), line
        if Path(script).stem in ('ptq', 'test', 'analyze'):
            for flag in (word for word in words if word.startswith('--')):
                assert f'{flag} ' in help_of(Path(script).stem).replace('\n', ' \n').replace(']', ' ]'), line
        for config in (word for word in words if word.startswith('configs/')):
            assert (ROOT / config).is_file() or 'my_' in config, line


def test_the_command_line_reference_is_complete():
    text = (ROOT / 'docs' / 'commands.md').read_text()
    for tool in ('ptq', 'export', 'analyze', 'test'):
        for flag in re.findall(r'--[a-z0-9-]+', help_of(tool)):
            assert flag in ('--help', '--local-rank') or f'`{flag}' in text, f'commands.md does not name {flag}'


def test_every_page_is_in_the_navigation():
    # mkdocs' own tags (!ENV) are nobody's business here
    text = re.sub(r'!\w+ .*', "''", (ROOT / 'mkdocs.yml').read_text())
    nav = yaml.safe_load(text)['nav']
    listed = {
        page
        for entry in nav
        for value in entry.values()
        for page in ([value] if isinstance(value, str) else [p for part in value for p in part.values()])
    }
    assert listed == {str(path.relative_to(ROOT / 'docs')) for path in (ROOT / 'docs').rglob('*.md')}


if __name__ == '__main__':
    reference = ROOT / 'docs' / 'config.md'
    reference.write_text(written_anew(reference.read_text()))
