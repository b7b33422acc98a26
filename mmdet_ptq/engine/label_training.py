"""Training a quantized detector further with mmdet's own loop, data and losses: quantization-aware training."""

from __future__ import annotations

import copy
import os
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import barrier, is_main_process
from mmengine.logging import print_log
from mmengine.runner import Runner

from mmdet_ptq.config import GlobalLossConfig, PTQConfig
from mmdet_ptq.deploy import load_quantized_state, quantized_state, read_quantized, save_quantized, settle_biases
from mmdet_ptq.engine.global_stage.optim import train_only_quantization
from mmdet_ptq.engine.run import unwrapped
from mmdet_ptq.errors import PTQError, building
from mmdet_ptq.files import load_tensors
from mmdet_ptq.wrapping import thaw_weights

QUANTIZED = 'quantized.pth'
# of a block without a `global_loss`
DEFAULT = GlobalLossConfig(lr=1e-3, weight_lr=1e-2, bias_lr=1e-2, weight_scale_lr=0, grid_lr=0)


def train_quantized(cfg: Config, checkpoint: str | os.PathLike) -> Path:
    """Trains a quantized detector with the config's own data, losses, schedule and hooks.

    Weights learn by straight-through gradients, biases and the scales of activations beside them. How fast each of them
    learns, relative to its size, stands in ``ptq.global_loss`` of the config (``weight_lr``, ``bias_lr``, ``lr``), and
    follows the config's schedule; the optimizer is that of the section, Adam by default. Gradients are clipped as the
    config's ``optim_wrapper`` says.

    Args:
        cfg: The config of the float detector, with ``train_dataloader`` and ``train_cfg``; ``work_dir`` must be set.
        checkpoint: A ``quantized.pth``.

    Returns:
        The new ``quantized.pth``, in the work directory.

    Raises:
        PTQError: The config has no training, or the checkpoint is no quantized one or belongs to another detector.
    """
    for key in ('train_dataloader', 'train_cfg'):
        if cfg.get(key) is None:
            raise PTQError(f'the config has no `{key}`, which `--quantized` trains with.')
    state = read_quantized(checkpoint)
    section = PTQConfig.from_dict(cfg.get('ptq') or {}).global_loss or DEFAULT
    rates = section.rates()
    if not rates['weight']:
        raise PTQError('`ptq.global_loss.weight_lr` is 0, so that no weight would learn; give it a rate, as 0.01.')
    cfg = copy.deepcopy(cfg)
    # the weights come from the checkpoint
    cfg.load_from = None
    own = cfg.get('optim_wrapper') or {}
    cfg.optim_wrapper = {
        **copy.deepcopy(section.optim_wrapper),
        **({'clip_grad': own['clip_grad']} if 'clip_grad' in own else {}),
        'constructor': 'mmdet_ptq.QuantizationParamsConstructor',
        'paramwise_cfg': rates,
    }
    with building(cfg):
        runner = Runner.from_cfg(cfg)
    detector = unwrapped(runner.model)
    structure = load_quantized_state(detector, state)
    thaw_weights(detector)
    train_only_quantization(detector, rates)
    # mmengine would give it new weights
    detector.is_init = True
    runner.train()
    barrier()  # the main process may still be writing
    info = runner.message_hub.runtime_info
    kept = info.get('best_ckpt') or info.get('last_ckpt')
    if kept is not None:
        # also what hooks such as EMAHook have put there in place of what they train
        detector.load_state_dict(load_tensors(kept)['state_dict'])
        print_log(f'taken: {Path(kept).name}', 'current')
    detector.eval()
    settle_biases(detector, structure)
    path = Path(runner.work_dir) / QUANTIZED
    if is_main_process():
        shape, padded = tuple(state['input_shape']), bool(state.get('padded'))
        meta = state['dataset_meta']
        save_quantized(path, quantized_state(detector, structure, state['config'], meta, shape, padded))
    print_log(f'{path}: the quantized detector', 'current')
    return path
