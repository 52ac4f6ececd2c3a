"""Measure how fast a device is in matrix products, copies or any work, and profile its kernels."""

import re
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from benchtop.machine import World

# a kernel is of the first kind whose pattern matches its name
KINDS = {"attention": r"flex_attention|flash|fmha|triton_tem_.*flex",
         "products": r"gemm|nvjet|cutlass|xmma|cublas|splitK|Kernel2|scaled_mm",
         "embeddings": r"embedding|scatter|RadixSort|compute_grad_weight|indexing_backward|index_put",
         "exchange": r"nccl", "copies": r"[Mm]emcpy|[Mm]emset|copy_kernel",
         "compiled": r"^triton_", "other": r""}


def seconds_of(work: Callable[[], object], world: World, times: int = 5, warm_ups: int = 1) -> float:
    """Median seconds that `work` takes after warming up, including the wait for the device."""
    taken = []
    for _ in range(warm_ups + times):
        world.synchronize()
        begun = time.perf_counter()
        work()
        world.synchronize()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken[warm_ups:])


def rate_of(work: Callable[[], object], amount: float, world: World, at_least: float = 0.05) -> float:
    """`amount` per second; `work` is repeated, at most 200 times, to make a measurement last `at_least` s."""
    once = seconds_of(work, world, times=3, warm_ups=2)
    repeats = max(1, min(200, int(at_least / max(once, 1e-6))))

    def many() -> None:
        for _ in range(repeats):
            work()
    return amount * repeats / seconds_of(many, world, times=7)


def product_flops(world: World, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations per second in products of (size, size) matrices."""
    a, b = (torch.randn(size, size, device=world.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return rate_of(lambda: torch.mm(a, b, out=out), 2 * size**3, world)


def fp8_product_flops(world: World, size: int) -> float:
    """product_flops in FP8 (e4m3), with the result in bfloat16."""
    a, b = (torch.randn(size, size, device=world.device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=world.device)
    return rate_of(lambda: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True),
                   2 * size**3, world)


def copy_bytes(world: World, size: int) -> float:
    """Bytes per second, read plus written, when copying `size` bytes within the device's memory."""
    source = torch.ones(size // 4, device=world.device)
    target = torch.empty_like(source)
    return rate_of(lambda: target.copy_(source), 2 * size, world)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Norm of found - wanted, divided by the norm of wanted; in float64 on the CPU."""
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def kernels_of(work: Callable[[], object], world: World) -> dict[str, tuple[int, float]]:
    """The kernels that `work` launches on a CUDA device: name -> (number, total seconds)."""
    cuda = torch.autograd.DeviceType.CUDA
    world.synchronize()
    # without CPU activities, regions that a library marks do not count as kernels; acc_events only avoids
    # a warning that all cycles but the last are dropped, since there is only one
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA],
                                acc_events=True) as profile:
        work()
        world.synchronize()
    return added_up((event.name, event.time_range.elapsed_us() / 1e6) for event in profile.events()
                    if event.device_type == cuda and not getattr(event, "is_user_annotation", False))


def added_up(kernels: Iterable[tuple[str, float]]) -> dict[str, tuple[int, float]]:
    """name -> (number, total seconds)"""
    found: dict[str, tuple[int, float]] = {}
    for name, seconds in kernels:
        count, total = found.get(name, (0, 0.0))
        found[name] = (count + 1, total + seconds)
    return found


def by_kind(kernels: dict[str, tuple[int, float]]) -> dict[str, tuple[int, float]]:
    """kind -> (number, total seconds) for each of KINDS, the longest first."""
    found: dict[str, tuple[int, float]] = {}
    for name, (count, seconds) in kernels.items():
        kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, name))
        counts, total = found.get(kind, (0, 0.0))
        found[kind] = (counts + count, total + seconds)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))
