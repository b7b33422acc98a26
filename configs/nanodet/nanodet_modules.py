"""NanoDet-m and NanoDet-Plus-m as mmdet models: what a detector needs that mmdet does not ship.

A config names this file in ``custom_imports``. Names of modules are those of the checkpoints that the NanoDet project
publishes, <https://github.com/RangiLyu/nanodet>, so that they load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmcv.cnn import ConvModule
from mmdet.models.dense_heads import GFLHead
from mmdet.models.detectors import GFL
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.functional import interpolate

SLOPE = 0.1
LEAKY = dict(type='LeakyReLU', negative_slope=SLOPE)
# parts of a detector, as the project calls them and as mmdet does
PARTS = {'backbone.': 'backbone.', 'fpn.': 'neck.', 'head.': 'bbox_head.'}
# where its trainer puts them; averaged weights are those that are evaluated
PREFIXES = ('avg_model.', 'model.', '')


def published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a published checkpoint under the names that they have in mmdet.

    Args:
        state: Its ``state_dict``. What is used in training alone (``aux_fpn``, ``aux_head``) is left out, and the
            output layer of boxes, which NanoDet-m shares with scores.
    """
    prefix = next(prefix for prefix in PREFIXES if any(key.startswith(f'{prefix}backbone.') for key in state))
    found = {}
    for theirs, ours in PARTS.items():
        for key, value in state.items():
            name = key.removeprefix(f'{prefix}{theirs}')
            if name != key and not name.startswith(('gfl_reg.', 'distribution_project.', 'project')):
                found[ours + name] = value
    return found


@MODELS.register_module()
class NanoDet(GFL):
    """A GFL detector that loads checkpoints of the NanoDet project, and its own."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._register_load_state_dict_pre_hook(self._rename)

    def _rename(self, state: dict[str, Tensor], *_) -> None:
        if not any(key.startswith(f'{prefix}head.') for prefix in PREFIXES for key in state):
            return
        renamed = published(state)
        state.clear()
        state.update(renamed)
        # a constant, which goes by another name there
        state['bbox_head.integral.project'] = self.bbox_head.integral.project.clone()


def convolution(before: int, after: int, kernel: int = 1, stride: int = 1, active: bool = True) -> list[nn.Module]:
    """A convolution and its normalisation; depthwise where the kernel is larger than 1."""
    groups = before if kernel > 1 else 1
    conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(after), *([nn.LeakyReLU(SLOPE, inplace=True)] if active else [])]


class Separable(nn.Module):
    """A depthwise and a pointwise convolution, each normalised and activated."""

    def __init__(self, channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise, self.dwnorm, self.act = convolution(channels, channels, kernel, stride)
        self.pointwise, self.pwnorm, _ = convolution(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.dwnorm(self.depthwise(x)))
        return self.act(self.pwnorm(self.pointwise(x)))


# ---- backbone


class ShuffleBlock(nn.Module):
    """Half of the channels are convolved, half pass; with ``stride=2`` all are convolved, in two branches."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        half = after // 2
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1.extend([*convolution(before, before, 3, stride, active=False), *convolution(before, half)])
        self.branch2 = nn.Sequential(
            *convolution(before if stride > 1 else half, half),
            *convolution(half, half, 3, stride, active=False),
            *convolution(half, half),
        )

    def forward(self, x: Tensor) -> Tensor:
        kept, x = (x, x) if len(self.branch1) else x.chunk(2, dim=1)
        x = torch.cat((self.branch1(kept), self.branch2(x)), dim=1)
        n, c, h, w = x.shape
        # the channels of the halves in turn
        return x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


@MODELS.register_module()
class NanoDetShuffleNet(BaseModule):
    """ShuffleNetV2 without its last convolution; returns strides 8, 16 and 32.

    Args:
        channels: Of the three stages; (116, 232, 464) are those of width 1.0.
    """

    def __init__(self, channels: Sequence[int] = (116, 232, 464), init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        stem, *rest = 24, *channels
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem), nn.LeakyReLU(SLOPE, inplace=True)
        )
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        for number, (before, after, count) in enumerate(zip((stem, *rest), rest, (4, 8, 4), strict=False), start=2):
            blocks = [ShuffleBlock(before, after, 2), *(ShuffleBlock(after, after, 1) for _ in range(count - 1))]
            setattr(self, f'stage{number}', nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stage2(self.maxpool(self.conv1(x)))
        y = self.stage3(x)
        return x, y, self.stage4(y)


# ---- necks


@MODELS.register_module()
class NanoDetAdditivePAN(BaseModule):
    """NanoDet-m's: 1x1 convolutions, then resizing and adding, downwards and upwards."""

    def __init__(self, in_channels: Sequence[int], out_channels: int, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        self.lateral_convs = nn.ModuleList(ConvModule(c, out_channels, 1, act_cfg=None) for c in in_channels)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        maps = [conv(x) for conv, x in zip(self.lateral_convs, inputs, strict=True)]
        last = len(maps) - 1
        for target, source, scale in (
            *((i - 1, i, 2) for i in range(last, 0, -1)),
            *((i + 1, i, 0.5) for i in range(last)),
        ):
            resized = interpolate(maps[source], scale_factor=scale, mode='bilinear', align_corners=False)
            maps[target] = maps[target] + resized
        return tuple(maps)


class GhostModule(nn.Module):
    """Half of the channels by a 1x1 convolution, the others from these by a depthwise one."""

    def __init__(self, before: int, after: int, active: bool) -> None:
        super().__init__()
        half = after // 2
        self.primary_conv = nn.Sequential(*convolution(before, half, active=active))
        self.cheap_operation = nn.Sequential(*convolution(half, half, 3, active=active))

    def forward(self, x: Tensor) -> Tensor:
        x = self.primary_conv(x)
        return torch.cat((x, self.cheap_operation(x)), dim=1)


class GhostBlock(nn.Module):
    """Two ghost modules beside a separable convolution."""

    def __init__(self, before: int, after: int, kernel: int) -> None:
        super().__init__()
        self.ghost1 = GhostModule(before, after, active=True)
        self.ghost2 = GhostModule(after, after, active=False)
        self.shortcut = nn.Sequential(
            *convolution(before, before, kernel, active=False), *convolution(before, after, active=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.ghost2(self.ghost1(x)) + self.shortcut(x)


class GhostBlocks(nn.Module):
    """One block, under the name that it has in checkpoints."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(GhostBlock(2 * channels, channels, kernel))

    def forward(self, upper: Tensor, lower: Tensor) -> Tensor:
        return self.blocks(torch.cat((upper, lower), dim=1))


@MODELS.register_module()
class NanoDetGhostPAN(BaseModule):
    """NanoDet-Plus's: as a PAN, with ghost blocks, and one level more."""

    def __init__(
        self, in_channels: Sequence[int], out_channels: int, kernel: int = 5, init_cfg: dict | None = None
    ) -> None:
        super().__init__(init_cfg)
        steps = range(len(in_channels) - 1)
        self.reduce_layers = nn.ModuleList(
            ConvModule(c, out_channels, 1, norm_cfg=dict(type='BN'), act_cfg=LEAKY) for c in in_channels
        )
        self.top_down_blocks = nn.ModuleList(GhostBlocks(out_channels, kernel) for _ in steps)
        self.downsamples = nn.ModuleList(Separable(out_channels, kernel, 2) for _ in steps)
        self.bottom_up_blocks = nn.ModuleList(GhostBlocks(out_channels, kernel) for _ in steps)
        self.extra_lvl_in_conv = nn.ModuleList([Separable(out_channels, kernel, 2)])
        self.extra_lvl_out_conv = nn.ModuleList([Separable(out_channels, kernel, 2)])

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        maps = [reduce(x) for reduce, x in zip(self.reduce_layers, inputs, strict=True)]
        inner = [maps[-1]]
        for block, lower in zip(self.top_down_blocks, maps[-2::-1], strict=True):
            upper = interpolate(inner[0], scale_factor=2, mode='bilinear', align_corners=False)
            inner.insert(0, block(upper, lower))
        outs = [inner[0]]
        for block, down, upper in zip(self.bottom_up_blocks, self.downsamples, inner[1:], strict=True):
            outs.append(block(down(outs[-1]), upper))
        outs.append(self.extra_lvl_in_conv[0](maps[-1]) + self.extra_lvl_out_conv[0](outs[-1]))
        return tuple(outs)


# ---- head


@MODELS.register_module()
class NanoDetSharedHead(GFLHead):
    """GFL's head with a tower of separable convolutions for each level, and one output layer for scores and boxes.

    Args:
        kernel: Of the depthwise convolutions: 3 in NanoDet-m, 5 in NanoDet-Plus.
    """

    def __init__(self, *args, kernel: int = 3, init_cfg: dict | None = None, **kwargs) -> None:
        self.kernel = kernel
        super().__init__(*args, init_cfg=init_cfg, **kwargs)

    def _init_layers(self) -> None:
        levels = range(self.prior_generator.num_levels)
        self.outputs = (self.cls_out_channels, 4 * (self.reg_max + 1))
        self.cls_convs = nn.ModuleList(
            nn.Sequential(*(Separable(self.feat_channels, self.kernel) for _ in range(self.stacked_convs)))
            for _ in levels
        )
        self.gfl_cls = nn.ModuleList(nn.Conv2d(self.feat_channels, sum(self.outputs), 1) for _ in levels)

    def forward(self, x: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        levels = zip(x, self.cls_convs, self.gfl_cls, strict=True)
        scores, boxes = zip(
            *(output(tower(level)).split(self.outputs, dim=1) for level, tower, output in levels), strict=True
        )
        return list(scores), list(boxes)
