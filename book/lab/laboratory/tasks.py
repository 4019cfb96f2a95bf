"""What the Laboratory trains on: digits small enough for a page to carry, two crescents, and its randomness.

The page draws its own random numbers, from streams that are the same in Python and in JavaScript
(``random`` in ``engine.js``): the k-th number of a stream is a hash of its path and k. Index letters: n
example, i input, o output.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from sogrid.experiments.data import load

__all__ = ["LEVELS", "TASKS", "Stream", "Task"]

LEVELS = 16
"""Grey values of a pixel on the page: two pixels are one byte."""

PER_CLASS = 100
GOLDEN = 0x9E3779B9
MASK = 0xFFFFFFFF


def _mix(k: np.ndarray | int) -> np.ndarray:
    """A hash of 32 bits."""
    k = np.asarray(k, np.uint64) & MASK
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        k = (k ^ (k >> shift)) * factor & MASK
    return k ^ (k >> 16)


class Stream:
    """Random numbers with a path of integers.

    Example:
        >>> Stream(1, 0, 3).uniform(2).round(4).tolist()
        [0.0439, 0.9539]
    """

    def __init__(self, *path: int) -> None:
        """See the class."""
        self._key, self._count = 0, 0
        for part in path:
            self._key = int(_mix(self._key + (part + 1) * GOLDEN % 2**32))

    def uniform(self, n: int) -> np.ndarray:
        """The next n, in (0, 1)."""
        counts = np.arange(self._count + 1, self._count + n + 1, dtype=np.uint64)
        self._count += n
        return (_mix(self._key + (counts * GOLDEN & MASK)) + 0.5) / 2**32

    def normal(self, n: int) -> np.ndarray:
        """The next n, by Box and Muller, from two uniform ones each."""
        u, v = self.uniform(2 * n).reshape(n, 2).T
        return np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)


@dataclass(frozen=True, eq=False)
class Task:
    """Data, network and loss.

    Attributes:
        sizes: Widths of the network.
        hidden: Activation of its hidden layers.
        output: Of the last.
        loss: ``"quadratic"``, summed over outputs, or ``"logistic"``, at the logit.
        x: Inputs, float32 ``[n, i]``.
        y: Targets, ``[n, o]``.
    """

    sizes: tuple[int, ...]
    hidden: str
    output: str
    loss: str
    x: np.ndarray
    y: np.ndarray


@cache
def digits() -> np.ndarray:
    """1,000 embedded digits of 14 × 14 pixels, 100 of each class, as integers below :data:`LEVELS`."""
    images, labels = (part.numpy() for part in load("mnist", source="embedded").train)
    kept = np.sort(np.concatenate([np.flatnonzero(labels == c)[:PER_CLASS] for c in range(10)]))
    pooled = images[kept].reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(len(kept), -1)
    return np.rint(pooled * (LEVELS - 1)).astype(np.uint8)


@cache
def one_of_each() -> list[int]:
    """The first digit of each class, by its place in :func:`digits`."""
    labels = load("mnist", source="embedded").train[1].numpy()
    kept = np.sort(np.concatenate([np.flatnonzero(labels == c)[:PER_CLASS] for c in range(10)]))
    return [int(np.flatnonzero(labels[kept] == c)[0]) for c in range(10)]


def _autoencoder() -> Task:
    x = (digits() / (LEVELS - 1)).astype(np.float32)
    return Task((196, 64, 16, 64, 196), "sigmoid", "sigmoid", "quadratic", x, x)


def _crescents(n: int = 200) -> Task:
    """Two crescents, each around an end of the other, whose inputs have a mean far from zero."""
    stream, second = Stream(2017), np.arange(n) % 2 == 1
    angle = np.pi * stream.uniform(n)
    x = np.where(second, 1 - np.cos(angle), np.cos(angle)) + 0.1 * stream.normal(n) + 1.5
    y = np.where(second, 0.5 - np.sin(angle), np.sin(angle)) + 0.1 * stream.normal(n) + 1.5
    points = np.stack([x, y], 1).astype(np.float32)
    return Task((2, 16, 16, 1), "tanh", "identity", "logistic", points, second[:, None].astype(np.float32))


TASKS = {"digits": cache(_autoencoder), "crescents": cache(_crescents)}
"""By name; a call makes one."""
