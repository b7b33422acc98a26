"""What a ``ptq`` block asks of the tiny RetinaNet, read plainly from its text, and whether that is what came of it."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from typing import Any

from mmdet_ptq.config.presets import HEAD_POLICIES, PRESETS, RECONSTRUCTION_METHODS
from mmdet_ptq.wrapping import Structure

# of the tiny RetinaNet, whatever the package finds
HEAD, FIRST, LAST = 'bbox_head.', ('backbone.conv1',), ('bbox_head.retina_cls', 'bbox_head.retina_reg')
DEFAULTS = {
    'weights': dict(bits=8, quantizer=dict(type='mmdet_ptq.AffineQuantizer')),
    'activations': dict(
        bits=8,
        quantizer=dict(type='mmdet_ptq.AffineQuantizer'),
        observer=dict(type='mmdet_ptq.FisherObserver'),
        depthwise_per_channel=True,
    ),
}
SECTIONS = ('calibration', 'protect', 'reconstruct', 'global_loss')


class Otherwise(Exception):
    """Something else happened than was asked."""


def changes(block: dict, layer: str, part: str) -> Iterator[dict]:
    """What the block says of a layer's weights or activations; later ones win."""
    preset = PRESETS[block.get('preset') or 'w8a8']
    places = [('head', layer.startswith(HEAD)), ('first', layer in FIRST), ('last', layer in LAST)]
    for source in (preset, block):
        yield source.get(part, {})
    for key, applies in places:
        for source in (preset, block):
            value = source.get(key, {})
            value = HEAD_POLICIES[value] if isinstance(value, str) else value
            yield value.get(part, {}) if applies else {}
    for source in (preset, block):
        value = source.get('head', {})
        value = HEAD_POLICIES[value] if isinstance(value, str) else value
        value = value.get('last', {}) if layer in LAST else {}
        yield (HEAD_POLICIES[value] if isinstance(value, str) else value).get(part, {})
    for pattern, value in block.get('overrides', {}).items():
        if fnmatch.fnmatchcase(layer, pattern) or fnmatch.fnmatchcase(layer, f'{pattern}.*'):
            yield dict(float=True) if value == 'float' else value.get(part, {})


def kind(config: dict) -> str:
    return config.get('type', '').rpartition('.')[2]


def asked(block: dict, layer: str, part: str) -> dict:
    """Bits, number format, observer and whether it stays float."""
    result: dict[str, Any] = {'float': False, **DEFAULTS[part]}
    for change in changes(block, layer, part):
        for key, value in change.items():
            if key in ('quantizer', 'observer') and 'type' in value and kind(value) != kind(result.get(key, {})):
                result[key] = value
            elif key in ('quantizer', 'observer'):
                result[key] = {**result.get(key, {}), **value}
            else:
                result[key] = value
    return result


def holds(spec: dict, asked: dict) -> bool:
    """Whether a quantizer is what was asked; ``mode='auto'`` chooses between two."""
    options = {key: value for key, value in asked['quantizer'].items() if key != 'type'}
    if options.get('mode') == 'auto':
        return spec['bits'] == asked['bits']
    same = spec['bits'] == asked['bits'] and kind(spec) == kind(asked['quantizer'])
    return same and all(spec.get(key) == value for key, value in options.items())


def check_structure(structure: Structure, block: dict) -> None:
    """Compares each layer's formats with what the block says.

    Raises:
        Otherwise: A layer has another one.
    """
    readers: dict[str, list[dict]] = {}
    for layer in structure.layers:
        weights, activations = (asked(block, layer.name, part) for part in ('weights', 'activations'))
        if (layer.weight is None) != weights['float'] or (None in layer.inputs) != activations['float']:
            raise Otherwise(f'{layer.name} is float where it should not be, or the other way: {layer}')
        if layer.weight is not None and not holds(layer.weight, weights):
            raise Otherwise(f'{layer.name}: weight {layer.weight}, asked {weights}')
        for name in filter(None, layer.inputs):
            readers.setdefault(name, []).append(activations)
    for name, wanted in readers.items():
        # one tensor has one quantizer: the widest that a reader asks for
        widest = [each for each in wanted if each['bits'] == max(other['bits'] for other in wanted)]
        found = structure.activations[name]
        if not any(holds(found.spec, each) and found.observer == each['observer'] for each in widest):
            raise Otherwise(f'{name}: {found}, asked {widest}')


def check_sections(read: dict, block: dict) -> None:
    """Compares the settings of the stages with what the block says.

    Args:
        read: The block as the package read it, as a dict.
        block: The block's text.

    Raises:
        Otherwise: A setting has another value, or a stage is on that should be off, or off that should be on.
    """
    preset = PRESETS[block.get('preset') or 'w8a8']
    for key in SECTIONS:
        value = block.get(key, preset.get(key))
        value = {} if key == 'calibration' and value is None else value
        if (value is None) != (read[key] is None):
            raise Otherwise(f'{key} is {read[key]}, asked {value}')
        if value is None:
            continue
        value = dict(method=value) if isinstance(value, str) else value
        method = RECONSTRUCTION_METHODS.get(value.get('method'), {}) if key == 'reconstruct' else {}
        for name, wanted in {**preset.get(key, {}), **method, **value}.items():
            same = read[key][name] == (wanted if not isinstance(wanted, tuple) else list(wanted))
            # a dict's own `type` is read with mmengine's defaults around it
            if not same and not (isinstance(wanted, dict) and wanted.items() <= read[key][name].items()):
                raise Otherwise(f'{key}.{name} is {read[key][name]!r}, asked {wanted!r}')
    if [*block.get('export', [])] != read['export']:
        raise Otherwise(f'export is {read["export"]}, asked {block.get("export")}')
