"""Figures of maps worked out in NumPy, for tests of the figures that reports hold."""

import numpy as np

BOUNDARY = np.pad(np.zeros((6, 6)), 1, constant_values=1)


def pooled(images):
    """The maps of PooledImage: means of 6 x 6 pixels, over the number of cells."""
    return images.double().numpy()[:, 0].reshape(-1, 8, 6, 8, 6).mean((2, 4)) / 64


def scaled(cells):
    return (cells - cells.min()) / (cells.max() - cells.min())


def to_decoy(maps):
    """Mean squared difference of each map, scaled, from the boundary of 8 x 8 cells."""
    return np.array([((scaled(each) - BOUNDARY) ** 2).mean() for each in maps])


def correlations(first, second):
    return np.array([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(first, second, strict=True)])
