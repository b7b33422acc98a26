"""Whether the formats that a policy names exist and take its options: told before anything runs."""

from __future__ import annotations

import inspect

from mmdet_ptq.config.sections import TensorConfig
from mmdet_ptq.errors import PTQError
from mmdet_ptq.quantizers import build_observer, build_quantizer
from mmdet_ptq.registry import QUANTIZERS, registered


def check_format(policy: TensorConfig, part: str, key: str) -> None:
    """Builds the quantizer and the observer of a policy once.

    Args:
        policy: All of a tensor's settings.
        part: ``'weights'`` or ``'activations'``.
        key: Where they stand in the config, for the message.

    Raises:
        PTQError: A type is unknown, an option is unknown or out of range, or the format is one of weights alone.
    """
    if policy.float:
        return
    try:
        build_quantizer({**policy.quantizer, 'bits': policy.bits, **_channels(policy, part)})
    except PTQError as error:
        raise PTQError(f'`{key}.quantizer`: {error}') from error
    try:
        build_observer(policy.observer)
    except PTQError as error:
        raise PTQError(f'`{key}.observer`: {error}') from error


def _channels(policy: TensorConfig, part: str) -> dict:
    if part == 'weights':
        return dict(num_channels=1)
    kind = registered(QUANTIZERS, policy.quantizer['type'])
    options = inspect.signature(kind).parameters if kind is not None else {}
    if (
        kind is not None
        and 'channel_axis' not in options
        and not any(option.kind is option.VAR_KEYWORD for option in options.values())
    ):
        raise PTQError(f'{kind.__name__} is a format of weights; activations take mmdet_ptq.AffineQuantizer.')
    return dict(num_channels=None, channel_axis=1)
