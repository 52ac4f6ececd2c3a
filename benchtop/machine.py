"""The machine and its processes: device, dtype, kernels that work here, memory as the system counts it.

The one module that names torch.distributed's tensors and torch's modules of devices; choices are made here
and their reasons said.
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

BUCKET_BYTES = 2**25        # of tensors that NCCL exchanges in one call
NCCL_GRACE_SECONDS = 60     # behind the time limit, until NCCL itself ends a process that lost another one
# of FlexAttention: its own, and smaller ones, in the backward pass or in both
TILES = ({}, {"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32},
         {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32})
# the first of them to try by compute capability: with its own, these GPUs spill 400 to 530 bytes a thread of
# heads 128 wide, or have not enough shared memory (what Triton compiles; none of them has run it)
FIRST_TILES = {(8, 0): 1, (8, 6): 2, (8, 9): 2, (12, 0): 2, (12, 1): 2}
PR_SET_PDEATHSIG = 1        # of linux/prctl.h
MIX_ORDER = "TORCHINDUCTOR_MIX_ORDER_REDUCTION"     # what torch 2.10 compiles wrongly; 0 is off


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed, instead of getting them anew from the system page by page:
    a step allocates the same ones again. It saves a tenth of the time on two cores."""
    top_pad, trim_threshold, mmap_max = -2, -1, -4      # of malloc.h
    with contextlib.suppress(AttributeError):           # other systems' libraries have no such call
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**26)


def give_back_memory() -> None:
    """Give what keep_freed_memory kept back to the system."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_kernels_by_cpu() -> None:
    """Let torch.compile keep its kernels apart by what the CPU can do.

    torch 2.13 has one folder for all: a process that may use AVX2 alone and one that has AVX-512 find each
    other's kernels there, and crash with a damaged heap.
    """
    capability = re.sub(r"\W+", "_", torch.backends.cpu.get_cpu_capability().lower())
    folder = Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}_{capability}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def set_up_torch() -> None:
    """What torch reads when a device, its memory or the compiler starts; the user's own settings win."""
    keep_kernels_by_cpu()
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & {*os.environ}:
        # blocks of many sizes share what was reserved, so that less of it lies idle
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if has_wrong_reductions():
        os.environ.setdefault(MIX_ORDER, "0")


def has_wrong_reductions() -> bool:
    """Whether this torch compiles some gradients wrongly by default (pytorch#190796, #193061): it fuses
    reductions of two orders, of a norm's input and of its weight, say, into one kernel."""
    return str(torch.__version__).startswith("2.10.")


class World(Processes):
    """One process with its device, or as many as torchrun started; alone, methods change nothing."""

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
            give_back_memory()      # of a run before this one, so that it is not counted
        if self.size > 1:
            with contextlib.suppress(AttributeError):   # Linux stops us if torchrun is killed, others do not
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            seconds = cfg.timeout_seconds + NCCL_GRACE_SECONDS * (self.backend == "nccl")
            self.connect(backend=self.backend, device_id=None if self.backend == "gloo" else self.device,
                         timeout=timedelta(seconds=seconds))

    # ---- several processes

    @property
    def backend(self) -> str:
        """What exchanges tensors of this device."""
        own = {"cuda": "nccl", "xpu": "xccl"}.get(self.device.type, "gloo")
        return own if dist.is_backend_available(own) else "gloo"

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor, in place."""
        if self.size > 1 and tensor.device.type != self.device.type:    # float64, where the device has none
            tensor.copy_(sum(self.gather(tensor)))
        elif self.size > 1:
            with self.contact():
                dist.all_reduce(tensor)
        return tensor

    def begin_sum(self, tensor: Tensor, owner: int) -> None:
        """Begin to add up every process's tensor on the owner, in place; done after wait()."""
        self._begin(dist.reduce, tensor, dst=owner)

    def begin_copy(self, tensor: Tensor, owner: int) -> None:
        """Begin to give every process the owner's tensor, in place; done after wait()."""
        self._begin(dist.broadcast, tensor, src=owner)

    def _begin(self, collective: Callable, tensor: Tensor, **owner: int) -> None:
        """NCCL takes some 30 microseconds a call, so it gets several tensors at once."""
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
        """Wait for all that was begun."""
        self._launch()
        with self.contact():
            for work in self._pending:
                work.wait()
        self._pending.clear()

    def share_weights(self, model: nn.Module) -> None:
        """Give every process the weights of the first."""
        for parameter in model.parameters():
            self.begin_copy(parameter.detach(), 0)
        self.wait()

    # ---- the device

    @property
    def module(self) -> ModuleType:
        """torch.cuda, torch.mps, torch.xpu or torch.cpu: alike, but none has all that another has."""
        return torch.get_device_module(self.device)

    def use_device(self) -> None:
        """Let the calling thread work on the device of this process; each thread begins on the first one."""
        if self.device.type != "cpu":
            torch.accelerator.set_device_index(self.device.index or 0)

    @property
    def queues(self) -> bool:
        """Whether copies to and from the device may be under way while Python goes on. Only CUDA is known to
        keep what they read, and to have marks that say when they are done."""
        return self.device.type == "cuda"

    @property
    def reports_behind(self) -> int:
        """How many steps may be queued before what they found is read: a GPU need not wait for Python. The
        gradients of float16 have to be looked at before they are used."""
        return int(self.queues and self.dtype != torch.float16)

    def pinned(self, tensor: Tensor) -> Tensor:
        """A tensor in memory that the device can read while Python goes on."""
        return tensor.pin_memory() if self.queues else tensor

    def to_device(self, tensor: Tensor) -> Tensor:
        """A copy on the device; one of a pinned tensor is on its way."""
        return tensor.to(self.device, non_blocking=self.queues)

    def sent(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor of the CPU, on its way to the device."""
        return self.to_device(self.pinned(tensor))

    def fetch(self, tensor: Tensor) -> tuple[Tensor, torch.Event | None]:
        """A copy of a tensor on the CPU, on its way, and the mark to wait_for before the copy is read."""
        return tensor.to("cpu", non_blocking=self.queues), self.mark()

    def mark(self) -> torch.Event | None:
        """A mark behind all that the device was told; None where copies are waited for anyway."""
        if not self.queues:
            return None
        mark = self.module.Event()
        mark.record()
        return mark

    def wait_for(self, mark: torch.Event | None) -> None:
        """Wait until the device has come to a mark.

        With several processes not for ever: NCCL waits for a lost one on the device, where Python hears of
        nothing, and ends the process in the end with a report of its own.
        """
        if mark is None:
            return
        if self.size == 1:
            mark.synchronize()
        deadline = time.monotonic() + self.timeout_seconds
        while not mark.query():
            if time.monotonic() > deadline:
                with self.contact():
                    raise RuntimeError(f"the device has waited for {self.timeout_seconds:g} s")
            time.sleep(0.0002)

    def synchronize(self) -> None:
        """Wait until the device has done what it was told, so that a clock may be read."""
        if self.queues:
            self.wait_for(self.mark())
        else:
            self.module.synchronize()

    def forget_kernels(self) -> None:
        """Forget what was compiled: torch compiles a function for eight sizes, and for no more."""
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()

    @functools.cached_property
    def float64_device(self) -> torch.device:
        """Where sums in float64 are made: on the device, or on the CPU where it has none, as Apple's."""
        try:
            torch.ones(2, dtype=torch.float64, device=self.device).sum()
            return self.device
        except (RuntimeError, TypeError):
            return torch.device("cpu")

    def random_state(self) -> dict[str, Tensor]:
        """The states of this process's generators, on the CPU and on its device."""
        state = {"cpu": torch.get_rng_state()}
        return state if self.device.type == "cpu" else state | {self.device.type: self.module.get_rng_state()}

    def set_random_state(self, state: dict[str, Tensor]) -> None:
        """Go on with these states; one of another kind of device is left out."""
        torch.set_rng_state(state["cpu"])
        if self.device.type != "cpu" and self.device.type in state:
            self.module.set_rng_state(state[self.device.type])

    # ---- memory

    @contextlib.contextmanager
    def memory_of(self, phase: str) -> Iterator[None]:
        """Count memory for `phase`, and no more for the phase around it."""
        around, self.phase = self.phase, self._close_phase(phase)
        yield
        self.phase = self._close_phase(around)

    def _close_phase(self, following: str) -> str:
        self.peaks[self.phase] = self.peak_memory_mib(self.phase)
        if self.device.type == "cpu":
            give_back_memory()
            with contextlib.suppress(OSError):      # where it cannot be reset, the peak is the process's
                Path("/proc/self/clear_refs").write_text("5")
        else:
            getattr(self.module, "reset_peak_memory_stats", self.empty_cache)()
        return following

    def peak_memory_mib(self, phase: str = "training") -> float:
        """Peak memory of this process in a phase so far: on its GPU, or as a whole on a CPU."""
        known = self.peaks.get(phase, 0.0)
        if phase != self.phase:
            return known
        if self.device.type != "cpu":
            # Metal counts no peak, but what it holds, freed blocks included
            peak = getattr(self.module, "max_memory_allocated", None) or self.module.driver_allocated_memory
            return max(known, peak() / 2**20)
        status = Path("/proc/self/status")
        if status.exists():
            return max(known, int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**10)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss       # bytes on macOS, else KiB
        return max(known, peak / (2**20 if sys.platform == "darwin" else 2**10))

    def free_memory_mib(self) -> float:
        """What this process may take: of its device, or its share of the machine's memory."""
        if self.device.type == "mps":
            return (self.module.recommended_max_memory() - self.module.driver_allocated_memory()) / 2**20
        if self.device.type != "cpu":
            with contextlib.suppress(RuntimeError):     # some of Intel's drivers do not know
                return self.module.mem_get_info()[0] / 2**20
        return host.free_memory_mib() / self.local_size

    def empty_cache(self) -> None:
        """Give freed memory back to the device."""
        if self.device.type != "cpu":
            self.module.empty_cache()

    # ---- what it is

    def device_name(self) -> str:
        if self.device.type == "mps":
            return getattr(torch.backends.mps, "get_name", lambda: "Apple GPU")()
        if self.device.type != "cpu":
            return self.module.get_device_name()
        name = cpu_facts().get("model name", platform.processor() or platform.machine())
        return f"{name}, {available_cores()} cores"

    def facts(self) -> dict:
        return {"device": self.device_name(), "processes": self.size,
                "dtype": str(self.dtype).removeprefix("torch.")}

    def peak_flops(self, cfg) -> float:
        """Floating-point operations per second that all devices could do; 0 if that is not known."""
        listed = 0 if self.dtype == torch.float32 else peak_tflops(self.device_name())
        return 1e12 * self.size * (cfg.peak_tflops or listed)


def choose_device(cfg, local_rank: int, num_processes: int) -> torch.device:
    """What --device names; `auto`: what torch.accelerator offers, or the CPU."""
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
        raise UserError(f"there are more processes than GPUs: process {local_rank + 1} on this machine "
                        f"finds {count}; use --nproc_per_node={count}")
    return torch.device(kind, local_rank)


def cpu_facts() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; nothing on systems without it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except FileNotFoundError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def choose_dtype(cfg, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of products, and why: what the hardware multiplies natively, not what it can emulate."""
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype), "asked for with --dtype"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        name = f"compute capability {capability[0]}.{capability[1]}"
        if capability >= (8, 0):
            return torch.bfloat16, f"{name} multiplies it natively"
        return torch.float16, f"{name} has no bfloat16; losses are scaled"
    if device.type == "mps":
        return torch.float32, "nothing narrower has been tried on an Apple GPU; --dtype bfloat16 tries it"
    if device.type == "xpu":
        if torch.xpu.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU multiplies it natively"
        return torch.float32, "the GPU has no bfloat16"
    native = {"amx_bf16", "avx512_bf16"}.intersection(cpu_facts().get("flags", "").split())
    if not native:
        return torch.float32, "the CPU has neither AMX nor AVX512-BF16"
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return torch.float32, "torch is kept from AMX and AVX512 (ATEN_CPU_CAPABILITY)"
    return torch.bfloat16, f"the CPU multiplies it natively ({', '.join(sorted(native))})"


def fp8_problem(device: torch.device, dtype: torch.dtype) -> str:
    """Why there are no FP8 products here; "" if there are. On CPUs they work slowly, for trying them out."""
    if dtype != torch.bfloat16:
        return f"needs --dtype bfloat16; it is {str(dtype).removeprefix('torch.')}"
    if device.type not in ("cpu", "cuda") or torch.version.hip:
        return "needs an NVIDIA GPU of compute capability 8.9 or more"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return "needs a GPU of compute capability 8.9 or more, such as an RTX 4090, L40S or H100"
    if device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return "needs a CPU with AVX-512; without it, torch has these products for some sizes only"
    return ""


def choose_compile(cfg, device: torch.device) -> tuple[bool, str]:
    """Whether to use torch.compile, and why; `auto` tries it on a tiny function.

    raises  UserError if --compile on does not work
    """
    if cfg.compile == "off":
        return False, "asked for with --compile off"
    if cfg.compile == "auto" and device.type == "mps":
        return False, "torch's compiler for Apple GPUs is a prototype; --compile on tries it"
    try:
        torch.compile(lambda x: (x.sin() + 1).sum())(
            torch.ones(8, device=device, requires_grad=True)).backward()
    except Exception as error:      # a missing compiler, header or kernel: each has its own; all say "no"
        reason = f"torch.compile does not work here ({type(error).__name__}: {first_line(error)})"
        if cfg.compile == "on":
            raise UserError(f"{reason}; on Debian it needs: apt install g++ python3-dev") from error
        return False, reason
    # else what changes with every step would run uncompiled from the ninth on, and nobody would know
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    without = ", without the mix-order reductions, of which torch 2.10 compiles wrong gradients"
    return True, "a tiny function compiled" + (without if has_wrong_reductions() else "")


def is_recompile_limit(error: BaseException) -> bool:
    """Whether torch gave up compiling a function anew for what changes in it."""
    dynamo = sys.modules.get("torch._dynamo")       # where nothing compiles, it is not imported
    return bool(dynamo) and isinstance(error, dynamo.exc.FailOnRecompileLimitHit)


@dataclass(frozen=True)
class Kernels:
    """What computes the model, and why it is that."""
    compiled: bool
    compile_reason: str
    flex: dict | None       # options of FlexAttention; None: DenseAttention
    attention: str


def choose_kernels(cfg, world: World) -> Kernels:
    """What works on all processes; every process asks the others, whatever works on it."""
    world.forget_kernels()      # those of a run before this one, in this process, do not count
    compiled, reason = min(world.gather(choose_compile(cfg, world.device)))     # one that cannot decides
    kernels = Kernels(compiled, reason, None, "plain products")
    if world.device.type == "cpu":      # FlexAttention has no backward there
        return kernels
    number, problem = max(world.gather(choose_tiles(cfg, world, compiled)))
    if problem:
        return dataclasses.replace(kernels, attention=f"plain products: {problem}")
    return dataclasses.replace(kernels, flex=TILES[number], attention="FlexAttention")


def choose_tiles(cfg, world: World, compiled: bool) -> tuple[int, str]:
    """The number of the TILES by which FlexAttention works; or one behind all, and why it does not."""
    problems = []
    if not compiled:
        problems.append("FlexAttention needs torch.compile")
    elif cfg.head_dim < 16:
        problems.append(f"FlexAttention takes heads of 16 or more; these have {cfg.head_dim}")
    elif world.device.type == "cuda" and not torch.version.hip \
            and torch.cuda.get_device_capability(world.device) < (8, 0):
        # its kernels compile, but keep most of their numbers in slow memory
        problems.append("FlexAttention is slow on GPUs of a compute capability below 8.0, older than Ampere")
    else:
        capability = torch.cuda.get_device_capability(world.device) if world.device.type == "cuda" else ()
        first = FIRST_TILES.get(capability, 0)
        for number in (first, *(number for number in range(len(TILES)) if number != first)):
            problems.append(flex_problem(cfg, world, TILES[number]))
            if not problems[-1]:
                return number, ""
    return len(TILES), problems[0]


def flex_problem(cfg, world: World, tiles: dict) -> str:
    """What goes wrong when a tiny row attends by FlexAttention, forward and backward; nothing if it works."""
    try:
        heads, length = (3, 1, 1, 256, cfg.head_dim), 256
        q, k, v = torch.ones(heads, dtype=world.dtype, device=world.device, requires_grad=True).unbind()
        mask = create_block_mask(lambda batch, head, query, key: key <= query, None, None, length, length,
                                 device=world.device)
        torch.compile(flex_attention)(q, k, v, block_mask=mask, kernel_options=tiles).sum().backward()
        world.synchronize()
        return ""
    except Exception as error:      # a compiler's, a driver's, a kernel's: each has its own; all say "no"
        return f"FlexAttention does not work here ({type(error).__name__}: {first_line(error)})"
