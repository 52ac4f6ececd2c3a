"""How fast the devices multiply: measured, since a table knows no throttled card and no CPU.

An experiment may leave its size to that (--by_speed). What was measured becomes a knob, so a run that is
resumed, or repeated with that knob, has the same size.
"""

import dataclasses
import statistics
import time

import torch

from benchtop.machine import World

SECONDS = 0.5           # that the measuring takes
WIDTH_ON_CPU, WIDTH = 1024, 4096    # of the square matrices; larger ones are no faster
AT_ONCE = 10            # products that an accelerator is given before it is waited for


def with_speed(cfg, world: World):
    """The Config with the size that it leaves to the speed of the devices, the same on all processes."""
    if not cfg.by_speed:
        return cfg
    if not cfg.measured_tflops:
        total = sum(world.gather(product_tflops(world)))
        cfg = dataclasses.replace(cfg, measured_tflops=float(f"{total:.3g}"))
    return cfg.with_size()


def product_tflops(world: World) -> float:
    """TFLOP/s of this process's device in large products of the run's dtype: the median of half a second."""
    width, count = (WIDTH_ON_CPU, 1) if world.device.type == "cpu" else (WIDTH, AT_ONCE)
    left, right = torch.randn(2, width, width, device=world.device).to(world.dtype)

    def seconds() -> float:
        world.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            left @ right
        world.synchronize()
        return time.perf_counter() - start
    seconds()       # the first product starts up libraries
    times, end = [seconds()], time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        times.append(seconds())
    return 2e-12 * count * width**3 / statistics.median(times)
