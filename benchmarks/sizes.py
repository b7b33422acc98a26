"""Sizes of the models of finished runs, exported again by this version: files, and their weights alone.

python benchmarks/sizes.py work_dirs/runtimes/*/* --out docs/results/sizes.csv

Each folder holds ``quantized.pth`` and ``onnxruntime/float/model.onnx``, as a run with
``ptq.export=['onnxruntime']`` leaves them. The new model must answer as the old one does, bit for bit.
"""
from __future__ import annotations

import argparse
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
from runs import one_sentence, write_csv

from mmdet_ptq.analysis import versions
from mmdet_ptq.deploy import model_bytes, open_model
from mmdet_ptq.deploy.weight_bytes import weight_bytes
from mmdet_ptq.engine.export import export_checkpoint
from mmdet_ptq.errors import PTQError

VERSIONS = ('mmdet_ptq', 'torch', 'mmdet', 'onnx', 'onnxruntime', 'python')
FIELDS = ('detector', 'preset', 'bytes', 'float_bytes', 'bytes_ratio', 'weight_bytes', 'float_weight_bytes',
          'weights_ratio', 'date', *VERSIONS, 'command')


def line_of(run: Path) -> dict:
    """Exports a run's checkpoint again and measures it."""
    old, stored = run / 'onnxruntime' / 'model.onnx', run / 'onnxruntime' / 'float' / 'model.onnx'
    for path in (run / 'quantized.pth', old, stored):
        if not path.is_file():
            raise PTQError(f"{str(run)!r} lacks {path.relative_to(run)}; run tools/ptq.py with "
                           "`ptq.export=['onnxruntime']` there.")
    with tempfile.TemporaryDirectory() as folder:
        path, = export_checkpoint(run / 'quantized.pth', ['onnxruntime'], out=folder)
        check_same(old, path)
        sizes = dict(bytes=model_bytes(path), float_bytes=model_bytes(stored), weight_bytes=weight_bytes(path),
                     float_weight_bytes=weight_bytes(stored))
    return dict(
        detector=run.parent.name, preset=run.name, **sizes,
        bytes_ratio=round(sizes['bytes'] / sizes['float_bytes'], 3),
        weights_ratio=round(sizes['weight_bytes'] / sizes['float_weight_bytes'], 3),
        date=datetime.now(timezone.utc).date().isoformat(), **{name: versions().get(name, '') for name in VERSIONS},
        command=f'python benchmarks/sizes.py {"/".join(run.parts[-2:])}')


def check_same(old: Path, new: Path) -> None:
    """Refuses models that answer differently: what was evaluated was the old one."""
    models = [open_model(path, threads=1) for path in (old, new)]
    image = np.random.default_rng(0).standard_normal(models[0].meta['input_shape'], dtype=np.float32)
    if not all(np.array_equal(ours, theirs) for ours, theirs in zip(*(m(image) for m in models), strict=True)):
        raise PTQError(f'exported again, {str(old)!r} answers differently; run tools/ptq.py again.')


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('runs', nargs='+', type=Path, help='work directories of finished runs')
    parser.add_argument('--out', type=Path, required=True, help='CSV file')
    args = parser.parse_args(argv)
    lines = []
    for run in args.runs:
        lines.append(line_of(run.resolve()))
        write_csv(args.out, lines, FIELDS)
        print(f'{lines[-1]["detector"]}, {lines[-1]["preset"]}: {lines[-1]["bytes_ratio"]} of the float file, weights '
              f'{lines[-1]["weights_ratio"]}')


if __name__ == '__main__':
    one_sentence(main)
