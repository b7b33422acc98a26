"""What the benchmarks share: one run of tools/ptq.py as one line of a CSV file."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from mmdet_ptq.analysis import read_results
from mmdet_ptq.errors import PTQError
from mmdet_ptq.files import write_text

ROOT = Path(__file__).resolve().parent.parent
METRIC = 'coco/bbox_mAP'
VERSIONS = ('mmdet_ptq', 'torch', 'mmdet', 'mmcv', 'mmengine', 'numpy', 'python', 'processor')
FIELDS = (
    'detector',
    'recipe',
    'float_AP',
    'quantized_AP',
    'difference_points',
    'integer_mac_share',
    'float_bytes',
    'quantized_bytes',
    'calibration_images',
    'calibration_seconds',
    'seed',
    'date',
    *VERSIONS,
    'command',
)
CALIBRATION = ('prepare', 'observe', 'protect', 'reconstruct', 'global')


def run_ptq(
    config: Path,
    preset: str,
    work_dir: Path,
    options: Sequence[str] = (),
    arguments: Sequence[str] = (),
    output: Path | None = None,
) -> tuple[list[str], dict]:
    """Runs tools/ptq.py, taking over the stages that are finished.

    Args:
        config: The config.
        preset: The preset it starts from.
        work_dir: Where it runs.
        options: ``--cfg-options``.
        arguments: Further arguments.
        output: File that takes what the run prints. Defaults to None: the terminal shows it.

    Returns:
        The command, and what ``results.json`` holds.
    """
    command = ['tools/ptq.py', str(config), '--preset', preset, '--work-dir', str(work_dir), '--resume', *arguments]
    if options:
        command += ['--cfg-options', *options]
    with output.open('w') if output else nullcontext() as file:
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=file, stderr=file)
    return command, read_results(work_dir / 'results.json')


def run(
    config: Path,
    recipe: str,
    preset: str,
    work_dir: Path,
    recipe_options: Sequence[str] = (),
    options: Sequence[str] = (),
    arguments: Sequence[str] = (),
) -> dict:
    """Runs one recipe and returns its line.

    Args:
        config: The config.
        recipe: What the line is called.
        preset: The preset it starts from.
        work_dir: Where it runs; finished stages there are taken over.
        recipe_options: ``--cfg-options`` that make the recipe; they stand in the command of the line.
        options: Further ones that change no figure (workers of the dataloader, say).
        arguments: Further arguments of tools/ptq.py.
    """
    command, results = run_ptq(config, preset, work_dir, [*recipe_options, *options], arguments)
    rows = {row['model']: row for row in results['rows']}
    ap = {name: row['metrics'][METRIC] for name, row in rows.items()}
    versions = results['versions']
    told = ['--cfg-options', *recipe_options] if recipe_options else []
    return dict(
        detector=config.stem,
        recipe=recipe,
        float_AP=ap['float'],
        quantized_AP=ap['simulated'],
        difference_points=round(100 * (ap['simulated'] - ap['float']), 1),
        integer_mac_share=results['coverage']['integer_mac_share'],
        float_bytes=rows['float']['size_bytes'],
        quantized_bytes=rows['simulated']['size_bytes'],
        calibration_images=results['calibration']['num_images'],
        calibration_seconds=calibration_seconds(results),
        seed=results['seed'],
        date=results['date'][:10],
        command=' '.join(['python', 'tools/ptq.py', config.name, *command[2:4], *arguments, *told]),
        **{name: versions[name] for name in FIELDS if name in versions},
    )


def one_sentence(main: Callable[[], None]) -> None:
    """Runs a command line; a user's mistake becomes one sentence."""
    try:
        main()
    except PTQError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)


def calibration_seconds(results: dict) -> int:
    """Time of all calibration stages of a run, what was taken over included."""
    return round(sum(results['stages'].get(stage, {}).get('seconds', 0) for stage in CALIBRATION))


def write_csv(path: Path, lines: Sequence[dict], fields: Sequence[str] = FIELDS) -> None:
    """Writes the lines."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator='\n')
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, text.getvalue())
