"""The picture of a sensitivity analysis: which part and which tensor cost the detections most."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mmdet_ptq.analysis.pictures import FAINT, PALETTE, STYLE, file_of, shorten
from mmdet_ptq.calibration.protection.damage import Damage
from mmdet_ptq.calibration.protection.sensitivity import ACTIVATION, Sensitivities

LABEL_LENGTH = 60
WEIGHT_HATCH = '////'


def sensitivity_picture(sensitivities: Sensitivities, top: int = 20) -> bytes:
    """Bars of the filtered global loss: parts above, the most sensitive tensors below, on the same scale.

    Args:
        sensitivities: See :func:`mmdet_ptq.calibration.protection.sensitivity.measure_sensitivity`.
        top: Number of tensors. Defaults to 20.

    Returns:
        A PNG.
    """
    groups, tensors = sensitivities.groups, sensitivities.tensors[:top]
    parts = list(dict.fromkeys(tensor.part for tensor in sensitivities.tensors))
    colours = {part: PALETTE[i % len(PALETTE)] for i, part in enumerate(parts)}
    rows = len(groups) + 1, len(tensors)
    with matplotlib.rc_context({**STYLE, 'hatch.linewidth': 0.8}):
        figure = Figure(figsize=(10, 1.9 + 0.25 * sum(rows)))
        above, below = figure.subplots(2, 1, height_ratios=rows, sharex=True)
        _bars(
            above,
            ['everything', *(group.name for group in groups)],
            [sensitivities.total, *(group.damage for group in groups)],
            [FAINT, *(colours.get(group.name, FAINT) for group in groups)],
        )
        above.set_title('Parts of the detector, each quantized alone', fontweight='bold')
        bars = _bars(
            below,
            [_label(tensor.label) for tensor in tensors],
            [tensor.damage for tensor in tensors],
            [colours[tensor.part] for tensor in tensors],
        )
        for bar, tensor in zip(bars, tensors, strict=True):
            if tensor.kind != ACTIVATION:
                bar.set(hatch=WEIGHT_HATCH, edgecolor='white')
        below.set_title(
            f'The {len(tensors)} most sensitive of {len(sensitivities.tensors)} tensors, each quantized alone',
            fontweight='bold',
        )
        below.set_xlabel(
            'filtered global loss against the float detector, '
            f'{sensitivities.num_images} calibration images (0: detections unchanged)'
        )
        figure.suptitle(finding(sensitivities), x=0.01, ha='left', fontsize=11, fontweight='bold')
        shown = [
            part
            for part in parts
            if any(tensor.part == part for tensor in tensors) or any(group.name == part for group in groups)
        ]
        figure.legend(
            handles=[
                *(Patch(color=colours[part], label=part) for part in shown),
                Patch(facecolor=FAINT, label='activation'),
                Patch(facecolor=FAINT, edgecolor='white', hatch=WEIGHT_HATCH, label='weight'),
            ],
            loc='outside lower left',
            ncols=5,
        )
        return file_of(figure)


def finding(sensitivities: Sensitivities) -> str:
    """One sentence that names the most sensitive tensor and what it costs by itself."""
    worst = sensitivities.tensors[0]
    if worst.damage.loss == 0:
        return 'Quantization leaves the detections unchanged'
    total = sensitivities.total.loss
    share = f' of {total:.3g} with everything quantized' if total else ''
    return f'Most sensitive: {_label(worst.label)}, loss {worst.damage.loss:.3g}{share}'


def _label(label: str) -> str:
    what, _, name = label.partition(' of ')
    return f'{what} of {shorten(name, LABEL_LENGTH)}'


def _bars(axes: Axes, labels: Sequence[str], damages: Sequence[Damage], colours: Sequence[str]):
    """Horizontal bars, the first on top, with their figures in columns to the right."""
    places = range(len(labels))
    bars = axes.barh(places, [damage.loss for damage in damages], color=colours, height=0.72)
    axes.set_yticks(places, labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis='y', length=0)
    axes.margins(x=0.02)
    for column, heading in enumerate(('loss', '1 - IoU', 'scores')):
        x = 1.07 + 0.09 * column
        axes.annotate(
            heading,
            (x, 1),
            xytext=(0, 4),
            xycoords='axes fraction',
            textcoords='offset points',
            ha='right',
            color=FAINT,
            fontsize=8,
        )
        for place, damage in zip(places, damages, strict=True):
            axes.text(
                x,
                place,
                _figures(damage)[column],
                transform=axes.get_yaxis_transform(),
                ha='right',
                va='center_baseline',
                fontsize=8,
            )
    return bars


def _figures(damage: Damage) -> list[str]:
    shares = ['-' if v is None else f'{100 * v:.1f} %' for v in (damage.iou_loss, damage.score_change)]
    return [f'{damage.loss:.3g}' if damage.loss >= 1e-3 or damage.loss == 0 else '< 0.001', *shares]
