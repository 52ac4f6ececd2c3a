"""How fast the devices multiply: measured, since a table knows no throttled card and no CPU.

An experiment may leave its size to that (--by_speed). What was measured becomes a knob, so a run that is
resumed, or repeated with that knob, has the same size.
"""

import dataclasses

from benchtop.machine import World
from benchtop.measure import product_flops

WIDTH_ON_CPU, WIDTH = 1024, 4096    # of the square matrices; larger ones are no faster


def with_speed(cfg, world: World):
    """The Config with the size that it leaves to the speed of the devices, the same on all processes."""
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
