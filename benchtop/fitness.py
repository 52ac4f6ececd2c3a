"""Checks of a machine that need no model: versions, driver, power, memory, speed of matrix products.

`machine` and `product` are parts of ./run.sh proof; Proof is what all of its parts share.
"""

import dataclasses
import functools
import os
import shutil
import sys
from collections.abc import Iterator

import torch

from benchtop import host, places
from benchtop.apart import FAILED, OK, SKIPPED, WARNING, Finding
from benchtop.command_line import figure
from benchtop.errors import first_line
from benchtop.gpus import ask_nvidia_smi, bad_pair, problems_of
from benchtop.machine import MIX_ORDER, Kernels, World, choose_kernels, has_wrong_reductions
from benchtop.measure import copy_bytes, fp8_product_flops, product_flops, seconds_of
from benchtop.run import Experiment

LEAST_SHARE = 0.6       # of the vendor's peak; a large matrix product below this is slow
LEAST_DISK_MIB = 10_000
LARGE = 8192            # rows and columns of the matrices; a quarter of that on a CPU
LOAD_SECONDS = 1.5      # of matrix products to run while nvidia-smi reads the clocks


@dataclasses.dataclass(frozen=True)
class Proof:
    """What all parts share: an experiment, the Config to measure, and this machine."""
    experiment: Experiment
    cfg: object
    world: World

    @functools.cached_property
    def kernels(self) -> Kernels:
        return choose_kernels(self.cfg, self.world)

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def dtype(self) -> torch.dtype:
        return self.world.dtype

    @property
    def on_cuda(self) -> bool:
        return self.world.device.type == "cuda"

    @property
    def on_cpu(self) -> bool:
        return self.world.device.type == "cpu"


def short_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------
# What the machine is
# ------------------------------------------------------------------------------------------------

def machine(proof: Proof) -> Iterator[Finding]:
    world = proof.world
    yield versions()
    facts = world.facts() | {"dtype_reason": world.dtype_reason}
    yield Finding("device", f"{world.device_name()}; {short_name(proof.dtype)}: {world.dtype_reason}",
                  values=facts)
    if proof.on_cuda:
        yield from cards()
    free = {"machine_mib": host.free_memory_mib()}
    if proof.on_cuda:
        free["gpu_mib"] = torch.cuda.mem_get_info()[0] / 2**20
    yield Finding("memory", " and ".join(f"{mib:,.0f} MiB of the {where.removesuffix('_mib')}'s memory"
                                         for where, mib in free.items()) + " are free", values=free)
    disk = shutil.disk_usage(places.ROOT).free / 2**20
    yield Finding("disk", f"{disk:,.0f} MiB are free", OK if disk > LEAST_DISK_MIB else WARNING,
                  {"free_mib": disk})


def versions() -> Finding:
    """The versions of torch, CUDA and Python; FAILED for a torch that compiles wrong gradients, or WARNING if
    the cause is switched off."""
    version, fault, status = str(torch.__version__), "", OK
    if has_wrong_reductions():
        fault = f"torch {version} compiles wrong gradients by default; {MIX_ORDER}=0 avoids it"
        status = WARNING if os.environ.get(MIX_ORDER) == "0" else FAILED
    built = next((f"{name} {built}" for name, built in (("CUDA", torch.version.cuda),
                                                        ("HIP", torch.version.hip)) if built), "CPUs")
    return Finding("torch", fault or f"{version} for {built}, Python {sys.version.split()[0]}", status,
                   {"torch": version, "cuda": torch.version.cuda, "fault": fault})


def cards() -> Iterator[Finding]:
    """The driver, and a line for each GPU, as reported by nvidia-smi."""
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    found, problem = ask_nvidia_smi()
    if problem:
        yield Finding("driver", f"not known: {problem}; capability {capability}", WARNING)
        return
    pair = bad_pair(found[0]["driver"], torch.version.cuda)
    yield Finding("driver", pair or f"{found[0]['driver']}; capability {capability}", WARNING if pair else OK,
                  {"driver": found[0]["driver"], "capability": capability})
    for number, gpu in enumerate(found):
        problems = problems_of(gpu)
        power = of_most(gpu, "power_limit_watts", "usual_power_limit_watts", "W")
        yield Finding(f"GPU {number}", "; ".join([f"{gpu['name']}: {power}, {pace_of(gpu)}", *problems]),
                      WARNING if problems else OK, gpu)


def of_most(gpu: dict, fact: str, most: str, unit: str) -> str:
    now, most = ("?" if gpu[each] is None else f"{gpu[each]:,.0f}" for each in (fact, most))
    return f"{now} {unit} of {most}"


def pace_of(gpu: dict) -> str:
    """Clock and temperature."""
    heat = gpu["temperature_celsius"]
    return of_most(gpu, "sm_clock_mhz", "max_sm_clock_mhz", "MHz") + (f", {heat:.0f} C" if heat else "")


# ------------------------------------------------------------------------------------------------
# What the machine can do
# ------------------------------------------------------------------------------------------------

def product(proof: Proof) -> Iterator[Finding]:
    world = proof.world
    size = LARGE // 4 if proof.on_cpu else LARGE
    found = product_flops(world, proof.dtype, size) / 1e12
    yield beside_the_table(proof, found)
    if proof.on_cuda and torch.version.cuda and torch.cuda.get_device_capability() >= (8, 9):
        try:
            fp8 = fp8_product_flops(world, size) / 1e12
            yield Finding("FP8", f"{figure(fp8)} TFLOP/s, {fp8 / found:.2f} times that",
                          values={"tflops": fp8})
        except RuntimeError as error:
            yield Finding("FP8", f"matrix products failed: {first_line(error)}", WARNING)
    if proof.on_cuda:
        yield clocks(proof)
    copied = copy_bytes(world, 16 * size**2) / 1e9
    yield Finding("copy", f"{figure(copied)} GB/s, read and written", values={"gb_per_second": copied})


def beside_the_table(proof: Proof, found: float) -> Finding:
    """The speed of a matrix product in TFLOP/s, and as a fraction of this device's peak if that is known."""
    peak = proof.world.peak_flops(proof.cfg) / proof.world.size / 1e12
    share = found / peak if peak else None
    slow = share is not None and share < LEAST_SHARE
    beside = f", {share:.0%} of the table's {peak:,.0f}" if peak else "; no peak is listed for this device"
    return Finding("product", f"{figure(found)} TFLOP/s {short_name(proof.dtype)}{beside}"
                   + (": throttled, or in use by others" if slow else ""), WARNING if slow else OK,
                   {"tflops": found, "peak_tflops": peak, "share": share})


def clocks(proof: Proof) -> Finding:
    """The clocks that nvidia-smi reports while matrix products keep the GPU busy for a second or two."""
    a = torch.randn(LARGE, LARGE, device=proof.device).to(proof.dtype)
    out = torch.empty_like(a)
    each = seconds_of(lambda: torch.mm(a, a, out=out), proof.world)
    for _ in range(max(10, min(2000, int(LOAD_SECONDS / each)))):
        torch.mm(a, a, out=out)
    found, problem = ask_nvidia_smi()
    proof.world.synchronize()
    if problem:
        return Finding("clocks", f"not known: {problem}", SKIPPED)
    return Finding("clocks", f"{pace_of(found[0])} while products run", values=found[0])
