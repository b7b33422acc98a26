"""Sensitivity for people: the ranking as tables, the lines to paste, and ``sensitivity.json``."""

from __future__ import annotations

import textwrap
from pathlib import Path

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from mmdet_ptq.analysis.sensitivity_plot import sensitivity_picture
from mmdet_ptq.analysis.table import ABSENT, format_bytes
from mmdet_ptq.calibration.protection.budget import RUNTIME_BITS
from mmdet_ptq.calibration.protection.damage import Damage
from mmdet_ptq.calibration.protection.protect import Protection
from mmdet_ptq.calibration.protection.sensitivity import Sensitivities
from mmdet_ptq.files import write_atomic, write_json
from mmdet_ptq.progress import output

SCHEMA = 1
TOP = 20
NO_BREAK = '\u00a0'
JSON, PICTURE = 'sensitivity.json', 'sensitivity.png'


def groups_table(sensitivities: Sensitivities) -> Table:
    """The parts of the detector, the most sensitive first.

    Args:
        sensitivities: See :func:`mmdet_ptq.calibration.protection.sensitivity.measure_sensitivity`.
    """
    table = _table(
        f'sensitivity of parts, each quantized alone ({sensitivities.num_images} calibration images)',
        ('part', 'left'),
        ('tensors', 'right'),
    )
    for group in sensitivities.groups:
        table.add_row(group.name, str(group.tensors), *_damage_cells(group.damage))
    table.add_section()
    table.add_row('everything', str(len(sensitivities.tensors)), *_damage_cells(sensitivities.total))
    return table


def tensors_table(sensitivities: Sensitivities) -> Table:
    """The most sensitive tensors.

    Args:
        sensitivities: See :func:`mmdet_ptq.calibration.protection.sensitivity.measure_sensitivity`.
    """
    total = len(sensitivities.tensors)
    table = _table(
        f'sensitivity of tensors, each quantized alone (the first {min(TOP, total)} of {total})',
        ('tensor', 'left'),
        ('part', 'left'),
        ('level', 'right'),
        ('bits', 'right'),
    )
    table.add_column('output\nerror', justify='right', no_wrap=True)
    for tensor in sensitivities.tensors[:TOP]:
        error = tensor.damage.output_error
        told = ABSENT if error is None else f'{100 * error:.2g} %'
        table.add_row(
            tensor.label,
            tensor.part,
            ABSENT if tensor.level is None else str(tensor.level),
            str(tensor.bits),
            *_damage_cells(tensor.damage),
            told,
        )
    return table


def protection_table(protection: Protection) -> Table:
    """What protection changed.

    Args:
        protection: See :func:`mmdet_ptq.calibration.protection.protect.protect_detector`.
    """
    before, after = protection.before.loss, protection.after.loss
    table = Table(title=f'protected tensors: loss of the whole detector {before:.4g} -> {after:.4g}')
    for heading in ('tensor', 'was', 'now'):
        table.add_column(heading, no_wrap=True)
    for heading in ('loss\nbefore', 'loss\nafter', 'size', 'bit\noperations', 'float\nMACs'):
        table.add_column(heading, justify='right', no_wrap=True)
    for choice in protection.choices:
        sign = '-' if choice.size_bytes < 0 else '+'
        table.add_row(
            choice.tensor,
            choice.was,
            choice.now,
            f'{choice.loss_before:.3g}',
            f'{choice.loss_after:.3g}',
            sign + format_bytes(abs(choice.size_bytes)),
            f'{choice.bops / max(protection.bops, 1):+.1%}',
            str(choice.float_macs),
        )
    return table


def config_lines(overrides: dict) -> str:
    """Overrides as the lines to paste into a config's ``ptq`` block.

    Args:
        overrides: From :attr:`mmdet_ptq.calibration.protection.protect.Protection.overrides`.
    """
    # no `ptq = dict(...)` around them: that would replace the config's own block, its preset included
    lines = ['overrides={']
    for layer, policy in overrides.items():
        is_float = policy.get('activations', {}).get('bits', 0) > RUNTIME_BITS
        lines.append(f'    {layer!r}: {policy!r},' + ('  # runtimes compute this layer in float' if is_float else ''))
    return '\n'.join([*lines, '},'])


def print_sensitivity(sensitivities: Sensitivities, protection: Protection, console: Console | None = None) -> None:
    """Prints the rankings, what mends them, and the lines to paste.

    Args:
        sensitivities: See :func:`mmdet_ptq.calibration.protection.sensitivity.measure_sensitivity`.
        protection: What protection would change.
        console: Where to. Defaults to the terminal.
    """
    console = console or output()
    _print_table(groups_table(sensitivities), console)
    _print_table(tensors_table(sensitivities), console)
    print_protection(protection, console)


def print_protection(protection: Protection, console: Console | None = None) -> None:
    """Prints what protection changed, and the lines that give the same formats again.

    Args:
        protection: See :func:`mmdet_ptq.calibration.protection.protect.protect_detector`.
        console: Where to. Defaults to the terminal.
    """
    console = console or output()
    if not protection.overrides:
        console.print('No other format would help noticeably: the config needs no overrides.')
        return
    _print_table(protection_table(protection), console)
    console.print('Paste into the `ptq` block of the config (if it has `overrides` already, add the entries to them):')
    # not wrapped and not coloured, so that it can be copied
    console.out(config_lines(protection.overrides), highlight=False)


def write_sensitivity(folder: str | Path, sensitivities: Sensitivities, protection: Protection) -> None:
    """Writes ``sensitivity.json`` and ``sensitivity.png``.

    Args:
        folder: The work directory.
        sensitivities: See :func:`mmdet_ptq.calibration.protection.sensitivity.measure_sensitivity`.
        protection: What protection would change.
    """
    folder = Path(folder)
    write_json(folder / JSON, dict(schema=SCHEMA, **sensitivities.to_dict(), protection=protection.to_dict()))
    picture = sensitivity_picture(sensitivities)
    write_atomic(folder / PICTURE, lambda file: file.write(picture))


def _table(title: str, *columns: tuple[str, str]) -> Table:
    table = Table(title=title)
    for heading, justify in (*columns, ('loss', 'right'), ('1 - IoU', 'right'), ('score\nchange', 'right')):
        table.add_column(heading, justify=justify, no_wrap=True)
    return table


def _print_table(table: Table, console: Console) -> None:
    """Prints a table without breaking a name: row by row in words where a terminal is too narrow for it."""
    # as wide as it would like to be
    width = Measurement.get(console, console.options.update(max_width=10**4), table).maximum
    if not console.is_terminal:
        console = Console(file=console.file, width=max(width, console.width))
    if width <= console.width:
        console.print(table)
        return
    console.print(Text(table.title, style='table.title'))
    headings = [' '.join(column.header.split()) for column in table.columns]
    for name, *figures in zip(*(column.cells for column in table.columns), strict=True):
        console.print(Text(name), soft_wrap=True)
        # a figure stays with its name and its unit
        facts = [
            f'{heading} {figure}'.replace(' ', NO_BREAK)
            for heading, figure in zip(headings[1:], figures, strict=True)
            if figure != ABSENT
        ]
        for line in textwrap.wrap(', '.join(facts), console.width - 4):
            console.print(Text('    ' + line.replace(NO_BREAK, ' ')), soft_wrap=True)


def _damage_cells(damage: Damage) -> list[str]:
    shares = [ABSENT if v is None else f'{100 * v:.1f} %' for v in (damage.iou_loss, damage.score_change)]
    return [f'{damage.loss:.3g}', *shares]
