"""``report.html``: what a run gained and lost, on one page that needs nothing else."""

from __future__ import annotations

import base64
import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from mmengine.logging import print_log
from torch import nn

from mmdet_ptq.analysis import pictures
from mmdet_ptq.analysis.advice import closing_lines
from mmdet_ptq.analysis.cost import PartSummary, part_summary
from mmdet_ptq.analysis.detected.detections import SCORE_THR, DetectionPair, detect_both
from mmdet_ptq.analysis.drift import LayerError, layer_errors, score_drift
from mmdet_ptq.analysis.figures import headline_metric, metric_value, model_name, points
from mmdet_ptq.analysis.table import format_bytes, format_count, model_lines, result_lines
from mmdet_ptq.analysis.verdict import shipped_row, verdict
from mmdet_ptq.analysis.weight_grids import weight_grids
from mmdet_ptq.errors import PTQError
from mmdet_ptq.files import write_text
from mmdet_ptq.wrapping import Structure, coverage_rows, integer_mac_share
from mmdet_ptq.wrapping.watching.attention import open_attentions

REPORT = 'report.html'
NUM_IMAGES = 4
# what `mmdet-ptq analyze` leaves
SENSITIVITY = 'sensitivity.json'
# rows of a table that stand open
MOST_ROWS = 8


@dataclass
class Picture:
    """A picture of the report.

    Attributes:
        alt: What it shows, for those who cannot see it.
        data: The picture, PNG or JPEG.
        caption: What stands below. Defaults to nothing.
    """

    alt: str
    data: bytes
    caption: str = ''

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        kind = 'png' if self.data.startswith(b'\x89PNG') else 'jpeg'
        return f'data:image/{kind};base64,{base64.b64encode(self.data).decode()}'


@dataclass
class Section:
    """One chapter of pictures.

    Attributes:
        title: Its heading.
        text: What the pictures show; or, without pictures, why there are none.
        pictures: The pictures.
        errors: Layer errors that stand below as a table.
    """

    title: str
    text: str
    pictures: list[Picture] = field(default_factory=list)
    errors: list[LayerError] = field(default_factory=list)


@dataclass
class Headline:
    """One of the large figures at the top.

    Attributes:
        label: What is measured.
        value: The figure.
        detail: Where it comes from.
        kind: ``'loss'``, ``'gain'`` or, where it is neither, ''.
    """

    label: str
    value: str
    detail: str
    kind: str = ''


@dataclass
class ReportInputs:
    """Everything on the page.

    Attributes:
        results: See :func:`mmdet_ptq.analysis.results.new_results`.
        structure: The structure of the quantized detector.
        sections: The chapters of pictures.
        sensitivity: Parts of the detector and what quantizing each alone costs, where it was measured.
    """

    results: dict[str, Any]
    structure: Structure
    sections: list[Section] = field(default_factory=list)
    sensitivity: list[dict] = field(default_factory=list)


def build_report(
    work_dir: str | Path,
    results: dict[str, Any],
    structure: Structure,
    detector: nn.Module,
    float_detector: nn.Module | None,
    batches: Sequence[dict[str, Any]],
    worst: Mapping[str, DetectionPair] | None = None,
) -> Path:
    """Draws every picture and writes ``report.html``.

    A picture that this detector or these images do not allow is replaced by one sentence that says why.

    Args:
        work_dir: Where the report goes.
        results: See :func:`mmdet_ptq.analysis.results.new_results`.
        structure: The structure of the quantized detector.
        detector: The quantized detector, in eval mode.
        float_detector: The float detector, wrapped or not; None compares with ``detector`` in float mode,
            which is the same as long as nothing but quantization parameters was trained.
        batches: A few batches as a dataloader yields them, images not yet normalized.
        worst: Captions to the images that changed most, with what both detectors found. Defaults to None: the first
            images of the batches are shown.

    Returns:
        The path of the page.
    """
    if float_detector is not None and structure.attentions:
        float_detector = copy.deepcopy(float_detector)
        open_attentions(float_detector, structure.attentions)
    reference = detector if float_detector is None else float_detector
    classes = (getattr(detector, 'dataset_meta', None) or {}).get('classes', ())
    chapters: dict[str, Callable[[], Section | str]] = {
        'Detections': lambda: _detections(reference, detector, batches, classes, worst),
        'Scores and boxes before suppression': lambda: _drift(reference, detector, batches),
        'Error by layer': lambda: _errors(reference, detector, batches, structure),
        'Weights and their formats': lambda: _weights(detector, structure, float_detector),
    }
    sections = [_chapter(title, draw) for title, draw in chapters.items()]
    inputs = ReportInputs(results, structure, sections, _measured_parts(work_dir))
    path = Path(work_dir) / REPORT
    write_report(path, inputs)
    return path


def write_report(path: str | Path, inputs: ReportInputs) -> None:
    """Writes the page.

    Args:
        path: The HTML file.
        inputs: Everything on it.

    Raises:
        PTQError: The file cannot be written.
    """
    environment = Environment(
        loader=PackageLoader('mmdet_ptq.analysis', '.'),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(count=format_count, percent=in_percent, weights=_weights_by_bits)
    results, structure = inputs.results, inputs.structure
    rows = coverage_rows(structure)
    page = environment.get_template('report.html.j2').render(
        results=results,
        title=Path(results['config']).stem,
        verdict=verdict(results),
        headlines=headlines(results, structure),
        summary=model_lines(results),
        comparison=results.get('comparison'),
        sizes=_sizes(results),
        sensitivity=inputs.sensitivity,
        most=MOST_ROWS,
        models=[model_name(row) for row in results['rows']],
        closing=closing_lines(results),
        lines=result_lines(results) if results['rows'] else [],
        sections=inputs.sections,
        parts=part_summary(structure),
        coverage=rows,
        total_macs=sum(row.macs for row in rows),
        norms=structure.norms,
        recipe=json.dumps(results['recipe'], indent=2, default=str),
    )
    write_text(path, page)


def headlines(results: dict[str, Any], structure: Structure) -> list[Headline]:
    """The figures at the top of the page: accuracy, size, speed, integer share; of the model to ship, if any.

    Args:
        results: See :func:`mmdet_ptq.analysis.results.new_results`.
        structure: The structure of the quantized detector.
    """
    found = []
    before, *others = results['rows'] or [None]
    timed = [row['model'] for row in others if row['latency_ratio'] is not None]
    after = (shipped_row(results, timed) if timed else None) or next(iter(others), None)
    name = headline_metric(results)
    values = [metric_value(row['metrics'].get(name)) if row and name else None for row in (before, after)]
    if None not in values:
        change = round(points(*values), 1) + 0.0
        images = results.get('evaluation', {}).get('num_images')
        told = f'float → {after["model"]}' + (f', {images} images' if images else '')
        found.append(Headline(name, f'{values[0]:.3f} → {values[1]:.3f}', told))
        kind = 'loss' if change < 0 else 'gain' if change > 0 else ''
        found.append(Headline('change', f'{change:+.1f} points', _interval(results, before, after), kind))
    else:
        found.append(Headline('accuracy', 'not measured', 'the evaluator gave no figure for both detectors'))
    sizes = [row['size_bytes'] if row else None for row in (before, after)]
    if all(sizes):
        told = f'{format_bytes(sizes[0])} → {format_bytes(sizes[1])}'
        found.append(Headline('size', f'{sizes[0] / sizes[1]:.2f}x less', told))
    if after and after['latency_ratio'] is not None:
        ratio, latency = after['latency_ratio'], after.get('latency')
        told = f'{latency["float_ms"]:.1f} → {latency["ms"]:.1f} ms, {_threads(latency)}, ' if latency else ''
        told += results.get('versions', {}).get('processor', '')
        found.append(Headline('speed', f'{ratio:.2f}x', told.strip(', '), 'loss' if ratio < 1 else 'gain'))
    share = integer_mac_share(structure)
    found.append(Headline('in integers', in_percent(share), 'of the multiply-accumulates'))
    return found


def _interval(results: dict[str, Any], before: dict, after: dict) -> str:
    """What stands below the change."""
    comparison = results.get('comparison') or {}
    if comparison.get('model') != after['model']:
        return f'{after["model"]} against {before["model"]}'
    interval = comparison['interval']
    if interval is None:
        return f'too few images for an interval ({comparison["images"]})'
    return f'95 % interval {interval[0]:+.1f} to {interval[1]:+.1f}'


def _threads(latency: dict[str, Any]) -> str:
    return '1 thread' if latency['threads'] == 1 else f'{latency["threads"]} threads'


def _sizes(results: dict[str, Any]) -> list[str]:
    """Metrics by the size of the objects, as COCO's evaluation names them."""
    names = results['rows'][0]['metrics'] if results['rows'] else ()
    return [name for name in names if name.endswith(('_s', '_m', '_l'))]


def _measured_parts(work_dir: str | Path) -> list[dict]:
    """What ``mmdet-ptq analyze`` measured in this work directory; nothing where it did not run."""
    try:
        groups = json.loads((Path(work_dir) / SENSITIVITY).read_text(encoding='utf-8'))['groups']
        return [dict(name=str(group['name']), loss=float(group['damage']['loss'])) for group in groups]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _chapter(title: str, draw: Callable[[], Section | str]) -> Section:
    """One chapter; a reason instead of pictures where they cannot be drawn."""
    try:
        section = draw()
    except PTQError as error:
        section = str(error)
    except Exception as error:
        # a detector of any design comes here, and what the run has measured must not be lost for a picture
        print_log(f'report, {title}: {type(error).__name__}: {error}', 'current', level=logging.WARNING)
        section = f'This detector does not allow it ({type(error).__name__}: {error}).'
    return Section(title, section) if isinstance(section, str) else section


def _detections(
    reference: nn.Module,
    detector: nn.Module,
    batches: Sequence[dict],
    classes: Sequence[str],
    worst: Mapping[str, DetectionPair] | None,
) -> Section:
    if worst is None:
        worst = {f'image {i}': p for i, p in enumerate(detect_both(reference, detector, batches, NUM_IMAGES), 1)}
        told = pictures.detections_finding(list(worst.values())) if worst else 'There were no images to show.'
    elif worst:
        told = f'The {len(worst)} images that changed most; dashed: without a partner.'
    else:
        told = f'In every image both find the same objects (score {SCORE_THR} or more).'
    colours = pictures.class_colours(list(worst.values()))
    drawn = [
        Picture(
            f'Detections in {caption}, float left, quantized right.',
            pictures.detections_picture(pair, classes, colours),
            caption,
        )
        for caption, pair in worst.items()
    ]
    return Section('Detections', told, drawn)


def _drift(reference: nn.Module, detector: nn.Module, batches: Sequence[dict]) -> Section | str:
    drift = score_drift(reference, detector, batches)
    if drift.reason:
        return f'Not drawn: {drift.reason}.'
    text = (
        'Each point is one candidate box, before non-maximum suppression, that either detector is at least '
        '0.05 confident of. On the diagonal nothing has changed.'
    )
    return Section(
        'Scores and boxes before suppression',
        text,
        [Picture('Confidence of the quantized against the float detector.', pictures.drift_picture(drift))],
    )


def _errors(reference: nn.Module, detector: nn.Module, batches: Sequence[dict], structure: Structure) -> Section | str:
    if not batches:
        return 'Not drawn: there were no images to run on.'
    errors = layer_errors(reference, detector, batches[0], structure.folds)
    if not errors:
        return 'Not drawn: no layer ran alike in both detectors.'
    text = (
        "Signal to quantization noise of each layer's output, with everything before it quantized too: "
        f'where the bars fall, the error enters. {pictures.errors_finding(errors)}'
    )
    return Section(
        'Error by layer', text, [Picture('Signal to noise by layer.', pictures.errors_picture(errors))], errors
    )


def _weights(detector: nn.Module, structure: Structure, float_detector: nn.Module | None) -> Section | str:
    grids = weight_grids(detector, structure, float_detector=float_detector)
    if not grids:
        return 'Not drawn: no weight is quantized.'
    text = (
        'Log-affine layers first, then those whose weights lose most. The ticks are the values that the '
        'format offers; where they are dense, the format is precise.'
    )
    return Section(
        'Weights and their formats',
        text,
        [Picture('Histograms of weights over the values of their formats.', pictures.weights_picture(grids))],
    )


def in_percent(share: float) -> str:
    """A share as a percentage that says 100 % or 0 % only when it is."""
    if share in (0, 1):
        return f'{100 * share:.0f} %'
    return f'{min(max(100 * share, 0.01), 99.99):.2f} %'


def _weights_by_bits(part: PartSummary) -> str:
    """How many weights have which width."""
    return (
        ', '.join(
            f'{format_count(count)} in {"float" if bits == 32 else f"{bits} bits"}'
            for bits, count in sorted(part.weights.items())
        )
        or 'none'
    )
