"""The classes of the embedded data set: signed distances to their outlines.

Every function takes unit coordinates ``x``, ``y`` (equally shaped arrays; the shape fills the unit circle) and returns
an array of the same shape: negative inside, positive outside, zero on the outline, and near the outline the Euclidean
distance. Some pairs look alike on purpose (disk / ring, square / cross, triangle / star).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy import ndarray


def disk(x: ndarray, y: ndarray) -> ndarray:
    """Distance to the unit circle."""
    return np.hypot(x, y) - 1.0


def ring(x: ndarray, y: ndarray) -> ndarray:
    """Distance to an annulus of radii 0.55 and 1."""
    return np.abs(np.hypot(x, y) - 0.775) - 0.225


def _convex_polygon(x: ndarray, y: ndarray, corners: int) -> ndarray:
    """Distance to the regular polygon whose corners lie on the unit circle, the first of them at angle 90 degrees."""
    inner_radius = np.cos(np.pi / corners)
    normals = np.pi / 2 + np.pi / corners + 2 * np.pi / corners * np.arange(corners)
    distance = np.full(np.broadcast(x, y).shape, -np.inf)
    for angle in normals:
        np.maximum(distance, x * np.cos(angle) + y * np.sin(angle) - inner_radius, out=distance)
    return distance


def triangle(x: ndarray, y: ndarray) -> ndarray:
    """Distance to an equilateral triangle."""
    return _convex_polygon(x, y, 3)


def square(x: ndarray, y: ndarray) -> ndarray:
    """Distance to a square."""
    return _convex_polygon(x, y, 4)


def star(x: ndarray, y: ndarray) -> ndarray:
    """Distance to a five-pointed star, its inner corners at radius 0.45."""
    # fold the plane onto the half sector between a tip (angle 0) and the next inner corner (angle 36 degrees)
    sector = 2 * np.pi / 5
    angle = np.arctan2(x, y)
    angle = np.abs(angle - sector * np.round(angle / sector))
    radius = np.hypot(x, y)
    inner = 0.45 * np.array([np.cos(sector / 2), np.sin(sector / 2)])
    edge = inner - np.array([1.0, 0.0])
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    return (radius * np.cos(angle) - 1.0) * normal[0] + radius * np.sin(angle) * normal[1]


def cross(x: ndarray, y: ndarray) -> ndarray:
    """Distance to a plus sign with bars of width 0.6."""
    long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    return np.maximum(short - 0.3, long - 0.95)


# the order is the order of the class labels
SHAPES: dict[str, Callable[[ndarray, ndarray], ndarray]] = {
    'disk': disk,
    'ring': ring,
    'triangle': triangle,
    'square': square,
    'star': star,
    'cross': cross,
}
CLASSES: tuple[str, ...] = tuple(SHAPES)
