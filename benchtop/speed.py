"""How fast the devices multiply: measured, since a table knows neither throttled cards nor CPUs.

With --by_speed, an experiment derives its size from the measured speed. The speed becomes a knob,
measured_tflops, so a run that is resumed, or repeated with that knob, has the same size.
"""

import dataclasses
import math

from benchtop.machine import World
from benchtop.measure import product_flops

WIDTH_ON_CPU, WIDTH = 1024, 4096    # width of the square matrices; larger ones are no faster


class SizedBySpeed:
    """A mix-in for a Config with num_layers, model_dim, vocab_size and train_minutes, for --by_speed."""

    def with_size(self) -> "SizedBySpeed":
        """The Config with num_layers ~ operations**0.17 and a width of 128 per two layers, where these are 0.

        Layers x width for five minutes: 8 x 512 on an H100 and 6 x 384 on an RTX 3090, near the best that
        others found (issues 44 and 332 of autoresearch), 3 x 256 on two cores with AMX and 2 x 128 without.
        """
        layers = self.num_layers or max(1, round(8.2 * (self.operations / 6.8e16) ** 0.17))
        width = self.model_dim or 128 * math.ceil(layers / 2)
        return dataclasses.replace(self, num_layers=layers, model_dim=width)

    @property
    def operations(self) -> float:
        """Floating-point operations in train_minutes, at 35 % of the measured speed of large products."""
        return 0.35e12 * self.measured_tflops * 60 * self.train_minutes

    @property
    def tokens_by_speed(self) -> int:
        """About how many tokens `operations` is enough for; 0 without --by_speed."""
        weights = 12 * self.num_layers * self.model_dim**2 + self.vocab_size * self.model_dim
        return int(self.operations / (6 * weights)) if self.by_speed else 0

    def remarks(self) -> list[str]:
        """A line for the log on the measured speed (run.sh parses it)."""
        return [f"speed       {self.measured_tflops:g} TFLOP/s in large matrix products, which sets the size"
                f"; enough for {self.tokens_by_speed / 1e6:,.1f} million tokens"] if self.by_speed else []


def with_speed(cfg, world: World):
    """The Config with the size that --by_speed derives from the devices' speed, equal on all processes."""
    if not cfg.by_speed:
        return cfg
    if not cfg.measured_tflops:
        total = sum(world.gather(product_tflops(world)))
        cfg = dataclasses.replace(cfg, measured_tflops=float(f"{total:.3g}"))
    return cfg.with_size()


def product_tflops(world: World) -> float:
    """TFLOP/s of this process's device in large products of the run's dtype."""
    width = WIDTH_ON_CPU if world.device.type == "cpu" else WIDTH
    return product_flops(world, world.dtype, width) / 1e12
