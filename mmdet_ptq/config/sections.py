"""The sections of the ``ptq`` block, one dataclass each."""
from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import PTQError
from .checks import choice, positive

BITS = (2, 3, 4, 5, 6, 7, 8, 16)


@dataclass
class CalibrationConfig:
    """Which images calibrate the detector.

    Args:
        num_images: How many images are drawn from the training set. Defaults to 256.
        seed: Seed of the draw and of the batch order. Defaults to 0.
        batch_size: Images per forward pass while ranges are observed. Defaults to 4.
        images: A folder of images to calibrate on instead of the training set (no annotations needed).
        dataset: A dataset config to calibrate on instead of the training set; its ``pipeline`` is replaced by
            the test pipeline. At most one of ``images`` and ``dataset`` may be given.
    """

    num_images: int = 256
    seed: int = 0
    batch_size: int = 4
    images: str | None = None
    dataset: dict | None = None

    def check(self, key: str) -> None:
        positive(key, self, 'num_images', 'batch_size')
        if self.images is not None and self.dataset is not None:
            raise PTQError(f'`{key}` names both `images` and `dataset`; keep one of them.')


@dataclass
class TensorConfig:
    """How one kind of tensor (weights or activations) is quantized.

    Args:
        bits: Bit width, 2 to 8 or 16. Defaults to 8.
        quantizer: Config of the number format, from the ``QUANTIZERS`` registry.
        observer: Config of the range observer, from the ``OBSERVERS`` registry.
        depthwise_per_channel: Activations only: the input of a depthwise convolution gets one scale per channel
            (each output channel reads one input channel, so it stays integer arithmetic). Defaults to True.
        float: Leave the tensor in floating point. Defaults to False.
    """

    bits: int = 8
    quantizer: dict = field(default_factory=lambda: dict(type='mmdet_ptq.AffineQuantizer'))
    observer: dict = field(default_factory=lambda: dict(type='mmdet_ptq.MSEObserver'))
    depthwise_per_channel: bool = True
    float: bool = False

    def check(self, key: str) -> None:
        if isinstance(self.bits, bool) or self.bits not in BITS:
            raise PTQError(f'`{key}.bits` must be one of 2..8 or 16, got {self.bits!r}.')
        for part in ('quantizer', 'observer'):
            if not isinstance(getattr(self, part).get('type'), str):
                raise PTQError(f'`{key}.{part}` must be a dict with a `type`, got {getattr(self, part)!r}.')


@dataclass
class GlobalLossConfig:
    """The global stage: filtered global loss (Reg-PTQ, CVPR 2024) and the iterations that minimise it.

    Args:
        type: Only ``'mmdet_ptq.FilteredGlobalLoss'``.
        score_thr: theta_C, least confidence of the float detector's box. Defaults to 2e-4.
        iou_thr: theta_I, least IoU of the float and the quantized box. Defaults to 0.1.
        box_weight: lambda, weight of the box term. Defaults to 1.0.
        cls_weight: Weight of the classification term. Defaults to 1.0.
        quality_weight: Weight of the objectness / centerness term. Defaults to 1.0.
        distribution_weight: Weight of the box distribution term of GFL-style heads. Defaults to 0.25.
        combine: ``'and'`` (both filters must pass) or ``'or'``. Defaults to ``'and'``.
        box_loss: ``'l1'`` (divided by the float box's size), ``'giou'`` or ``'deltas'`` (centre shift and log size
            ratio). Defaults to ``'l1'``.
        p: Exponent of the ``'l1'`` box term. Defaults to 1.
        target: ``'float'`` (the float detector) or ``'ground_truth'``. Defaults to ``'float'``.
        max_boxes: Keep only this many boxes an image, by the float detector's confidence; bounds memory.
            Defaults to 1000.
        iters: Iterations. Defaults to 200.
        batch_size: Images per iteration. Defaults to 4.
        lr: Learning rate, relative to the size of each scale. Defaults to 1e-3.
        bias_lr: Learning rate of the biases, relative to their spread; 0 leaves them. Defaults to 1e-3.
        holdout: Share of the calibration images kept apart to choose the best state. Defaults to 0.125.
        val_interval: Iterations between two looks at the held-out images. Defaults to 50.
        checkpoint_interval: Iterations between two checkpoints (what a killed run loses at most).
            Defaults to 50.
        log_interval: Iterations between two log lines. Defaults to 10.
        optim_wrapper: mmengine optimizer wrapper; its learning rate is set by ``lr``.
        param_scheduler: mmengine schedulers; by default a cosine from ``lr`` to 0.
        hooks: Further mmengine hooks for this stage.
    """

    type: str = 'mmdet_ptq.FilteredGlobalLoss'
    score_thr: float = 2e-4
    iou_thr: float = 0.1
    box_weight: float = 1.0
    cls_weight: float = 1.0
    quality_weight: float = 1.0
    distribution_weight: float = 0.25
    combine: str = 'and'
    box_loss: str = 'l1'
    p: float = 1
    target: str = 'float'
    max_boxes: int | None = 1000
    iters: int = 200
    batch_size: int = 4
    lr: float = 1e-3
    bias_lr: float = 1e-3
    holdout: float = 0.125
    val_interval: int = 50
    checkpoint_interval: int = 50
    log_interval: int = 10
    optim_wrapper: dict = field(default_factory=lambda: dict(type='OptimWrapper', optimizer=dict(type='Adam')))
    param_scheduler: list | None = None
    hooks: list = field(default_factory=list)

    LOSS_KEYS = ('score_thr', 'iou_thr', 'box_weight', 'cls_weight', 'quality_weight', 'distribution_weight',
                 'combine', 'box_loss', 'p', 'target', 'max_boxes')

    def check(self, key: str) -> None:
        if self.type.rpartition('.')[2] != 'FilteredGlobalLoss':
            raise PTQError(f"`{key}.type` is {self.type!r}; only 'mmdet_ptq.FilteredGlobalLoss' is known.")
        positive(key, self, 'iters', 'batch_size', 'lr', 'val_interval', 'checkpoint_interval', 'log_interval')
        choice(f'{key}.combine', self.combine, ('and', 'or'))
        choice(f'{key}.box_loss', self.box_loss, ('l1', 'giou', 'deltas'))
        choice(f'{key}.target', self.target, ('float', 'ground_truth'))
        for name in ('score_thr', 'iou_thr'):
            if not 0 <= getattr(self, name) <= 1:
                raise PTQError(f'`{key}.{name}` must lie between 0 and 1, got {getattr(self, name)!r}.')
        if not 0 <= self.holdout < 1:
            raise PTQError(f'`{key}.holdout` must lie in [0, 1), got {self.holdout!r}.')

    def loss_kwargs(self) -> dict:
        """The arguments of :class:`mmdet_ptq.calibration.FilteredGlobalLoss`."""
        return {name: getattr(self, name) for name in self.LOSS_KEYS}
