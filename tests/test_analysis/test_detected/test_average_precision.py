"""Average precision of images that count more than once, and the interval of a difference."""

import numpy as np
import pytest
from scenes import CLASSES, scene, worse

from mmdet_ptq.analysis.detected.average_precision import match_classes, mean_precision, paired_bootstrap
from mmdet_ptq.analysis.detected.comparison import compare


def test_an_image_that_counts_twice_is_as_two_images():
    truths, found = scene(1, images=20)
    counts = np.random.default_rng(0).integers(0, 4, 20)
    counted = mean_precision(match_classes(found, truths, len(CLASSES)), counts)
    copies = [(image, copy) for image, count in zip(truths, counts, strict=True) for copy in range(count)]
    repeated = [{copy: side[copy[0]] for copy in copies} for side in (found, truths)]
    assert counted == pytest.approx(mean_precision(match_classes(*repeated, len(CLASSES))), abs=2e-3)


def test_the_bootstrap_agrees_with_the_jackknife_and_finds_nothing_between_equals():
    truths, before = scene(0, images=200)
    order = np.random.default_rng(0).permutation(list(before))
    after = worse({image: before[image] for image in order})  # not in step with the groups of images
    matches = [[match_classes(side, truths, len(CLASSES))] for side in (before, after)]
    difference, low, high = paired_bootstrap(*matches, resamples=300)
    assert low < difference < high < 0
    jackknife = compare('worse', before, after, truths, CLASSES).interval
    assert high - low == pytest.approx(jackknife[1] - jackknife[0], rel=0.35)
    assert paired_bootstrap(matches[0], matches[0], resamples=20) == (0, 0, 0)


def test_seeds_that_differ_widen_the_interval():
    truths, before = scene(0, images=200)
    some, more = (match_classes(worse(before, step), truths, len(CLASSES)) for step in (4, 2))
    start = match_classes(before, truths, len(CLASSES))
    alone = paired_bootstrap([start] * 2, [some] * 2, resamples=200)
    mixed = paired_bootstrap([start] * 2, [some, more], resamples=200)
    assert mixed[2] - mixed[1] > 1.5 * (alone[2] - alone[1])
