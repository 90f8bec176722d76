"""How fast devices compute: FLOP/s of the model on each, and the share of its peak (MFU, model FLOP utilization).

The operations are those of the model (`models/flops.py`), not of the machine: recomputed activations count once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Devices:
    """The devices that compute a step together: how many, and the peak of one in FLOP/s where it is known."""

    count: int = 1
    peak_flops: float | None = None

    def flops_per_s(self, flops: float, elapsed_s: float) -> float | None:
        """FLOP/s of each device for `flops` operations of all of them in this time; None where no time has passed."""
        return flops / elapsed_s / self.count if elapsed_s > 0 else None

    def mfu(self, flops: float, elapsed_s: float) -> float | None:
        """The share of the peak that these are, 0 to 1; None where the peak is not known or no time has passed."""
        each = self.flops_per_s(flops, elapsed_s)
        return None if each is None or not self.peak_flops else each / self.peak_flops
