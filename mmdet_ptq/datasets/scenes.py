"""One image of the embedded data set and its boxes, from nothing but a seed.

Only ``Generator.random`` of PCG64 is used, whose stream never changes between numpy versions, and shapes are
rasterised in numpy from signed distances (float64, so that a box does not depend on the processor either).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy import ndarray

from mmdet_ptq.datasets.shapes import CLASSES, SHAPES

MAX_OBJECTS = 8
MIN_SIZE, MAX_SIZE = 24.0, 160.0  # diameter of a shape's circumscribed circle, pixels
MIN_VISIBLE = 0.3  # objects of which less can be seen are not annotated
MAX_OVERLAP = 0.55  # of the smaller of two bounding squares; more is tried again elsewhere
PLACEMENT_TRIALS = 12


class Dice:
    """Random numbers of one image.

    Args:
        seed: Seed of the data set.
        stream: Number of the split.
        index: Number of the image in its split.
    """

    def __init__(self, seed: int, stream: int, index: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, stream, index])))

    def uniform(self, low: float, high: float, power: float = 1.0) -> float:
        """A number between low and high; a power above 1 prefers low ones."""
        return low + (high - low) * float(self._generator.random()) ** power

    def integer(self, low: int, high: int, power: float = 1.0) -> int:
        """An integer from low to high, both included."""
        return min(high, int(self.uniform(low, high + 1, power)))

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return float(self._generator.random()) < probability

    def array(self, *shape: int) -> ndarray:
        """Uniform numbers in [0, 1), float32."""
        return self._generator.random(shape, dtype=np.float32)


@dataclass(frozen=True)
class Placement:
    """Where and how a shape lies in the image.

    Args:
        label: Index into ``CLASSES``.
        center: x and y of the centre, pixels.
        radius: Radius of the circumscribed circle, pixels.
        angle: Rotation, radians.
        aspect: Second axis as a fraction of the first, in (0, 1].
    """

    label: int
    center: tuple[float, float]
    radius: float
    angle: float
    aspect: float

    def local(self, x: ndarray, y: ndarray) -> tuple[ndarray, ndarray]:
        """Pixel coordinates as the shape's unit coordinates."""
        x, y = x - self.center[0], y - self.center[1]
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        return (x * cos + y * sin) / self.radius, (y * cos - x * sin) / (self.radius * self.aspect)

    def distance(self, x: ndarray, y: ndarray) -> ndarray:
        """Signed distance of pixel coordinates to the outline, pixels (never more than the true one)."""
        return SHAPES[CLASSES[self.label]](*self.local(x, y)) * (self.radius * self.aspect)


@dataclass
class Scene:
    """An image and what is annotated in it.

    Args:
        image: (H, W, 3), uint8, BGR.
        placements: The annotated objects.
        boxes: (n, 4), int64, ``x1, y1, x2, y2``: the tight box of the whole shape, occluded parts included,
            clipped to the image; ``x2`` and ``y2`` are one past the last pixel.
        masks: (H, W), bool: the pixels of each shape inside the image, occluded ones included.
        visible: Share of each shape that is inside the image and not covered.
    """

    image: ndarray
    placements: list[Placement] = field(default_factory=list)
    boxes: ndarray = field(default_factory=lambda: np.zeros((0, 4), np.int64))
    masks: list[ndarray] = field(default_factory=list)
    visible: list[float] = field(default_factory=list)


def make_scene(seed: int, stream: int, index: int) -> Scene:
    """Generates one image.

    Args:
        seed: Seed of the data set.
        stream: Number of the split; splits share no random numbers.
        index: Number of the image in its split.
    """
    dice = Dice(seed, stream, index)
    width, height = dice.integer(224, 288), dice.integer(192, 256)
    canvas = _background(dice, height, width)
    # who is on top of a pixel: -1 nobody, an object's number, or -2 an occluding line
    owner = np.full((height, width), -1, np.int16)
    for _ in range(dice.integer(0, 4)):
        _paint_line(dice, canvas)
    for _ in range(dice.integer(0, 3)):
        _paint_blob(dice, canvas)

    placements, full, boxes, masks = [], [], [], []
    for placement in _place(dice, height, width):
        silhouette, window = _paint_shape(dice, canvas, placement)
        inside = silhouette[window.inner]
        owner[window.outer][inside] = len(placements)
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        placements.append(placement)
        full.append(int(silhouette.sum()))
        masks.append(np.zeros((height, width), bool))
        masks[-1][window.outer] = inside
        boxes.append(
            (columns[0] + window.x1, rows[0] + window.y1, columns[-1] + 1 + window.x1, rows[-1] + 1 + window.y1)
            if inside.any()
            else (0, 0, 0, 0)
        )
    if dice.chance(0.35):
        covered, line_window = _paint_line(dice, canvas)
        owner[line_window.outer][covered] = -2

    counts = np.bincount(owner[owner >= 0], minlength=len(placements))
    visible = [counts[i] / full[i] for i in range(len(placements))]
    kept = [i for i in range(len(placements)) if visible[i] >= MIN_VISIBLE]
    return Scene(
        image=_sensor(dice, canvas),
        placements=[placements[i] for i in kept],
        boxes=np.array([boxes[i] for i in kept], np.int64).reshape(-1, 4),
        masks=[masks[i] for i in kept],
        visible=[float(visible[i]) for i in kept],
    )


@dataclass(frozen=True)
class _Window:
    """A rectangle of pixels that may stick out of the image; ``x1..y2`` is the part inside."""

    left: int
    top: int
    right: int
    bottom: int
    width: int
    height: int

    @property
    def x1(self) -> int:
        return min(max(self.left, 0), self.width)

    @property
    def y1(self) -> int:
        return min(max(self.top, 0), self.height)

    @property
    def outer(self) -> tuple[slice, slice]:
        """The inside part as an index into the image."""
        return (
            slice(self.y1, min(max(self.bottom, 0), self.height)),
            slice(self.x1, min(max(self.right, 0), self.width)),
        )

    @property
    def inner(self) -> tuple[slice, slice]:
        """The inside part as an index into the window."""
        rows, columns = self.outer
        return (
            slice(rows.start - self.top, rows.stop - self.top),
            slice(columns.start - self.left, columns.stop - self.left),
        )

    def grid(self) -> tuple[ndarray, ndarray]:
        """Pixel centres, broadcastable x (1, w) and y (h, 1)."""
        return (np.arange(self.left, self.right)[None, :] + 0.5, np.arange(self.top, self.bottom)[:, None] + 0.5)


def _window(canvas: ndarray, left: float, top: float, right: float, bottom: float) -> _Window:
    edges = (int(np.floor(left)) - 1, int(np.floor(top)) - 1, int(np.ceil(right)) + 1, int(np.ceil(bottom)) + 1)
    return _Window(*edges, width=canvas.shape[2], height=canvas.shape[1])


def _smooth_noise(dice: Dice, height: int, width: int, cells: int, channels: int = 1) -> ndarray:
    """Bilinear interpolation of a coarse grid of uniform numbers; (channels, height, width) in [-0.5, 0.5)."""
    coarse = dice.array(channels, cells + 1, cells + 1) - np.float32(0.5)

    def hat_functions(size: int) -> ndarray:
        position = np.linspace(0, cells, size, dtype=np.float32)[:, None]
        return np.maximum(1 - np.abs(position - np.arange(cells + 1, dtype=np.float32)), 0)

    return hat_functions(height) @ coarse @ hat_functions(width).T


def _background(dice: Dice, height: int, width: int) -> ndarray:
    """A gradient with smooth noise and, often, stripes or a checkerboard; (3, height, width), float32, 0..255."""
    first, second = dice.array(2, 3, 1, 1) * 200 + 28
    if dice.chance(0.6):
        second = first + (second - first) * np.float32(0.3)
    x = np.arange(width, dtype=np.float32)[None, :]
    y = np.arange(height, dtype=np.float32)[:, None]

    def along(angle: float) -> ndarray:
        return np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y

    ramp = along(dice.uniform(0, 2 * np.pi))
    canvas = first + (second - first) * ((ramp - ramp.min()) / np.float32(np.ptp(ramp)))
    canvas += _smooth_noise(dice, height, width, dice.integer(2, 6), 3) * np.float32(dice.uniform(0, 90))
    if dice.chance(0.5):
        canvas += _smooth_noise(dice, height, width, dice.integer(20, 60)) * np.float32(dice.uniform(0, 50))
    kind = dice.uniform(0, 1)
    if kind < 0.45:
        angle, frequency = dice.uniform(0, np.pi), np.float32(2 * np.pi / dice.uniform(8, 60))
        wave = np.sin(along(angle) * frequency)
        if kind < 0.2:
            wave = np.sign(wave * np.sin(along(angle + np.pi / 2) * frequency))
        canvas += wave * ((dice.array(3, 1, 1) - np.float32(0.5)) * np.float32(dice.uniform(10, 50)))
    return np.clip(canvas, 0, 255, out=canvas)


def _place(dice: Dice, height: int, width: int) -> list[Placement]:
    """Shapes to draw, the lowest first; they may overlap and stick out of the image, within limits."""
    placed: list[Placement] = []
    for _ in range(dice.integer(1, MAX_OBJECTS, power=1.3)):
        label = dice.integer(0, len(CLASSES) - 1)
        radius = 0.5 * MIN_SIZE * (MAX_SIZE / MIN_SIZE) ** dice.uniform(0, 1, power=0.8)
        angle, aspect = dice.uniform(0, 2 * np.pi), dice.uniform(1, 0.75, power=1.5)
        for _ in range(PLACEMENT_TRIALS):
            margin = 0.5 * radius
            center = (dice.uniform(margin, width - margin), dice.uniform(margin, height - margin))
            if all(_overlap(center, radius, other) <= MAX_OVERLAP for other in placed):
                placed.append(Placement(label, center, radius, angle, aspect))
                break
    return placed


def _overlap(center: tuple[float, float], radius: float, other: Placement) -> float:
    """Overlap of two bounding squares as a share of the smaller one."""
    reach = [
        min(radius + other.radius - abs(center[i] - other.center[i]), 2 * min(radius, other.radius)) for i in range(2)
    ]
    return max(reach[0], 0.0) * max(reach[1], 0.0) / (2 * min(radius, other.radius)) ** 2


def _blend(canvas: ndarray, window: _Window, alpha: ndarray, colour: ndarray) -> None:
    """Lays a colour, (3, 1, 1) or (3, h, w) of the window, over the canvas, (3, H, W)."""
    region = canvas[(slice(None), *window.outer)]
    if colour.shape[1:] == alpha.shape:
        colour = colour[(slice(None), *window.inner)]
    region += alpha[window.inner].astype(np.float32) * (colour - region)


def _mean_colour(canvas: ndarray, window: _Window) -> ndarray:
    """The mean colour under a window, (3, 1, 1)."""
    return canvas[(slice(None), *window.outer)].mean((1, 2), keepdims=True)


def _contrasting(dice: Dice, base: ndarray, contrast: float) -> ndarray:
    """A colour, (3, 1, 1), whose largest channel difference to the base is about the contrast."""
    direction = dice.array(3, 1, 1) * 2 - 1
    direction *= np.float32(contrast) / np.abs(direction).max()
    colour = base + direction
    outside = (colour < 0) | (colour > 255)
    return np.clip(np.where(outside, base - direction, colour), 0, 255)


def _paint_shape(dice: Dice, canvas: ndarray, placement: Placement) -> tuple[ndarray, _Window]:
    """Draws a textured shape; returns its silhouette in the window, and the window."""
    (cx, cy), radius = placement.center, placement.radius
    window = _window(canvas, cx - radius, cy - radius, cx + radius, cy + radius)
    x, y = window.grid()
    distance = placement.distance(x, y)
    base = _mean_colour(canvas, window)
    colour = main = _contrasting(dice, base, dice.uniform(32, 160))
    other = _contrasting(dice, main, dice.uniform(10, 70))
    mix = _texture(dice, placement, window)
    if mix is not None:
        colour = main + (other - main) * mix
    if dice.chance(0.25):
        rim = np.clip(dice.uniform(1, 3) + distance, 0, 1).astype(np.float32)
        colour = colour * (1 - rim * np.float32(dice.uniform(0.2, 0.6)))
    opacity = dice.uniform(0.75, 1) if dice.chance(0.3) else 1.0
    _blend(canvas, window, np.clip(0.5 - distance, 0, 1) * opacity, colour)
    return distance <= 0, window


def _texture(dice: Dice, placement: Placement, window: _Window) -> ndarray | None:
    """How much of the second colour each pixel of the window has, 0 to 1; None for a plain shape."""
    kind = dice.integer(0, 4)
    if kind == 0:
        return None
    x, y = placement.local(*window.grid())
    x, y = x.astype(np.float32), y.astype(np.float32)
    period = np.float32(dice.uniform(2, 7) * np.pi)
    if kind == 1:
        return np.clip(0.5 + 0.5 * x, 0, 1)
    if kind == 2:
        return 0.5 + 0.5 * np.sin(period * y)
    if kind == 3:
        return (np.sin(period * x) * np.sin(period * y) > 0).astype(np.float32)
    return _smooth_noise(dice, window.bottom - window.top, window.right - window.left, dice.integer(3, 9))[0] + 0.5


def _paint_line(dice: Dice, canvas: ndarray) -> tuple[ndarray, _Window]:
    """Draws a straight bar across the image; returns the pixels it covers in the image, and its window."""
    height, width = canvas.shape[1:]
    x1, y1, x2, y2 = (dice.uniform(0, size) for size in (width, height, width, height))
    thick = dice.uniform(1, 4)
    window = _window(canvas, min(x1, x2) - thick, min(y1, y2) - thick, max(x1, x2) + thick, max(y1, y2) + thick)
    x, y = window.grid()
    dx, dy = x2 - x1, y2 - y1
    along = np.clip(((x - x1) * dx + (y - y1) * dy) / max(dx * dx + dy * dy, 1e-6), 0, 1)
    distance = np.hypot(x - x1 - along * dx, y - y1 - along * dy) - thick
    base = _mean_colour(canvas, window)
    _blend(canvas, window, np.clip(0.5 - distance, 0, 1), _contrasting(dice, base, dice.uniform(20, 120)))
    return distance[window.inner] <= 0, window


def _paint_blob(dice: Dice, canvas: ndarray) -> None:
    """Draws a blurred spot, which is no object."""
    height, width = canvas.shape[1:]
    cx, cy, radius = dice.uniform(0, width), dice.uniform(0, height), dice.uniform(10, 60)
    window = _window(canvas, cx - radius, cy - radius, cx + radius, cy + radius)
    x, y = window.grid()
    alpha = np.clip(1 - ((x - cx) ** 2 + (y - cy) ** 2) / radius**2, 0, 1) ** 2
    base = _mean_colour(canvas, window)
    _blend(canvas, window, alpha, _contrasting(dice, base, dice.uniform(20, 100)))


def _sensor(dice: Dice, canvas: ndarray) -> ndarray:
    """Blur, exposure and noise; (3, H, W), float32 to (H, W, 3), uint8."""
    if dice.chance(0.4):
        rows = np.concatenate([canvas[:, :1], canvas, canvas[:, -1:]], 1)
        canvas = 0.5 * canvas + 0.25 * (rows[:, :-2] + rows[:, 2:])
        columns = np.concatenate([canvas[:, :, :1], canvas, canvas[:, :, -1:]], 2)
        canvas = 0.5 * canvas + 0.25 * (columns[:, :, :-2] + columns[:, :, 2:])
    canvas = canvas * np.float32(dice.uniform(0.75, 1.15)) + np.float32(dice.uniform(-12, 12))
    sigma = dice.uniform(0, 14, power=2)
    # grey noise; the difference of two uniform numbers has the variance 1 / 6 and is close enough to a normal one
    noise = dice.array(*canvas.shape[1:]) - dice.array(*canvas.shape[1:])
    image = np.clip(np.rint(canvas + noise * np.float32(6**0.5 * sigma)), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(image.transpose(1, 2, 0))
