"""The sections of the ``ptq`` block, one dataclass each."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmdet_ptq.config.checks import check_seed, positive
from mmdet_ptq.errors import PTQError, check_choice

BITS = (2, 3, 4, 5, 6, 7, 8, 16)
SATURATIONS = ('safe', 'ignore')


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
        check_seed(f'{key}.seed', self.seed)
        if self.images is not None and self.dataset is not None:
            raise PTQError(f'`{key}` names both `images` and `dataset`; keep one of them.')


@dataclass
class TensorConfig:
    """How one kind of tensor (weights or activations) is quantized.

    Args:
        bits: Bit width, 2 to 8 or 16. Defaults to 8.
        quantizer: Config of the number format, from the ``QUANTIZERS`` registry.
        observer: Config of the range observer, from the ``OBSERVERS`` registry. Activations have
            ``mmdet_ptq.FisherObserver`` where nothing is said.
        depthwise_per_channel: Activations only: the input of a depthwise convolution gets one scale per channel
            (each output channel reads one input channel, so it stays integer arithmetic). Defaults to True.
        scale_migration: Activations only: how much of the differences between the channels of an input moves into the
            weights of its readers, 0 (nothing) to 1 (each channel has its own scale, in effect), as in SmoothQuant.
            Tensors that a layer with groups reads, or one that several levels share, are left out. Defaults to 0.
        float: Leave the tensor in floating point. Defaults to False.
        saturation: Weights only: whether scales keep sums of two products within 16 bits, see ``ptq.saturation``, from
            which the default is taken.
    """

    bits: int = 8
    quantizer: dict = field(default_factory=lambda: dict(type='mmdet_ptq.AffineQuantizer'))
    observer: dict = field(default_factory=lambda: dict(type='mmdet_ptq.MSEObserver'))
    depthwise_per_channel: bool = True
    scale_migration: float = 0.0
    float: bool = False
    saturation: str = SATURATIONS[0]

    def check(self, key: str) -> None:
        if isinstance(self.bits, bool) or self.bits not in BITS:
            raise PTQError(f'`{key}.bits` must be one of 2..8 or 16, got {self.bits!r}.')
        if self.scale_migration and key.endswith('weights'):
            raise PTQError(f'`{key}.scale_migration` means nothing; it belongs to activations.')
        check_choice(f'{key}.saturation', self.saturation, SATURATIONS)
        if self.saturation != SATURATIONS[0] and key.endswith('activations'):
            raise PTQError(f'`{key}.saturation` means nothing; it belongs to weights.')
        if not 0 <= self.scale_migration <= 1:
            raise PTQError(f'`{key}.scale_migration` must lie between 0 and 1, got {self.scale_migration!r}.')
        for part in ('quantizer', 'observer'):
            given = getattr(self, part)
            if not isinstance(given.get('type'), str):
                raise PTQError(f'`{key}.{part}` must be a dict with a `type`, got {given!r}.')
            if 'bits' in given:
                raise PTQError(f'`{key}.{part}.bits` would be ignored; set `{key}.bits`.')
            for name in ('num_channels', 'channel_axis'):
                if name in given:
                    raise PTQError(f'`{key}.{part}.{name}` would be ignored, it follows from the tensor; remove it.')


# What `protect.candidates` may name, from the cheapest to the last resort.
CANDIDATES = ('per_channel', 'range', 'format', '8bit', '16bit', 'float')


@dataclass
class ActivationConfig(TensorConfig):
    """How activations are quantized where nothing else is said: as weights, but for their observer."""

    observer: dict = field(default_factory=lambda: dict(type='mmdet_ptq.FisherObserver'))


@dataclass
class ProtectConfig:
    """Automatic protection of the tensors that hurt most, and mixed precision under a budget.

    Args:
        images: Calibration images on which losses are measured. Defaults to 8.
        max_tensors: How many tensors may be changed at most to protect them. Defaults to 16.
        min_share: A tensor is left alone when its own loss is below this share of what the tensors that hurt more
            leave of the whole loss. Defaults to 0.05.
        max_float_macs: Share of the multiply-accumulates that protection may turn to floating point, 0 to 1. With
            ``ptq.export``, 16 bits count as floating point: runtimes compute them so. Defaults to 0.0: everything
            stays in integers.
        size_bytes: Largest integer checkpoint, in bytes.
        size_ratio: The same as a share of the float detector's float32 size, 0 to 1.
        bops_ratio: Most bit operations, as a share of the float detector's (multiply-accumulates x 32 x 32), 0 to 1.
        max_loss: Largest filtered global loss of the whole quantized detector on these images; protection stops
            when it is reached.
        candidates: What may be tried on a tensor: ``'per_channel'`` (a scale per channel on depthwise inputs),
            ``'range'`` (another observer), ``'format'`` (log-affine / affine weights), ``'8bit'``, ``'16bit'``
            (activations) and ``'float'``. Defaults to all of them; ``'range'`` is not tried on weights that
            ``ptq.reconstruct`` sets anew.
    """

    images: int = 8
    max_tensors: int = 16
    min_share: float = 0.05
    max_float_macs: float = 0.0
    size_bytes: int | None = None
    size_ratio: float | None = None
    bops_ratio: float | None = None
    max_loss: float | None = None
    candidates: list = field(default_factory=lambda: list(CANDIDATES))

    def check(self, key: str) -> None:
        positive(key, self, 'images', 'max_tensors')
        for name in ('min_share', 'max_float_macs'):
            if not 0 <= getattr(self, name) <= 1:
                raise PTQError(f'`{key}.{name}` must lie between 0 and 1, got {getattr(self, name)!r}.')
        positive(
            key,
            self,
            *(n for n in ('size_bytes', 'size_ratio', 'bops_ratio', 'max_loss') if getattr(self, n) is not None),
        )
        for name in ('size_ratio', 'bops_ratio'):
            if (getattr(self, name) or 0) > 1:
                raise PTQError(
                    f'`{key}.{name}` is a share of the float detector, at most 1, got {getattr(self, name)!r}.'
                )
        if self.size_bytes is not None and self.size_ratio is not None:
            raise PTQError(f'`{key}` names both `size_bytes` and `size_ratio`; keep one of them.')
        for name in self.candidates:
            check_choice(f'{key}.candidates', name, CANDIDATES)


@dataclass
class GlobalLossConfig:
    """The global stage: filtered global loss (Reg-PTQ, CVPR 2024) and the iterations that minimise it.

    Args:
        score_thr: theta_C, least confidence of the float detector's box. Defaults to 2e-4.
        iou_thr: theta_I, least IoU of the float and the quantized box. Defaults to 0.1.
        box_weight: lambda, weight of the box term. Defaults to 1.0.
        cls_weight: Weight of the classification term. Defaults to 1.0.
        quality_weight: Weight of the objectness / centerness term. Defaults to 1.0.
        distribution_weight: Weight of the box distribution term of GFL-style heads. Defaults to 0.25.
        mask_weight: Weight of the mask term, a mean over pixels. Defaults to 1.0.
        combine: ``'and'`` (both filters must pass) or ``'or'``. Defaults to ``'and'``.
        box_loss: ``'l1'`` (divided by the float box's size) or ``'giou'``. Defaults to ``'l1'``.
        target: ``'float'`` (the float detector) or ``'ground_truth'``. Defaults to ``'float'``.
        max_boxes: Keep only this many boxes an image, by the float detector's confidence; bounds memory.
            Defaults to 1000.
        iters: Iterations. Defaults to 200.
        batch_size: Images per iteration, of all processes together. Defaults to 4.
        lr: Learning rate, relative to the size of each scale. Defaults to 1e-3.
        bias_lr: Learning rate of the biases, relative to their spread; 0 leaves them. Defaults to 1e-3.
        grid_lr: Learning rate of log k and log eps (or a) of log-affine weights; 0 leaves their tables as they are,
            None takes ``lr``. A table moves in steps of 1/127, and reconstructed weights have been fitted to it.
        weight_lr: Learning rate of the weights (straight-through gradients), relative to their quantization step; 0
            leaves them. Defaults to 0.
        weight_scale_lr: Learning rate of the scales and offsets of weights, relative to the size of the scale; 0 leaves
            them, None takes ``lr``. The gradient of a scale is what its weights' rounding errors happen to sum up to.
        augment: Versions of each calibration image that are trained on: the image, its mirror image, then random
            enlarged parts of both; 1 leaves the images as they are. With ``target='ground_truth'`` it is always 1.
            Defaults to 2.
        holdout: Share of the calibration images kept apart to choose the best state. Defaults to 0.125.
        val_interval: Iterations between two looks at the held-out images. Defaults to 50.
        checkpoint_interval: Iterations between two checkpoints (what a killed run loses at most).
            Defaults to 50.
        log_interval: Iterations between two log lines. Defaults to 10.
        optim_wrapper: mmengine optimizer wrapper, Adam by default; its learning rate is set by ``lr``.
        param_scheduler: mmengine schedulers, by iterations; by default a cosine from ``lr`` to 0.
        hooks: Further mmengine hooks for this stage.
    """

    score_thr: float = 2e-4
    iou_thr: float = 0.1
    box_weight: float = 1.0
    cls_weight: float = 1.0
    quality_weight: float = 1.0
    distribution_weight: float = 0.25
    mask_weight: float = 1.0
    combine: str = 'and'
    box_loss: str = 'l1'
    target: str = 'float'
    max_boxes: int | None = 1000
    iters: int = 200
    batch_size: int = 4
    lr: float = 1e-3
    bias_lr: float = 1e-3
    grid_lr: float | None = None
    weight_lr: float = 0
    weight_scale_lr: float | None = None
    augment: int = 2
    holdout: float = 0.125
    val_interval: int = 50
    checkpoint_interval: int = 50
    log_interval: int = 10
    optim_wrapper: dict = field(default_factory=lambda: dict(type='OptimWrapper', optimizer=dict(type='Adam')))
    param_scheduler: list | None = None
    hooks: list = field(default_factory=list)

    def check(self, key: str) -> None:
        positive(
            key, self, 'iters', 'batch_size', 'lr', 'augment', 'val_interval', 'checkpoint_interval', 'log_interval'
        )
        check_choice(f'{key}.combine', self.combine, ('and', 'or'))
        check_choice(f'{key}.box_loss', self.box_loss, ('l1', 'giou'))
        check_choice(f'{key}.target', self.target, ('float', 'ground_truth'))
        for name in ('score_thr', 'iou_thr'):
            if not 0 <= getattr(self, name) <= 1:
                raise PTQError(f'`{key}.{name}` must lie between 0 and 1, got {getattr(self, name)!r}.')
        if not 0 <= self.holdout < 1:
            raise PTQError(f'`{key}.holdout` must lie in [0, 1), got {self.holdout!r}.')
        for name in ('cls_weight', 'box_weight', 'quality_weight', 'distribution_weight', 'mask_weight'):
            if getattr(self, name) < 0:
                raise PTQError(f'`{key}.{name}` must not be negative, got {getattr(self, name)!r}; 0 leaves it out.')
        if self.max_boxes is not None and self.max_boxes < 1:
            raise PTQError(f'`{key}.max_boxes` must be None or a whole number of at least 1, got {self.max_boxes!r}.')
        for name in ('bias_lr', 'grid_lr', 'weight_lr', 'weight_scale_lr'):
            if (getattr(self, name) or 0) < 0:
                raise PTQError(f'`{key}.{name}` must not be negative, got {getattr(self, name)!r}; 0 leaves them.')

    def rates(self) -> dict[str, float]:
        """Kind of parameter to learning rate."""
        grid = self.lr if self.grid_lr is None else self.grid_lr
        scales = self.lr if self.weight_scale_lr is None else self.weight_scale_lr
        weights = dict(weight_scale=scales, s=scales, mu=scales, k=grid, eps=grid, weight=self.weight_lr)
        return dict(scale=self.lr, **weights, bias=self.bias_lr)


@dataclass
class ReconstructConfig:
    """Local reconstruction: unit after unit is brought back to what it returned in the float detector.

    By default each layer's weights are solved in closed form, which takes seconds a layer; ``iters`` adds training.
    ``reconstruct='qdrop'`` (or ``dict(method='qdrop', ...)``) starts from a published recipe instead.

    Args:
        method: ``'closed_form'``, ``'adaround'``, ``'brecq'`` or ``'qdrop'``: where the settings below start from.
            Defaults to None, the same as ``'closed_form'``.
        iters: Iterations of training per unit. Defaults to 0.
        batch_size: Images per iteration. Defaults to 8.
        max_positions: Fewer images are taken where they have more positions (of all levels) than this together; one
            is the least. Large maps give more equations than a layer has weights. Defaults to 32768.
        skip_below: Units whose held-out error is below this share of their output's variance already are left as they
            are. Defaults to 5e-4.
        granularity: ``'block'``, ``'layer'`` or ``'paper'`` (blocks in the backbone, layers elsewhere).
            Defaults to ``'layer'``.
        units: Names (patterns) of modules that are units whatever the granularity says.
        search_scales: First give each activation the multiple of its scale that leaves the unit's output the least
            error. Defaults to True.
        compensate: Then solve each layer's weights in closed form: least squares against the float outputs, each
            rounding error compensated by the weights that follow (GPTQ). Defaults to True.
        damping: Pull of the least squares towards the float weights, as a share of the inputs' mean square. Defaults
            to 0.1.
        rounding: ``'adaround'`` (every weight goes to the code above or below, by a relaxed choice), ``'latent'``
            (weights are trained with straight-through gradients) or ``'nearest'``. Defaults to ``'latent'``.
        rounding_lr: Learning rate of the relaxed choice. Defaults to 1e-2.
        weight_lr: Learning rate of ``'latent'`` weights, relative to the quantization step. Defaults to 1e-2.
        weight_scale_lr: Learning rate of the weight quantizers' parameters, relative to their size; 0 leaves them.
            Defaults to 0.
        activation_lr: Learning rate of activation scales, relative to their size; 0 leaves them. Defaults to 1e-3.
        bias_lr: Learning rate of biases, relative to their size; 0 leaves them. Defaults to 0.
        drop: QDrop: probability that an activation inside a unit stays float. Defaults to 0.
        input_drop: QDrop: probability that an input of a unit is the float detector's. Defaults to 0.
        fisher: Share, 0 to 1, of the Fisher weights of the global loss in the squared errors (1: as BRECQ does); 0
            counts all outputs alike. Defaults to 0.9.
        holdout: Share of the calibration images that judges whether a unit got better. Defaults to 0.125.
        cache_gib: Activations kept in memory, in GiB; more goes to the work directory. Defaults to 4.
    """

    method: str | None = None
    iters: int = 0
    batch_size: int = 8
    max_positions: int = 32768
    skip_below: float = 5e-4
    granularity: str = 'layer'
    units: list = field(default_factory=list)
    search_scales: bool = True
    compensate: bool = True
    damping: float = 0.1
    rounding: str = 'latent'
    rounding_lr: float = 1e-2
    weight_lr: float = 1e-2
    weight_scale_lr: float = 0
    activation_lr: float = 1e-3
    bias_lr: float = 0
    drop: float = 0
    input_drop: float = 0
    fisher: float = 0.9
    holdout: float = 0.125
    cache_gib: float = 4

    def check(self, key: str) -> None:
        positive(key, self, 'batch_size', 'max_positions', 'rounding_lr', 'damping')
        check_choice(f'{key}.granularity', self.granularity, ('block', 'layer', 'paper'))
        check_choice(f'{key}.rounding', self.rounding, ('adaround', 'latent', 'nearest'))
        if not 0 <= self.fisher <= 1:
            raise PTQError(f'`{key}.fisher` must lie between 0 and 1, got {self.fisher!r}.')
        for name in ('drop', 'input_drop', 'holdout'):
            if not 0 <= getattr(self, name) < 1:
                raise PTQError(f'`{key}.{name}` must lie in [0, 1), got {getattr(self, name)!r}.')
        for name in ('iters', 'weight_lr', 'weight_scale_lr', 'activation_lr', 'bias_lr', 'cache_gib', 'skip_below'):
            if getattr(self, name) < 0:
                raise PTQError(f'`{key}.{name}` must not be negative, got {getattr(self, name)!r}.')
