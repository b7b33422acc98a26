"""The report's pictures, as files in memory. Titles say what the picture shows, in numbers."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from mmdet_ptq.analysis.detected.detections import SCORE_THR, DetectionPair, match
from mmdet_ptq.analysis.drift import LayerError, ScoreDrift
from mmdet_ptq.analysis.weight_grids import WeightGrid

# Okabe and Ito's palette, which colour-blind readers can tell apart, without black and with yellow darkened
PALETTE = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00', '#9A8A00', '#7A5195')
FLOAT, QUANTIZED, INK, FAINT = PALETTE[0], PALETTE[5], '#222222', '#8A8F98'
STYLE = {
    'font.family': 'DejaVu Sans',
    'font.size': 9,
    'text.color': INK,
    'axes.labelcolor': INK,
    'axes.edgecolor': FAINT,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.titlesize': 9,
    'axes.titlelocation': 'left',
    'axes.linewidth': 0.8,
    'xtick.color': INK,
    'ytick.color': INK,
    'xtick.labelsize': 8,
    'ytick.labelsize': 8,
    'legend.frameon': False,
    'legend.fontsize': 8,
    'figure.constrained_layout.use': True,
}
DPI = 144


def detections_picture(pair: DetectionPair, classes: Sequence[str], colours: Mapping[int, str]) -> bytes:
    """Float detections on the left, quantized ones on the right; dashed are those without a partner.

    Args:
        pair: The image and what both detectors see in it.
        classes: Class names; an index stands in where they are too few.
        colours: One colour per class, from :func:`class_colours`.

    Returns:
        A JPEG: a photograph as PNG is several times as large.
    """
    before, after = pair.before.above(SCORE_THR), pair.after.above(SCORE_THR)
    pairs = match(before, after)
    height, width = pair.image.shape[:2]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, min(10 * height / (2 * width), 9) + 0.4))
        axes = figure.subplots(1, 2)
        sides = (('float', before, {i for i, _, _ in pairs}), ('quantized', after, {j for _, j, _ in pairs}))
        for ax, (side, found, matched) in zip(axes, sides, strict=True):
            ax.imshow(pair.image)
            ax.set_axis_off()
            alone = len(found) - len(matched)
            ax.set_title(f'{side}: {_count(len(found), "object")}' + (f', {alone} without a partner' if alone else ''))
            for i in range(len(found)):
                label = int(found.labels[i])
                name = classes[label] if label < len(classes) else f'class {label}'
                _draw_box(ax, found.boxes[i], f'{name} {found.scores[i]:.2f}', colours[label], i in matched)
        return file_of(figure, 'jpeg')


def _draw_box(ax: Axes, box: np.ndarray, text: str, colour: str, matched: bool) -> None:
    x1, y1, x2, y2 = box
    ax.add_patch(
        Rectangle(
            (x1, y1),
            x2 - x1,
            y2 - y1,
            fill=False,
            edgecolor=colour,
            linewidth=1.6,
            linestyle='-' if matched else (0, (3, 2)),
        )
    )
    # inside the box where there is no room above it
    bottom, top = ax.get_ylim()
    above = y1 > top + 0.05 * (bottom - top)
    ax.text(
        max(x1, 0),
        max(y1, top),
        text,
        color='white',
        fontsize=6.5,
        clip_on=True,
        va='bottom' if above else 'top',
        bbox=dict(facecolor=colour, edgecolor='none', pad=1.0, alpha=0.85),
    )


def class_colours(pairs: Sequence[DetectionPair]) -> dict[int, str]:
    """A colour for each class that is seen, the same in all images; they repeat only after eight classes.

    Args:
        pairs: The images and what both detectors see in them.
    """
    seen = Counter(
        int(label) for pair in pairs for side in (pair.before, pair.after) for label in side.above(SCORE_THR).labels
    )
    return {label: PALETTE[i % len(PALETTE)] for i, (label, _) in enumerate(seen.most_common())}


def detections_finding(pairs: Sequence[DetectionPair]) -> str:
    """One sentence on how many detections have a partner in the other detector.

    Args:
        pairs: The images and what both detectors see in them.
    """
    shown = [(pair.before.above(SCORE_THR), pair.after.above(SCORE_THR)) for pair in pairs]
    kept = sum(len(match(before, after)) for before, after in shown)
    total, new = (sum(len(side[i]) for side in shown) for i in (0, 1))
    if not total and not new:
        return f'Neither detector sees an object with a score of {SCORE_THR} or more.'
    return (
        f"The quantized detector finds {kept} of the float detector's {_count(total, 'object')} again "
        f'and {_count(new - kept, "other")} (score {SCORE_THR} or more; dashed: without a partner).'
    )


def weights_picture(grids: Sequence[WeightGrid]) -> bytes:
    """Histograms of float weights, with the values that the quantized ones may take as ticks below.

    Args:
        grids: The layers to show, at least one.
    """
    columns = min(3, len(grids))
    rows = math.ceil(len(grids) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * columns, 2.5 * rows + 0.3))
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax, grid in zip(axes, grids, strict=False):
            _draw_weights(ax, grid)
        for ax in axes[len(grids) :]:
            ax.set_axis_off()
        figure.legend(
            handles=[
                Patch(color=FLOAT, alpha=0.75, label='float weights'),
                Patch(color=QUANTIZED, label='values the format offers'),
            ],
            loc='outside upper right',
            ncols=2,
        )
        figure.supxlabel("weight / the channel's largest value in the format", fontsize=8)
        return file_of(figure)


def _draw_weights(ax: Axes, grid: WeightGrid) -> None:
    reach = max(1.05, min(float(np.abs(grid.weights).max()) * 1.02, 3.0))
    counts, edges = np.histogram(grid.weights.clip(-reach, reach), bins=81, range=(-reach, reach))
    share = counts / counts.sum()
    ax.set_yscale('log')
    floor, top = share[share > 0].min() / 2, share.max() * 2
    band = (top / floor) ** 0.16
    ax.stairs(share.clip(floor), edges, baseline=floor, fill=True, color=FLOAT, alpha=0.75)
    ax.set(
        xlim=(-reach, reach),
        ylim=(floor / band, top),
        xticks=[tick for tick in (-2, -1, -0.5, 0, 0.5, 1, 2) if abs(tick) <= reach],
    )
    thinned = f', 1 value in {grid.step}' if grid.step > 1 else ''
    ax.vlines(grid.levels, floor / band, floor / band**0.2, color=QUANTIZED, linewidth=0.9)
    ax.set_yticks([tick for tick in (1e-4, 1e-3, 1e-2, 1e-1) if floor <= tick <= top])
    ax.minorticks_off()
    ax.yaxis.set_major_formatter(lambda value, _: f'{100 * value:g} %')
    ax.set_title(f'{shorten(grid.layer, 48)}\n{grid.format}: {grid.sqnr_db:.0f} dB{thinned}', fontsize=8)


def errors_picture(errors: Sequence[LayerError]) -> bytes:
    """Signal to noise of every layer's output, in the order of the forward pass.

    Args:
        errors: At least one layer.
    """
    finite = [error.sqnr_db for error in errors if math.isfinite(error.sqnr_db)]
    ceiling = max(finite, default=60.0)
    values = [min(error.sqnr_db, ceiling) for error in errors]
    parts = list(dict.fromkeys(error.part for error in errors))
    colours = {part: PALETTE[i % len(PALETTE)] for i, part in enumerate(parts)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6))
        ax = figure.subplots()
        ax.bar(range(len(errors)), values, color=[colours[error.part] for error in errors], width=0.85)
        ax.set_xlim(-0.7, len(errors) - 0.3)
        ax.set_ylim(min(0.0, *values) if min(values) < 0 else 0, max(*values, 1.0) * 1.02)
        ax.set_ylabel('signal to noise, dB')
        ax.set_xlabel('layers, in the order of the forward pass')
        ax.set_xticks([])
        ax.grid(axis='y', color=FAINT, alpha=0.3, linewidth=0.6)
        ax.set_axisbelow(True)
        for rank, i in enumerate(_noisiest(errors), 1):
            ax.annotate(
                str(rank),
                (i, max(values[i], 0)),
                xytext=(0, 2),
                textcoords='offset points',
                ha='center',
                fontsize=8,
                fontweight='bold',
            )
        figure.legend(
            handles=[Patch(color=colours[part], label=part) for part in parts],
            loc='outside upper left',
            ncols=len(parts),
        )
        return file_of(figure)


def errors_finding(errors: Sequence[LayerError]) -> str:
    """One sentence that names the three noisiest layers, numbered as in the picture.

    Args:
        errors: At least one layer.
    """
    named = (f'({rank}) {errors[i].layer}, {errors[i].sqnr_db:.1f} dB' for rank, i in enumerate(_noisiest(errors), 1))
    return f'Noisiest: {"; ".join(named)}.'


def _noisiest(errors: Sequence[LayerError]) -> list[int]:
    return sorted(range(len(errors)), key=lambda i: errors[i].sqnr_db)[:3]


def drift_picture(drift: ScoreDrift) -> bytes:
    """Confidences against each other, and how far the boxes of the same priors overlap.

    Args:
        drift: Drift with at least one prior.
    """
    before, after, ious = (t.numpy() for t in (drift.float_scores, drift.quantized_scores, drift.ious))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.2) if len(ious) else (5, 4.2))
        axes = figure.subplots(1, 2 if len(ious) else 1, squeeze=False)[0]
        scores = axes[0]
        scores.plot((0, 1), (0, 1), color=FAINT, linewidth=0.8, zorder=1)
        scores.scatter(before, after, s=9, color=QUANTIZED, alpha=min(0.7, max(0.08, 150 / len(before))), linewidths=0)
        scores.set(
            xlim=(0, 1),
            ylim=(0, 1),
            aspect='equal',
            xlabel='confidence, float detector',
            ylabel='confidence, quantized detector',
        )
        scores.set_title(
            f'{_count(len(before), "box", "boxes")}: confidence moves by {drift.mean_drift:.3f} '
            f'(signed: {drift.mean_shift:+.3f})'
        )
        if len(ious):
            overlap = axes[1]
            counts, edges = np.histogram(ious.clip(0, 1), bins=40, range=(0, 1))
            overlap.stairs(100 * counts / counts.sum(), edges, fill=True, color=FLOAT, alpha=0.75)
            overlap.set(xlim=(0, 1), xlabel='IoU of the float and the quantized box', ylabel='share of the boxes, %')
            overlap.set_title(f'{100 * (ious >= 0.9).mean():.0f} % of the boxes keep an IoU of 0.9 or more')
        return file_of(figure)


def _count(number: int, one: str, many: str | None = None) -> str:
    return f'{number} {one if number == 1 else many or one + "s"}'


def shorten(name: str, length: int) -> str:
    """Drops leading components of a layer's path until it fits, and leading letters of a last one that does not."""
    if len(name) <= length:
        return name
    parts = name.split('.')
    while len(parts) > 1 and len('.'.join(parts)) > length - 2:
        del parts[0]
    return '… ' + '.'.join(parts)[2 - length :]


def file_of(figure: Figure, kind: str = 'png') -> bytes:
    buffer = io.BytesIO()
    figure.savefig(
        buffer,
        format=kind,
        dpi=DPI,
        bbox_inches='tight',
        pad_inches=0.06,
        pil_kwargs={'quality': 90} if kind == 'jpeg' else None,
    )
    return buffer.getvalue()
