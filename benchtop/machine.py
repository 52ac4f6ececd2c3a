"""The machine and its processes: device, dtype, kernels that work here, memory as the system counts it.

Only this module calls collectives on tensors and torch.get_device_module. It chooses device, dtype and
kernels, and gives a reason for each choice.
"""

import contextlib
import ctypes
import dataclasses
import functools
import os
import platform
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchtop import host
from benchtop.errors import UserError, first_line
from benchtop.gpus import ACCELERATORS, peak_tflops
from benchtop.host import available_cores
from benchtop.processes import Processes

BUCKET_BYTES = 2**25        # tensors are gathered up to this size for one NCCL call
NCCL_GRACE_SECONDS = 60     # after --timeout_seconds, until NCCL itself aborts a process that lost another
# FlexAttention's tile sizes: its defaults; smaller in the backward pass; smaller in both passes
TILES = ({}, {"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32},
         {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32})
# which of TILES to try first, by compute capability: with the defaults and heads of 128, these GPUs spill 400
# to 530 bytes per thread or lack shared memory (according to Triton's compiler; not run on any of them)
FIRST_TILES = {(8, 0): 1, (8, 6): 2, (8, 9): 2, (12, 0): 2, (12, 1): 2}
PR_SET_PDEATHSIG = 1        # from linux/prctl.h
MIX_ORDER = "TORCHINDUCTOR_MIX_ORDER_REDUCTION"     # torch 2.10 miscompiles these; 0: off


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks instead of returning them to the system: each step allocates the same
    sizes again, and new pages are slow to get. This saves 10 % of the time on two cores."""
    top_pad, trim_threshold, mmap_max = -2, -1, -4      # from malloc.h
    with contextlib.suppress(AttributeError):           # the C libraries of other systems have no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**26)


def give_back_memory() -> None:
    """Return to the system the free memory that keep_freed_memory holds."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_kernels_by_cpu() -> None:
    """Give torch.compile a separate kernel cache for each CPU capability.

    torch 2.13 has one cache folder for all: a process limited to AVX2 and one with AVX-512 would load each
    other's kernels from it and crash with a corrupted heap.
    """
    capability = re.sub(r"\W+", "_", torch.backends.cpu.get_cpu_capability().lower())
    folder = Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}_{capability}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def set_up_torch() -> None:
    """Set variables that torch reads when the allocator or compiler starts; the user's own settings win."""
    keep_kernels_by_cpu()
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & {*os.environ}:
        # blocks of different sizes share reserved memory, so that less of it lies idle
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if has_wrong_reductions():
        os.environ.setdefault(MIX_ORDER, "0")


def has_wrong_reductions() -> bool:
    """Whether this torch miscompiles some gradients by default (pytorch#190796, #193061): it fuses reductions
    over different dimensions, such as those of a norm's input and of its weight, into one kernel."""
    return str(torch.__version__).startswith("2.10.")


class World(Processes):
    """A process and its device, alone or one of several under torchrun; alone, collectives do nothing."""

    advice = "start again with --resume auto"

    def __init__(self, cfg):
        super().__init__()
        self.timeout_seconds = cfg.timeout_seconds
        set_up_torch()
        self._gathering, self._pending = [], []
        self.phase, self.peaks = "training", {}
        if cfg.deterministic:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"   # cuBLAS reads it once, when it starts
            torch.use_deterministic_algorithms(True)
        self.device = choose_device(cfg, self.local_rank, self.size)
        self.dtype, self.dtype_reason = choose_dtype(cfg, self.device)
        self.use_device()
        if self.device.type == "cpu":
            threads = torch.get_num_threads() if self.size == 1 else available_cores() // self.local_size
            torch.set_num_threads(max(1, threads))
            keep_freed_memory()
            give_back_memory()      # of an earlier run in this process, so that it is not counted
        if self.size > 1:
            with contextlib.suppress(AttributeError):   # Linux only: stop this process if torchrun is killed
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            seconds = cfg.timeout_seconds + NCCL_GRACE_SECONDS * (self.backend == "nccl")
            self.connect(backend=self.backend, device_id=None if self.backend == "gloo" else self.device,
                         timeout=timedelta(seconds=seconds))

    # ---- several processes

    @property
    def backend(self) -> str:
        """The torch.distributed backend for tensors on this device."""
        own = {"cuda": "nccl", "xpu": "xccl"}.get(self.device.type, "gloo")
        return own if dist.is_backend_available(own) else "gloo"

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        if self.size > 1 and tensor.device.type != self.device.type:    # float64, if the device has none
            tensor.copy_(sum(self.gather(tensor)))
        elif self.size > 1:
            with self.contact():
                dist.all_reduce(tensor)
        return tensor

    def begin_sum(self, tensor: Tensor, owner: int) -> None:
        """Start to sum every process's tensor on the owner, in place; complete after wait()."""
        self._begin(dist.reduce, tensor, dst=owner)

    def begin_copy(self, tensor: Tensor, owner: int) -> None:
        """Start to broadcast the owner's tensor to every process, in place; complete after wait()."""
        self._begin(dist.broadcast, tensor, src=owner)

    def _begin(self, collective: Callable, tensor: Tensor, **owner: int) -> None:
        """Start a collective. NCCL gets several in one call, since a call takes about 30 microseconds."""
        if self.size == 1:
            return
        self._gathering.append((collective, tensor, owner))
        if self.backend != "nccl" or sum(each.nbytes for _, each, _ in self._gathering) >= BUCKET_BYTES:
            self._launch()

    def _launch(self) -> None:
        gathered, self._gathering = self._gathering, []
        with self.contact():
            if self.backend != "nccl":
                self._pending += [begin(tensor, **owner, async_op=True) for begin, tensor, owner in gathered]
            elif gathered:
                with dist._coalescing_manager(device=self.device, async_ops=True) as together:
                    for begin, tensor, owner in gathered:
                        begin(tensor, **owner, async_op=True)
                self._pending.append(together)

    def wait(self) -> None:
        """Wait for all collectives that were started."""
        self._launch()
        with self.contact():
            for work in self._pending:
                work.wait()
        self._pending.clear()

    def share_weights(self, model: nn.Module) -> None:
        """Copy the first process's weights to all others."""
        for parameter in model.parameters():
            self.begin_copy(parameter.detach(), 0)
        self.wait()

    # ---- the device

    @property
    def module(self) -> ModuleType:
        """torch.cuda, torch.mps, torch.xpu or torch.cpu; they overlap, but each lacks some functions."""
        return torch.get_device_module(self.device)

    def use_device(self) -> None:
        """Select this process's device in the calling thread; every new thread starts on device 0."""
        if self.device.type != "cpu":
            torch.accelerator.set_device_index(self.device.index or 0)

    @property
    def queues(self) -> bool:
        """Whether copies to and from the device are asynchronous. Only CUDA is known to keep their source
        alive, and to have events that tell when they are done."""
        return self.device.type == "cuda"

    @property
    def reports_behind(self) -> int:
        """How many steps may be queued before their reports are read, so that a GPU need not wait for Python.
        0 for float16, whose gradients must be checked for overflow before they are used."""
        return int(self.queues and self.dtype != torch.float16)

    def pinned(self, tensor: Tensor) -> Tensor:
        """A tensor in memory that the device can read asynchronously."""
        return tensor.pin_memory() if self.queues else tensor

    def to_device(self, tensor: Tensor) -> Tensor:
        """A copy on the device; asynchronous if the tensor is pinned."""
        return tensor.to(self.device, non_blocking=self.queues)

    def sent(self, tensor: Tensor) -> Tensor:
        """Copy a CPU tensor to the device, asynchronously where possible."""
        return self.to_device(self.pinned(tensor))

    def fetch(self, tensor: Tensor) -> tuple[Tensor, torch.Event | None]:
        """Start to copy a tensor to the CPU; returns the copy and the mark to wait_for before reading it."""
        return tensor.to("cpu", non_blocking=self.queues), self.mark()

    def mark(self) -> torch.Event | None:
        """An event after all work queued on the device so far; None where copies are synchronous."""
        if not self.queues:
            return None
        mark = self.module.Event()
        mark.record()
        return mark

    def wait_for(self, mark: torch.Event | None) -> None:
        """Wait until the device has reached a mark.

        With several processes, give up after timeout_seconds: NCCL waits for a lost process on the device,
        where Python does not notice, and finally aborts this process with a report of its own.
        """
        if mark is None:
            return
        if self.size == 1:
            mark.synchronize()
        deadline = time.monotonic() + self.timeout_seconds
        while not mark.query():
            if time.monotonic() > deadline:
                with self.contact():
                    raise RuntimeError(f"the device has not finished after {self.timeout_seconds:g} s")
            time.sleep(0.0002)

    def synchronize(self) -> None:
        """Wait until the device has finished all queued work, so that a clock may be read."""
        if self.queues:
            self.wait_for(self.mark())
        else:
            self.module.synchronize()

    def forget_kernels(self) -> None:
        """Forget all compiled code, since torch compiles a function for at most eight sizes."""
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()

    @functools.cached_property
    def float64_device(self) -> torch.device:
        """The device for float64 sums: this one, or the CPU if it has no float64 (Apple GPUs)."""
        try:
            torch.ones(2, dtype=torch.float64, device=self.device).sum()
            return self.device
        except (RuntimeError, TypeError):
            return torch.device("cpu")

    def random_state(self) -> dict[str, Tensor]:
        """The states of this process's random generators, for the CPU and for its device."""
        state = {"cpu": torch.get_rng_state()}
        return state if self.device.type == "cpu" else state | {self.device.type: self.module.get_rng_state()}

    def set_random_state(self, state: dict[str, Tensor]) -> None:
        """Restore the states of random generators; a state of another kind of device is ignored."""
        torch.set_rng_state(state["cpu"])
        if self.device.type != "cpu" and self.device.type in state:
            self.module.set_rng_state(state[self.device.type])

    # ---- memory

    @contextlib.contextmanager
    def memory_of(self, phase: str) -> Iterator[None]:
        """Attribute the peak memory of this block to `phase`, not to the phase around it."""
        around, self.phase = self.phase, self._close_phase(phase)
        yield
        self.phase = self._close_phase(around)

    def _close_phase(self, following: str) -> str:
        self.peaks[self.phase] = self.peak_memory_mib(self.phase)
        if self.device.type == "cpu":
            give_back_memory()
            with contextlib.suppress(OSError):      # no reset: the peak is that of the whole process
                Path("/proc/self/clear_refs").write_text("5")
        else:
            getattr(self.module, "reset_peak_memory_stats", self.empty_cache)()
        return following

    def peak_memory_mib(self, phase: str = "training") -> float:
        """Peak memory of this process in a phase so far: on its GPU, or all of its memory on a CPU."""
        known = self.peaks.get(phase, 0.0)
        if phase != self.phase:
            return known
        if self.device.type != "cpu":
            # Metal reports no peak, only what it holds now, freed blocks included
            peak = getattr(self.module, "max_memory_allocated", None) or self.module.driver_allocated_memory
            return max(known, peak() / 2**20)
        status = Path("/proc/self/status")
        if status.exists():
            return max(known, int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**10)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss       # bytes on macOS, else KiB
        return max(known, peak / (2**20 if sys.platform == "darwin" else 2**10))

    def free_memory_mib(self) -> float:
        """Free memory that this process may take: on its device, or its share of the machine's."""
        if self.device.type == "mps":
            return (self.module.recommended_max_memory() - self.module.driver_allocated_memory()) / 2**20
        if self.device.type != "cpu":
            with contextlib.suppress(RuntimeError):     # some of Intel's drivers cannot tell
                return self.module.mem_get_info()[0] / 2**20
        return host.free_memory_mib() / self.local_size

    def empty_cache(self) -> None:
        """Return freed memory to the device."""
        if self.device.type != "cpu":
            self.module.empty_cache()

    # ---- facts about it

    def device_name(self) -> str:
        if self.device.type == "mps":
            return getattr(torch.backends.mps, "get_name", lambda: "Apple GPU")()
        if self.device.type != "cpu":
            return self.module.get_device_name()
        name = cpu_facts().get("model name", platform.processor() or platform.machine())
        return f"{name}, {available_cores()} cores"

    def facts(self) -> dict:
        threads = {"threads": torch.get_num_threads()} if self.device.type == "cpu" else {}
        return {"device": self.device_name(), "processes": self.size, **threads,
                "dtype": str(self.dtype).removeprefix("torch.")}

    def peak_flops(self, cfg) -> float:
        """Peak floating-point operations per second of all devices together; 0 if unknown."""
        listed = 0 if self.dtype == torch.float32 else peak_tflops(self.device_name())
        return 1e12 * self.size * (cfg.peak_tflops or listed)


def choose_device(cfg, local_rank: int, num_processes: int) -> torch.device:
    """The device that --device names; for `auto` the accelerator that torch finds, or the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    kind = found.type if found and found.type in ACCELERATORS else "cpu"
    if kind == "mps" and num_processes > 1 and cfg.device == "auto":
        kind = "cpu"        # processes cannot exchange tensors of Apple GPUs
    if cfg.device == "cpu" or (cfg.device == "auto" and kind == "cpu"):
        return torch.device("cpu")
    if cfg.device not in ("auto", kind):
        raise UserError(f"--device {cfg.device} needs {ACCELERATORS[cfg.device]} that torch can use; torch "
                        f"{torch.__version__} finds {ACCELERATORS.get(kind, 'none')}; use --device {kind}")
    if kind == "mps" and num_processes > 1:
        raise UserError("processes cannot exchange tensors of Apple GPUs; start one process, or use "
                        "--device cpu")
    count = torch.accelerator.device_count()
    if local_rank >= count:
        raise UserError(f"there are more processes than GPUs: this is process {local_rank + 1} on this "
                        f"machine, where torch finds {count}; use --nproc_per_node={count}")
    return torch.device(kind, local_rank)


def cpu_facts() -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo; empty on systems without it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except FileNotFoundError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def choose_dtype(cfg, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of matrix products, and why: one that the hardware multiplies natively, not by emulation."""
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype), "set by --dtype"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        name = f"compute capability {capability[0]}.{capability[1]}"
        if capability >= (8, 0):
            return torch.bfloat16, f"native on {name}"
        return torch.float16, f"no bfloat16 on {name}; the loss is scaled"
    if device.type == "mps":
        return torch.float32, "narrower dtypes are untested on Apple GPUs; to try one: --dtype bfloat16"
    if device.type == "xpu":
        if torch.xpu.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "native on this GPU"
        return torch.float32, "the GPU has no native bfloat16"
    native = {"amx_bf16", "avx512_bf16"}.intersection(cpu_facts().get("flags", "").split())
    if not native:
        return torch.float32, "the CPU has neither AMX nor AVX512-BF16"
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return torch.float32, "ATEN_CPU_CAPABILITY keeps torch from using AMX and AVX512"
    return torch.bfloat16, f"native on this CPU ({', '.join(sorted(native))})"


def fp8_problem(device: torch.device, dtype: torch.dtype) -> str:
    """Why FP8 products do not work here; "" if they do. On CPUs they are slow, good only for trying them."""
    if dtype != torch.bfloat16:
        return f"needs --dtype bfloat16; it is {str(dtype).removeprefix('torch.')}"
    if device.type not in ("cpu", "cuda") or torch.version.hip:
        return "needs an NVIDIA GPU of compute capability 8.9 or more"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return "needs a GPU of compute capability 8.9 or more, such as an RTX 4090, L40S or H100"
    if device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return "needs a CPU with AVX-512; without it, torch supports FP8 products only for some sizes"
    return ""


def choose_compile(cfg, device: torch.device) -> tuple[bool, str]:
    """Whether to use torch.compile, and why; `auto` tries it on a tiny function.

    raises  UserError if --compile on does not work
    """
    if cfg.compile == "off":
        return False, "set by --compile off"
    if cfg.compile == "auto" and device.type == "mps":
        return False, "torch's compiler for Apple GPUs is a prototype; to try it: --compile on"
    try:
        torch.compile(lambda x: (x.sin() + 1).sum())(
            torch.ones(8, device=device, requires_grad=True)).backward()
    except Exception as error:      # missing compilers, headers and kernels each raise their own type
        reason = f"torch.compile does not work here ({type(error).__name__}: {first_line(error)})"
        if cfg.compile == "on":
            raise UserError(f"{reason}; on Debian it needs: apt install g++ python3-dev") from error
        return False, reason
    # otherwise a function recompiled in every step would silently run uncompiled from the ninth step on
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    without = "; mix-order reductions are off: for them, torch 2.10 compiles wrong gradients"
    return True, "a tiny function compiled" + (without if has_wrong_reductions() else "")


def is_recompile_limit(error: BaseException) -> bool:
    """Whether torch reports that a function was recompiled too often."""
    dynamo = sys.modules.get("torch._dynamo")       # not imported if nothing was compiled
    return bool(dynamo) and isinstance(error, dynamo.exc.FailOnRecompileLimitHit)


@dataclass(frozen=True)
class Kernels:
    """How the model is computed, and why."""
    compiled: bool
    compile_reason: str
    flex: dict | None       # options of FlexAttention; None: DenseAttention
    attention: str


def choose_kernels(cfg, world: World) -> Kernels:
    """The kernels that work on all processes. Every process must call it, even if nothing works there."""
    world.forget_kernels()      # those of an earlier run in this process do not count
    compiled, reason = min(world.gather(choose_compile(cfg, world.device)))     # False if one cannot compile
    kernels = Kernels(compiled, reason, None, "plain products")
    if world.device.type == "cpu":      # FlexAttention has no backward pass there
        return kernels
    number, problem = max(world.gather(choose_tiles(cfg, world, compiled)))
    if problem:
        return dataclasses.replace(kernels, attention=f"plain products: {problem}")
    return dataclasses.replace(kernels, flex=TILES[number], attention="FlexAttention")


def choose_tiles(cfg, world: World, compiled: bool) -> tuple[int, str]:
    """Index of the first TILES with which FlexAttention works, and ""; or len(TILES), and why none works."""
    problems = []
    if not compiled:
        problems.append("FlexAttention needs torch.compile")
    elif cfg.head_dim < 16:
        problems.append(f"FlexAttention needs a head width of 16 or more; it is {cfg.head_dim}")
    elif world.device.type == "cuda" and not torch.version.hip \
            and torch.cuda.get_device_capability(world.device) < (8, 0):
        # its kernels compile, but spill most of their registers to slow memory
        problems.append("FlexAttention is slow on GPUs older than Ampere (compute capability below 8.0)")
    else:
        capability = torch.cuda.get_device_capability(world.device) if world.device.type == "cuda" else ()
        first = FIRST_TILES.get(capability, 0)
        for number in (first, *(number for number in range(len(TILES)) if number != first)):
            problems.append(flex_problem(cfg, world, TILES[number]))
            if not problems[-1]:
                return number, ""
    return len(TILES), problems[0]


def flex_problem(cfg, world: World, tiles: dict) -> str:
    """Why FlexAttention fails on a tiny row, forward or backward; "" if it works."""
    try:
        heads, length = (3, 1, 1, 256, cfg.head_dim), 256
        q, k, v = torch.ones(heads, dtype=world.dtype, device=world.device, requires_grad=True).unbind()
        mask = create_block_mask(lambda batch, head, query, key: key <= query, None, None, length, length,
                                 device=world.device)
        torch.compile(flex_attention)(q, k, v, block_mask=mask, kernel_options=tiles).sum().backward()
        world.synchronize()
        return ""
    except Exception as error:      # compilers, drivers and kernels each raise their own types
        return f"FlexAttention does not work here ({type(error).__name__}: {first_line(error)})"
