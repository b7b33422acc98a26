"""Sensitivity for people: the ranking as tables, the lines to paste, and ``sensitivity.json``."""
from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..calibration.meter import Damage
from ..calibration.protect import Protection
from ..calibration.sensitivity import Sensitivities
from ..files import write_atomic, write_json
from .sensitivity_plot import sensitivity_picture
from .table import ABSENT, format_bytes

SCHEMA = 1
TOP = 20
JSON, PICTURE = 'sensitivity.json', 'sensitivity.png'


def groups_table(sensitivities: Sensitivities) -> Table:
    """The parts of the detector, the most sensitive first.

    Args:
        sensitivities: See :func:`mmdet_ptq.calibration.sensitivity.measure_sensitivity`.
    """
    table = _table(f'sensitivity of parts, each quantized alone ({sensitivities.num_images} calibration images)',
                   ('part', 'left'), ('tensors', 'right'))
    for group in sensitivities.groups:
        table.add_row(group.name, str(group.tensors), *_damage_cells(group.damage))
    table.add_section()
    table.add_row('everything', str(len(sensitivities.tensors)), *_damage_cells(sensitivities.total))
    return table


def tensors_table(sensitivities: Sensitivities, top: int = TOP) -> Table:
    """The most sensitive tensors.

    Args:
        sensitivities: See :func:`mmdet_ptq.calibration.sensitivity.measure_sensitivity`.
        top: Number of rows. Defaults to 20.
    """
    total = len(sensitivities.tensors)
    table = _table(f'sensitivity of tensors, each quantized alone (the first {min(top, total)} of {total})',
                   ('tensor', 'left'), ('part', 'left'), ('level', 'right'), ('bits', 'right'))
    table.add_column('output error', justify='right')
    for tensor in sensitivities.tensors[:top]:
        error = tensor.damage.output_error
        told = ABSENT if error is None else f'{100 * error:.2g} %'
        table.add_row(tensor.label, tensor.part, ABSENT if tensor.level is None else str(tensor.level),
                      str(tensor.bits), *_damage_cells(tensor.damage), told)
    return table


def protection_table(protection: Protection) -> Table:
    """What protection changed.

    Args:
        protection: See :func:`mmdet_ptq.calibration.protect.protect_detector`.
    """
    before, after = protection.before.loss, protection.after.loss
    table = Table(title=f'protected tensors: loss of the whole detector {before:.4g} -> {after:.4g}')
    for heading in ('tensor', 'was', 'now'):
        table.add_column(heading, overflow='fold')
    for heading in ('loss before', 'loss after', 'size', 'bit operations', 'float MACs'):
        table.add_column(heading, justify='right')
    for choice in protection.choices:
        sign = '-' if choice.size_bytes < 0 else '+'
        table.add_row(choice.tensor, choice.was, choice.now, f'{choice.loss_before:.3g}', f'{choice.loss_after:.3g}',
                      sign + format_bytes(abs(choice.size_bytes)), f'{choice.bops / max(protection.bops, 1):+.1%}',
                      str(choice.float_macs))
    return table


def config_lines(overrides: dict) -> str:
    """Overrides as the lines to paste into a config's ``ptq`` block.

    Args:
        overrides: From :attr:`mmdet_ptq.calibration.protect.Protection.overrides`.
    """
    # mmengine merges it into what the base configs say
    entries = ''.join(f'    {layer!r}: {policy!r},\n' for layer, policy in overrides.items())
    return f'ptq = dict(overrides={{\n{entries}}})'


def print_sensitivity(sensitivities: Sensitivities, protection: Protection, console: Console | None = None) -> None:
    """Prints the rankings, what mends them, and the lines to paste.

    Args:
        sensitivities: See :func:`mmdet_ptq.calibration.sensitivity.measure_sensitivity`.
        protection: What protection would change.
        console: Where to. Defaults to the terminal.
    """
    console = console or Console()
    console.print(groups_table(sensitivities))
    console.print(tensors_table(sensitivities))
    print_protection(protection, console)


def print_protection(protection: Protection, console: Console | None = None) -> None:
    """Prints what protection changed, and the lines that give the same formats again.

    Args:
        protection: See :func:`mmdet_ptq.calibration.protect.protect_detector`.
        console: Where to. Defaults to the terminal.
    """
    console = console or Console()
    if not protection.overrides:
        console.print('No other format would help noticeably: the config needs no overrides.')
        return
    console.print(protection_table(protection))
    console.print('Paste into the config:')
    # not wrapped and not coloured, so that it can be copied
    console.out(config_lines(protection.overrides), highlight=False)


def write_sensitivity(folder: str | Path, sensitivities: Sensitivities, protection: Protection) -> None:
    """Writes ``sensitivity.json`` and ``sensitivity.png``.

    Args:
        folder: The work directory.
        sensitivities: See :func:`mmdet_ptq.calibration.sensitivity.measure_sensitivity`.
        protection: What protection would change.
    """
    folder = Path(folder)
    write_json(folder / JSON, dict(schema=SCHEMA, **sensitivities.to_dict(), protection=protection.to_dict()))
    picture = sensitivity_picture(sensitivities)
    write_atomic(folder / PICTURE, lambda file: file.write(picture))


def _table(title: str, *columns: tuple[str, str]) -> Table:
    table = Table(title=title)
    for heading, justify in (*columns, ('loss', 'right'), ('1 - IoU', 'right'), ('score change', 'right')):
        table.add_column(heading, justify=justify, overflow='fold')
    return table


def _damage_cells(damage: Damage) -> list[str]:
    shares = [ABSENT if v is None else f'{100 * v:.1f} %' for v in (damage.iou_loss, damage.score_change)]
    return [f'{damage.loss:.3g}', *shares]
