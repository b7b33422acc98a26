"""Every config loads, every recipe builds from the stock mmdet config and wraps completely, without downloads."""

from __future__ import annotations

import functools
from pathlib import Path

import mmdet
import pytest
import torch
import yaml
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmdet_ptq.compat import replace_sync_bn
from mmdet_ptq.config import PTQConfig
from mmdet_ptq.config.presets import PRESETS
from mmdet_ptq.wrapping import coverage_rows, integer_mac_share, prepare_detector

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / 'configs'
PRESET_FILES = sorted((CONFIGS / '_ptq_').glob('*.py'))
# what configs import
MODULES = [CONFIGS / 'nanodet' / 'nanodet_modules.py']
EVERY = sorted(p for p in CONFIGS.rglob('*.py') if p not in (*PRESET_FILES, *MODULES))
RECIPES = sorted(CONFIGS.glob('*/*_coco.py'))
METAFILES = sorted(CONFIGS.glob('*/metafile.yml'))
STOCK = Path(mmdet.__file__).parent / '.mim'
ADDRESS = 'https://download.openmmlab.com/mmdetection/'


@functools.cache
def load(path: Path) -> Config:
    return Config.fromfile(str(path))


@functools.cache
def published() -> dict[str, dict]:
    """What the installed mmdet's own metafiles say, by config path."""
    entries = {}
    for path in (STOCK / 'configs').glob('*/metafile.yml'):
        content = yaml.safe_load(path.read_text())
        for entry in content.get('Models', []) if isinstance(content, dict) else content:
            entries[entry['Config']] = entry
    return entries


def recipe_entries() -> dict[str, dict]:
    """The recipes' entries in our own metafiles, by config path."""
    entries = [entry for path in METAFILES for entry in yaml.safe_load(path.read_text())['Models']]
    assert len({entry['Name'] for entry in entries}) == len(entries)
    return {entry['Config']: entry for entry in entries}


def float_config(entry: dict) -> str:
    """The config that a recipe adds a preset to: mmdet's, or one of ours for detectors that mmdet does not ship."""
    data = entry['Metadata']
    return str(STOCK / data['Stock Config'] if 'Stock Config' in data else ROOT / data['Float Config'])


def unscoped(value: object) -> object:
    """A config without the scope marks that mmengine leaves when a base comes from another package."""
    if isinstance(value, dict):
        return {key: unscoped(item) for key, item in value.items() if key != '_scope_'}
    if isinstance(value, (list, tuple)):
        return [unscoped(item) for item in value]
    return value


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(CONFIGS)) for path in paths]


def test_recipes_are_there():
    families = 'detr dino faster_rcnn fcos gfl mask_rcnn nanodet retinanet rtmdet ssdlite yolox'.split()
    assert sorted({path.parent.name for path in RECIPES}) == families
    assert len(RECIPES) == 16


@pytest.mark.parametrize('path', PRESET_FILES, ids=names(PRESET_FILES))
def test_preset_files_are_the_presets(path):
    content = load(path)
    assert set(content) == {'ptq'}
    assert PTQConfig.from_dict(content.ptq) == PTQConfig.from_dict(None, preset=path.stem)


def test_every_preset_has_its_file():
    assert {path.stem for path in PRESET_FILES} == set(PRESETS)


@pytest.mark.parametrize('path', EVERY, ids=names(EVERY))
def test_config_loads_and_its_block_validates(path):
    config = load(path)
    assert config.model.type
    assert config.test_dataloader and config.test_evaluator
    assert ('ptq' in config) == ('float' not in path.stem)
    if 'ptq' in config:
        assert PTQConfig.from_dict(config.ptq).preset in PRESETS


@pytest.mark.parametrize('path', RECIPES, ids=names(RECIPES))
def test_recipe_is_the_stock_config_with_a_preset(path):
    config, entry = load(path), recipe_entries()[str(path.relative_to(ROOT))]
    stock = Config.fromfile(float_config(entry))
    assert path.stem.split('_')[-2] == config.ptq.preset
    ours, theirs = unscoped(config.to_dict()), unscoped(stock.to_dict())
    changed = {key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)}
    assert changed <= {'ptq', 'load_from'}
    assert config.train_dataloader.dataset.get('dataset', config.train_dataloader.dataset).data_root == 'data/coco/'


@pytest.mark.parametrize('path', RECIPES, ids=names(RECIPES))
def test_metafile_tells_what_mmdet_published(path):
    entry = recipe_entries()[str(path.relative_to(ROOT))]
    assert entry['Name'] == path.stem
    assert (ROOT / entry['README']).is_file()
    data, source = entry['Metadata'], published().get(entry['Metadata'].get('Stock Config'))
    if source is None:  # mmdet publishes no checkpoint: neither do we name one
        assert 'Float Checkpoint' not in data and load(path).get('load_from') is None
        return
    assert data['Float Checkpoint'] == source['Weights'] == load(path).load_from
    assert data['Float Checkpoint'].startswith(ADDRESS)
    assert data['Float box AP'] == source['Results'][0]['Metrics']['box AP']


def test_model_index_imports_every_metafile_and_nothing_else_is_listed():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
    assert sorted(index) == [str(path.relative_to(ROOT)) for path in METAFILES]
    assert set(recipe_entries()) == {str(path.relative_to(ROOT)) for path in RECIPES}


@pytest.mark.parametrize('path', RECIPES, ids=names(RECIPES))
def test_folder_readme_lists_the_recipe(path):
    entry = recipe_entries()[str(path.relative_to(ROOT))]
    text = (path.parent / 'README.md').read_text()
    row = next(line for line in text.splitlines() if line.startswith('|') and path.name in line)
    if 'Float box AP' in entry['Metadata']:
        assert f'| {entry["Metadata"]["Float box AP"]} |' in row


# the largest ones take a minute
LARGE = ('rcnn', 'detr', 'dino')
SMALL = [pytest.param(p, marks=pytest.mark.slow) if any(k in p.name for k in LARGE) else p for p in RECIPES]


@pytest.mark.parametrize('path', SMALL, ids=names(RECIPES))
def test_recipe_wraps_completely(path):
    config = load(path)
    init_default_scope('mmdet')
    model = config.model.copy()
    replace_sync_bn(model)
    detector = MODELS.build(model).eval()
    # min-max scales: which layers are covered does not depend on how well their scales are chosen
    block = PTQConfig.from_dict(
        dict(weights=dict(observer=dict(type='mmdet_ptq.MinMaxObserver'))), preset='w8a8_observe'
    )
    # as many positions as DINO has queries
    size = (256, 256) if path.parent.name == 'dino' else (160, 160)
    sample = DetDataSample(
        metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1.0, 1.0))
    )
    image = torch.randn(1, 3, *size)
    with torch.no_grad():
        structure = prepare_detector(detector, block, lambda: detector(image, [sample.clone()], mode='predict'))
    open_rows = [row.name for row in coverage_rows(structure) if row.macs and not row.integer]
    # what decodes distributions into boxes; torch's attention, which is one operation
    named = dict(gfl='bbox_head.integral', nanodet='bbox_head.integral', detr='attn', dino='attn').get(path.parent.name)
    assert bool(open_rows) == bool(named) and all(named in name for name in open_rows)
    assert integer_mac_share(structure) > dict(gfl=0.9999, nanodet=0.999, detr=0.8, dino=0.8).get(
        path.parent.name, 1 - 1e-9
    )
    heads = {'rpn_head', 'roi_head'} if hasattr(detector, 'roi_head') else {'bbox_head'}
    parts = {layer.part for layer in structure.layers}
    assert {'backbone', 'neck'} | heads <= parts
