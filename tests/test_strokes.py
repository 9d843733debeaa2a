import numpy as np
import pytest

import prepro
from datasets import strokes


def test_shapes_range_and_classes():
    images, labels = strokes.draw_digits(9298, 0)
    assert images.shape == (9298, 16, 16) and images.dtype == np.float32
    assert labels.dtype == np.int64
    assert images.min() == -1 and images.max() == 1
    counts = np.bincount(labels, minlength=10)
    chi_squared = ((counts - 929.8) ** 2 / 929.8).sum()
    assert chi_squared < 27.9  # the 99.9% quantile for 9 degrees of freedom


@pytest.mark.parametrize("n", [1, 1023, 1024, 1025, 2500])
def test_a_larger_set_begins_with_the_smaller_one(n):
    many, labels = strokes.draw_digits(3000, (5, 1))
    few, few_labels = strokes.draw_digits(n, (5, 1))
    np.testing.assert_array_equal(many[:n], few)
    np.testing.assert_array_equal(labels[:n], few_labels)


def test_seeds_and_splits_differ():
    a, b = strokes.draw_digits(50, 1)[0], strokes.draw_digits(50, 2)[0]
    assert not np.array_equal(a, b)
    splits = prepro.build_strokes(2000, 2000)
    others = strokes.draw_digits(3000, prepro.STROKES_SEED)[0]
    whole = np.concatenate([splits.train_images, splits.test_images, others])
    assert len(np.unique(whole.reshape(len(whole), -1), axis=0)) == 7000  # no digit is drawn twice


def test_the_pen_moves_evenly_along_the_strokes_and_not_between_them():
    path, spacing = strokes._pen_path([[(0.0, 0.0), (0.0, 1.0)], [(5.0, 0.0), (5.0, 0.5), (5.0, 1.0)]])
    assert spacing == pytest.approx(2 / strokes.POINTS)
    np.testing.assert_allclose(path[:32, 0], -2.5)  # centred
    np.testing.assert_allclose(path[32:, 0], 2.5)
    np.testing.assert_allclose(np.diff(path[:32, 1]), spacing)
    np.testing.assert_allclose(np.diff(path[32:, 1]), spacing)


def test_curves_pass_through_their_points():
    points = np.array([(0.0, 0.0), (0.4, 0.1), (0.7, 0.6), (0.2, 1.0)])
    curve = strokes._curve(points)
    for point in points:
        assert np.linalg.norm(curve - point, axis=1).min() < 1e-12


def test_digits_can_be_told_apart_and_not_too_easily():
    """Nearest neighbours are as often right as on MNIST and USPS, and class means are not enough."""
    images, labels = strokes.draw_digits(5000, 3)
    flat = images.reshape(5000, -1)
    train, test = flat[:4000], flat[4000:]
    squares = (test**2).sum(1)[:, None] + (train**2).sum(1) - 2 * test @ train.T
    nearest = (labels[:4000][squares.argmin(1)] != labels[4000:]).mean()
    means = np.stack([train[labels[:4000] == digit].mean(0) for digit in range(10)])
    mean = (((test[:, None] - means) ** 2).sum(2).argmin(1) != labels[4000:]).mean()
    assert 0.02 < nearest < 0.10
    assert 0.10 < mean < 0.35
