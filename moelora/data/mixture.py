"""Mixing tasks: how often each is seen."""

from __future__ import annotations

import random

from datasets import Dataset, concatenate_datasets

from moelora.data.load import Task


def probabilities(sizes: list[int], weights: list[float], temperature: float) -> list[float]:
    """Share of each task: proportional to weight * size^(1/temperature). 1 follows the sizes, large makes all equal."""
    raw = [weight * size ** (1 / temperature) for size, weight in zip(sizes, weights, strict=True)]
    return [value / sum(raw) for value in raw]


def mix(tasks: list[Task], temperature: float, seed: int) -> Dataset:
    """One epoch of all tasks, shuffled: as many rows as there are in all, each task with its share.

    A task that gets more rows than it has repeats them, in a new order each time round; one that gets fewer is sampled
    without repetition. With equal weights and temperature 1 every row comes exactly once.
    """
    sizes = [len(task.train) for task in tasks]
    shares = probabilities(sizes, [task.config.weight for task in tasks], temperature)
    rng = random.Random(seed)
    parts = []
    for task, size, count in zip(tasks, sizes, _apportion(shares, sum(sizes)), strict=True):
        order: list[int] = []
        while len(order) < count:
            order += rng.sample(range(size), size)
        parts.append(task.train.select(order[:count]))
    return concatenate_datasets(parts).shuffle(seed=seed)


def _apportion(shares: list[float], total: int) -> list[int]:
    """Whole counts that add up to ``total``, largest remainders first, and at least one each."""
    exact = [share * total for share in shares]
    counts = [max(1, int(value)) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: exact[i] - int(exact[i]), reverse=True)
    for i in by_remainder[: max(0, total - sum(counts))]:
        counts[i] += 1
    return counts
