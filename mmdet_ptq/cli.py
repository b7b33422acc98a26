"""The command lines: arguments in, one runner, one sentence when something is wrong.

Nothing of the stack is imported before the arguments are understood: ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType

from mmdet_ptq.errors import PTQError, cannot_write, did_you_mean, disk_error, lost_process, no_checkpoint, one_line
from mmdet_ptq.startup import ends_at_once
from mmdet_ptq.version import __version__

# calibration images of --fast: ranges of 8 bits hardly change with more
FAST_IMAGES = 32
PACKAGE = Path(__file__).resolve().parent
# recipes and the embedded detector; in a clone a link to its folder of this name
CONFIGS = PACKAGE / 'configs'
DEMO = CONFIGS / 'ssdlite_mbv2_ptq.py'
FOLDER = 'work_dir of the config, else work_dirs/CONFIG_NAME'


def preset_names() -> list[str]:
    """Names of all presets."""
    # by path: the folder's package imports torch
    return list(runpy.run_path(str(PACKAGE / 'config' / 'presets.py'))['PRESETS'])


def runtime_folders() -> list[str]:
    """Names of all runtimes of the package, as far as their folders tell."""
    return sorted(path.parent.name for path in (PACKAGE / 'deploy').glob('*/runtime.py'))


def _guarded(main: Callable[[list[str] | None], None], advice: str) -> Callable[[list[str] | None], None]:
    """A user's mistake becomes one sentence and exit code 2; Ctrl-C says how to go on."""

    def run(argv: list[str] | None = None) -> None:
        try:
            main(argv)
        except PTQError as error:
            print(f'error: {error}', file=sys.stderr)
            sys.exit(2)
        except Exception as error:
            if lost_process(error):
                print(f'error: another process of this run has ended, its message says why; {advice}', file=sys.stderr)
                sys.exit(2)
            full = disk_error(error)  # of whatever mmengine writes
            if full is None:
                raise
            print(f'error: {cannot_write(full.filename or "the files of the run", full)}', file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print(f'\ninterrupted; {advice}', file=sys.stderr)
            sys.exit(130)

    run.__doc__ = main.__doc__
    return run


def _parser(description: str, checkpoint: str, by_preset: bool = True) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        'config', help='mmdet config file, or a recipe of the package, as yolox/yolox_nano_w8a8_coco.py'
    )
    parser.add_argument(
        'checkpoint',
        nargs='?' if checkpoint == 'optional' else None,
        help='checkpoint file; where it may be left out, load_from of the config is used',
    )
    inside = ', in it a folder named after the preset' if by_preset else ''
    parser.add_argument('--work-dir', help=f'where results go, default: {FOLDER}{inside}')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help='changes to the config')
    parser.add_argument('--device', help='cpu, cuda or cuda:N, default: cuda where there is one')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--verbose', action='store_true', help='print what goes to the log file alone otherwise')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


def load_config(path: str, options: list[str] | None = None):
    """Reads an mmdet config.

    Args:
        path: The config file.
        options: ``key=value`` changes.

    Raises:
        PTQError: The file, one of its bases or a module it imports is missing.
    """
    path = _found(path)
    from mmengine.config import Config, DictAction

    if not Path(path).is_file():
        folder = Path(path).parent
        near = did_you_mean(Path(path).name, [p.name for p in folder.glob('*.py')]) if folder.is_dir() else ''
        raise PTQError(f'there is no config {path!r}.{near}')
    from mmdet_ptq.compat import check_pkg_resources

    check_pkg_resources()
    try:
        cfg = Config.fromfile(path)
    except Exception as error:  # a config is Python code, which may fail in its own way
        # mmengine parses the text of the file, in which Python would skip it
        mark = '; save it as UTF-8 without a byte order mark (BOM)' if 'U+FEFF' in str(error) else ''
        raise PTQError(f'the config {path!r} cannot be read: {one_line(error)}{mark}.') from error
    for option in options or []:
        key, given, _ = option.partition('=')
        if not given or not all(key.split('.')):
            raise PTQError(f'--cfg-options takes KEY=VALUE pairs, got {option!r}.')
        parser = argparse.ArgumentParser()
        parser.add_argument('--cfg-options', nargs=1, action=DictAction)
        try:
            cfg.merge_from_dict(parser.parse_args([f'--cfg-options={option}']).cfg_options)
        except (AssertionError, KeyError, TypeError) as error:
            raise PTQError(f'--cfg-options {option} cannot be applied to the config: {one_line(error)}.') from error
    return cfg


def _found(path: str) -> str:
    """A config's path; where there is no such file, that of the package's recipe of this name."""
    packaged = CONFIGS / path.removeprefix('configs/')
    return str(packaged) if not Path(path).is_file() and packaged.is_file() else path


def _check_checkpoint(path: str | None) -> None:
    """Refuses a checkpoint that is not there, before anything else."""
    if path and '://' not in path and not Path(path).is_file():
        raise no_checkpoint(path)


def _screen(args: argparse.Namespace) -> AbstractContextManager:
    """Shows a person what matters, unless all is asked for."""
    return nullcontext() if args.verbose else _imported('mmdet_ptq.progress').for_people()


def _imported(name: str) -> ModuleType:
    """A module of ours that imports much of the stack."""
    with ends_at_once():
        return importlib.import_module(name)


def _mend() -> None:
    """Mends the faults of the stack, which importing the package leaves to us where we are the program."""
    _imported('mmdet_ptq.compat').apply_workarounds()


def _prepare(args: argparse.Namespace):
    if args.device == 'cpu':
        # mmengine takes the GPU wherever it sees one
        os.environ['CUDA_VISIBLE_DEVICES'] = '-1'
    elif args.device and args.device.startswith('cuda:'):
        os.environ['CUDA_VISIBLE_DEVICES'] = _visible_gpu(args.device)
    elif args.device not in (None, 'cuda'):
        raise PTQError(f'--device must be cpu, cuda or cuda:N, got {args.device!r}.')
    if args.launcher != 'none':
        _check_launcher(args.launcher)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    _mend()
    cfg = load_config(args.config, args.cfg_options)
    if args.device and args.device != 'cpu':
        import torch

        if not torch.cuda.is_available():
            raise PTQError(f'--device {args.device} was asked for, but torch sees no GPU; use --device cpu.')
    if not isinstance(cfg.get('work_dir'), str | os.PathLike | None):
        raise PTQError(f'`work_dir` must be the path of a folder, got {cfg.work_dir!r:.100}.')
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(args.config).stem}'
    return cfg


# launcher to what it sets in the environment, and how processes are started by it
_LAUNCHERS = dict(
    pytorch=(('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'), 'torchrun --nproc_per_node N tools/ptq.py ...'),
    slurm=(('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_NODELIST'), 'srun python tools/ptq.py ...'),
    mpi=(('OMPI_COMM_WORLD_LOCAL_RANK',), 'mpirun -n N python tools/ptq.py ...'),
)


def _check_launcher(launcher: str) -> None:
    """Refuses a launcher that did not start this process."""
    variables, command = _LAUNCHERS[launcher]
    missing = [name for name in variables if name not in os.environ]
    if missing:
        raise PTQError(
            f'--launcher {launcher} needs {", ".join(missing)} in the environment, which the launcher sets; start with '
            f'`{command}`, or leave the option out.'
        )


def _visible_gpu(device: str) -> str:
    """The GPU of ``cuda:N`` among those that ``CUDA_VISIBLE_DEVICES`` leaves."""
    number = device.removeprefix('cuda:')
    if not number.isdecimal():
        raise PTQError(f'--device must be cpu, cuda or cuda:N, got {device!r}.')
    visible = [name.strip() for name in os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',') if name.strip()]
    if visible and int(number) >= len(visible):
        raise PTQError(f'--device {device} asks for more GPUs than CUDA_VISIBLE_DEVICES={",".join(visible)} leaves.')
    return visible[int(number)] if visible else number


def _change_block(cfg, args: argparse.Namespace, changes: dict) -> None:
    """Merges changes, the preset and the checkpoint of the command line into the config."""
    if args.preset:
        changes['preset'] = args.preset
    if cfg.get('ptq') is None and not args.preset:
        raise PTQError("the config has no `ptq` block; add `ptq = dict(preset='w8a8_observe')` or pass --preset.")
    cfg.ptq = cfg.get('ptq') or {}
    if not isinstance(cfg.ptq, dict):
        raise PTQError(f'`ptq` must be a dict, got {cfg.ptq!r}.')
    cfg.ptq.setdefault('calibration', {})
    if not isinstance(cfg.ptq.calibration, dict):
        raise PTQError(f"`ptq.calibration` must be a dict, as dict(images='data/images'), got {cfg.ptq.calibration!r}.")
    cfg.merge_from_dict(dict(ptq=changes))
    if args.checkpoint:
        cfg.load_from = args.checkpoint
    if cfg.get('load_from'):
        _check_checkpoint(str(cfg.load_from))
    if not args.work_dir and cfg.ptq.get('preset'):
        # the results of one preset stay when another is tried
        cfg.work_dir = str(Path(cfg.work_dir) / str(cfg.ptq.preset))


def _ptq(argv: list[str] | None = None) -> None:
    """tools/ptq.py."""
    parser = _parser('Quantize an mmdet detector and report what it cost.', 'optional')
    parser.add_argument('--preset', help=f'replaces ptq.preset: {", ".join(preset_names())}')
    parser.add_argument('--dry-run', action='store_true', help='check everything, tell the plan, and stop')
    parser.add_argument('--resume', action='store_true', help='take over finished stages of an interrupted run')
    parser.add_argument('--seed', type=int, help='replaces ptq.calibration.seed')
    parser.add_argument(
        '--fast',
        action='store_true',
        help=f'a first look: ranges of at most {FAST_IMAGES} images, nothing is searched or trained',
    )
    args = parser.parse_args(argv)
    _check_checkpoint(args.checkpoint)
    with _screen(args):
        _quantize(args)


def _quantize(args: argparse.Namespace) -> None:
    cfg = _prepare(args)
    changes = {}
    if args.seed is not None:
        changes['calibration'] = dict(seed=args.seed)
        cfg.randomness = {**(cfg.get('randomness') or {}), 'seed': args.seed}
    _change_block(cfg, args, changes)
    if args.fast:
        images = cfg.ptq.calibration.get('num_images', FAST_IMAGES)
        # what is no number is refused with the rest of the block
        images = min(images, FAST_IMAGES) if isinstance(images, int) else images
        cfg.merge_from_dict(
            dict(ptq=dict(calibration=dict(num_images=images), protect=None, reconstruct=None, global_loss=None))
        )
    cfg.resume = args.resume
    _imported('mmdet_ptq.engine').PTQRunner.from_cfg(cfg).run(dry=args.dry_run)


def _analyze(argv: list[str] | None = None) -> None:
    """tools/analyze.py."""
    parser = _parser(
        'Rank tensors and parts of a detector by what their quantization costs, and find better formats.', 'optional'
    )
    parser.add_argument('--preset', help=f'replaces ptq.preset: {", ".join(preset_names())}')
    parser.add_argument('--images', type=int, default=16, help='calibration images to measure on, default: 16')
    args = parser.parse_args(argv)
    if args.images < 1:
        raise PTQError(f'--images must be at least 1, got {args.images}.')
    _check_checkpoint(args.checkpoint)
    with _screen(args):
        cfg = _prepare(args)
        _change_block(cfg, args, {})
        _imported('mmdet_ptq.engine.analyze').analyze(cfg, args.images)


def _test(argv: list[str] | None = None) -> None:
    """tools/test.py."""
    args = _parser(
        "Evaluate a quantized checkpoint or an exported model with mmdet's own evaluator.", 'required', by_preset=False
    ).parse_args(argv)
    with _screen(args):
        _evaluate(args)


def _evaluate(args: argparse.Namespace) -> None:
    cfg = _prepare(args)
    engine = _imported('mmdet_ptq.engine')
    from mmdet_ptq.analysis import print_results, result_row

    path = Path(args.checkpoint)
    if path.suffix == '.pth':
        name, detector, size, remark = 'simulated', engine.load_quantized(path, cfg), path.stat().st_size, ''
    else:
        from mmdet_ptq.deploy import model_bytes, open_model, runtime_detector

        model = open_model(path)
        name, detector, size, remark = model.name, runtime_detector(cfg, model), model_bytes(path), model.remark()
    print_results(dict(rows=[result_row(name, engine.evaluate(cfg, detector), size, None, remark=remark)]))


def _export(argv: list[str] | None = None) -> None:
    """tools/export.py."""
    parser = argparse.ArgumentParser(description='Write a quantized checkpoint as a model that a runtime executes.')
    parser.add_argument('checkpoint', help='the quantized.pth of a run')
    parser.add_argument('--to', nargs='+', required=True, metavar='RUNTIME', help=', '.join(runtime_folders()))
    parser.add_argument('--out', help='folder, each runtime gets one in it; default: where the checkpoint is')
    parser.add_argument(
        '--input-shape',
        nargs=2,
        type=int,
        metavar=('HEIGHT', 'WIDTH'),
        help='size of the image tensor, default: what the test pipeline gave when it was calibrated',
    )
    parser.add_argument('--dynamic-batch', action='store_true', help='leave the number of images open')
    parser.add_argument('--dynamic-size', action='store_true', help='leave the height and the width of images open')
    parser.add_argument(
        '--end2end', action='store_true', help='add decoding and NMS: the model gives boxes, scores and labels'
    )
    parser.add_argument(
        '--unpacked',
        action='store_true',
        help='store weights of 4 bits and less as int8 instead of 4-bit codes with a table',
    )
    parser.add_argument(
        '--compare', metavar='IMAGE', help='image file: compare the codes of every quantized tensor with the simulation'
    )
    parser.add_argument('--config', help='config file that replaces the one in the checkpoint')
    parser.add_argument(
        '--trust-config',
        action='store_true',
        help='let the config in the checkpoint import modules: it can run any code',
    )
    args = parser.parse_args(argv)
    _mend()
    config = None if args.config is None else load_config(args.config)
    _imported('mmdet_ptq.engine.export_again').export_checkpoint(
        args.checkpoint,
        args.to,
        out=args.out,
        size=args.input_shape,
        dynamic_batch=args.dynamic_batch,
        dynamic_size=args.dynamic_size,
        packed=not args.unpacked,
        image=args.compare,
        end2end=args.end2end,
        config=config,
        trust_config=args.trust_config,
    )


ptq = _guarded(_ptq, 'the finished stages are kept, run the same command with --resume to go on.')
export = _guarded(_export, 'no half-written model was left, run the same command again.')
test = _guarded(_test, 'nothing was changed, run the same command again.')
analyze = _guarded(_analyze, 'finished measurements are kept, run the same command again to go on.')


def demo(argv: list[str] | None = None) -> None:
    """Quantizes the embedded detector by the preset that takes least time; ``--preset w8a8`` trains as well."""
    ptq([str(DEMO), '--preset', 'w8a8_observe', *(sys.argv[1:] if argv is None else argv)])


def doctor(argv: list[str] | None = None) -> None:
    """Examines the environment."""
    argparse.ArgumentParser(description='Say what is wrong with the environment and how to mend it.').parse_args(argv)
    from mmdet_ptq.doctor import main as examine

    sys.exit(examine())


COMMANDS: dict[str, tuple[Callable[[list[str] | None], None], str]] = {
    'demo': (demo, 'quantize the embedded detector; nothing is downloaded'),
    'run': (ptq, 'quantize a detector, evaluate and export it (also: quantize)'),
    'analyze': (analyze, 'find what costs most, and better formats'),
    'export': (export, 'write a quantized checkpoint for a runtime'),
    'test': (test, 'evaluate a quantized checkpoint or an exported model'),
    'doctor': (doctor, 'say what is wrong with the environment'),
}


def main(argv: list[str] | None = None) -> None:
    """The one program that has all commands; ``mmdet-ptq CONFIG`` is ``mmdet-ptq run CONFIG``."""
    arguments = sys.argv[1:] if argv is None else argv
    name = {'quantize': 'run'}.get(arguments[0], arguments[0]) if arguments else '--help'
    if name in ('-h', '--help'):
        print(_usage())
    elif name == '--version':
        print(f'mmdet-ptq {__version__}')
    elif name in COMMANDS:
        sys.argv[0] = f'mmdet-ptq {name}'  # as usage lines have it
        COMMANDS[name][0](arguments[1:])
    elif name.endswith('.py'):
        ptq(arguments)
    else:
        near = did_you_mean(name, COMMANDS) or f' It is one of {", ".join(COMMANDS)}.'
        print(f'error: there is no command {name!r}.{near}', file=sys.stderr)
        sys.exit(2)


def _usage() -> str:
    commands = '\n'.join(f'  {name:<9} {told}' for name, (_, told) in COMMANDS.items())
    return (
        f'mmdet-ptq {__version__}: post-training quantization for MMDetection\n\n'
        'usage: mmdet-ptq COMMAND ...     (mmdet-ptq COMMAND --help tells its options)\n'
        f'       mmdet-ptq CONFIG ...      (the same as mmdet-ptq run CONFIG ...)\n\n{commands}\n\n'
        f'presets: {", ".join(preset_names())}\n'
        f'results: {FOLDER}, in it a folder named after the preset'
    )
