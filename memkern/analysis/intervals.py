"""Intervals for shares: how far an accuracy from n trials can be trusted."""

from __future__ import annotations

import math


def wilson_interval(successes: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval (1927) for a share; 95% by default, the whole of [0, 1] without trials.

    Raises:
        ValueError: more successes than trials, or negative counts.
    """
    if trials < 0 or not 0 <= successes <= trials:
        raise ValueError(f"successes: expected 0 to trials ({trials}), got {successes}")
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # At the ends of the range rounding must not move the bound off the share itself.
    low = 0.0 if successes == 0 else max(0.0, (centre - half) / scale)
    high = 1.0 if successes == trials else min(1.0, (centre + half) / scale)
    return low, high
