"""The machine and its processes: device, dtype, kernels that work here, memory as the system counts it.

The one module that names torch.distributed's tensors; choices are made here and their reasons said.
"""

import contextlib
import ctypes
import dataclasses
import os
import platform
import re
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchtop.errors import UserError, first_line
from benchtop.host import available_cores
from benchtop.processes import Processes

# dense bfloat16 TFLOP/s without sparsity, from the makers' data sheets
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312,
               "A40": 149.7, "A10": 125, "L40S": 362, "L4": 121, "RTX 3090": 71, "RTX 4090": 165.2,
               "RTX 5090": 209.5}
PR_SET_PDEATHSIG = 1        # of linux/prctl.h


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


class World(Processes):
    """One process with its device, or as many as torchrun started; alone, methods change nothing."""

    advice = "start again with --resume auto"

    def __init__(self, cfg):
        super().__init__()
        self.timeout_seconds = cfg.timeout_seconds
        keep_kernels_by_cpu()
        self._pending = []
        self.phase, self.peaks = "training", {}
        if cfg.deterministic:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"   # cuBLAS reads it once, when it starts
            torch.use_deterministic_algorithms(True)
        self.device = self._choose_device(cfg, self.local_rank)
        self.dtype, self.dtype_reason = choose_dtype(cfg, self.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            threads = torch.get_num_threads() if self.size == 1 else available_cores() // self.local_size
            torch.set_num_threads(max(1, threads))
            keep_freed_memory()
            give_back_memory()      # of a run before this one, so that it is not counted
        if self.size > 1:
            with contextlib.suppress(AttributeError):   # Linux stops us if torchrun is killed, others do not
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            gpu = self.device.type == "cuda"
            self.connect(backend="nccl" if gpu else "gloo", device_id=self.device if gpu else None,
                         timeout=timedelta(seconds=cfg.timeout_seconds))

    def _choose_device(self, cfg, local_rank: int) -> torch.device:
        if cfg.device == "cpu" or (cfg.device == "auto" and not torch.cuda.is_available()):
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise UserError("--device cuda needs an NVIDIA or AMD GPU that torch can use; torch "
                            f"{torch.__version__} finds none; use --device cpu")
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"there are more processes than GPUs: process {local_rank + 1} on this machine "
                            f"finds {torch.cuda.device_count()}; "
                            f"use --nproc_per_node={torch.cuda.device_count()}")
        return torch.device("cuda", local_rank)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor, in place."""
        if self.size > 1:
            with self.contact():
                dist.all_reduce(tensor)
        return tensor

    def begin_sum(self, tensor: Tensor, owner: int) -> None:
        """Begin to add up every process's tensor on the owner, in place; done after wait()."""
        if self.size > 1:
            with self.contact():
                self._pending.append(dist.reduce(tensor, dst=owner, async_op=True))

    def begin_copy(self, tensor: Tensor, owner: int) -> None:
        """Begin to give every process the owner's tensor, in place; done after wait()."""
        if self.size > 1:
            with self.contact():
                self._pending.append(dist.broadcast(tensor, src=owner, async_op=True))

    def wait(self) -> None:
        """Wait for all that was begun."""
        with self.contact():
            for work in self._pending:
                work.wait()
        self._pending.clear()

    def share_weights(self, model: nn.Module) -> None:
        """Give every process the weights of the first."""
        for parameter in model.parameters():
            self.begin_copy(parameter.detach(), 0)
        self.wait()

    @property
    def reports_behind(self) -> int:
        """How many steps may be queued before what they found is read: a GPU need not wait for Python. The
        gradients of float16 have to be looked at before they are used."""
        return int(self.device.type == "cuda" and self.dtype != torch.float16)

    def synchronize(self) -> None:
        """Wait until the device has done what it was told, so that a clock may be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def memory_of(self, phase: str) -> Iterator[None]:
        """Count memory for `phase`, and no more for the phase around it."""
        around, self.phase = self.phase, self._close_phase(phase)
        yield
        self.phase = self._close_phase(around)

    def _close_phase(self, following: str) -> str:
        self.peaks[self.phase] = self.peak_memory_mib(self.phase)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            give_back_memory()
            with contextlib.suppress(OSError):      # where it cannot be reset, the peak is the process's
                Path("/proc/self/clear_refs").write_text("5")
        return following

    def peak_memory_mib(self, phase: str = "training") -> float:
        """Peak memory of this process in a phase so far: on its GPU, or as a whole on a CPU."""
        known = self.peaks.get(phase, 0.0)
        if phase != self.phase:
            return known
        if self.device.type == "cuda":
            return max(known, torch.cuda.max_memory_allocated() / 2**20)
        status = Path("/proc/self/status")
        if status.exists():
            return max(known, int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**10)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss       # bytes on macOS, else KiB
        return max(known, peak / (2**20 if sys.platform == "darwin" else 2**10))

    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name()
        name = cpu_facts().get("model name", platform.processor() or platform.machine())
        return f"{name}, {available_cores()} cores"

    def facts(self) -> dict:
        return {"device": self.device_name(), "processes": self.size,
                "dtype": str(self.dtype).removeprefix("torch.")}

    def peak_flops(self, cfg) -> float:
        """Floating-point operations per second that all devices could do; 0 if that is not known."""
        device = self.device_name() if self.device.type == "cuda" and self.dtype != torch.float32 else ""
        suffix = r"(-(SXM\d?|PCIE))?(-\d+GB)?( \d+GB( HBM\w+)?)?"    # memory and socket, but no other model
        known = (peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}{suffix}$", device))
        return 1e12 * self.size * (cfg.peak_tflops or next(known, 0))


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
    native = {"amx_bf16", "avx512_bf16"}.intersection(cpu_facts().get("flags", "").split())
    if not native:
        return torch.float32, "the CPU has neither AMX nor AVX512-BF16"
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return torch.float32, "torch is kept from AMX and AVX512 (ATEN_CPU_CAPABILITY)"
    return torch.bfloat16, f"the CPU multiplies it natively ({', '.join(sorted(native))})"


def choose_compile(cfg, device: torch.device) -> tuple[bool, str]:
    """Whether to use torch.compile, and why; `auto` tries it on a tiny function.

    raises  UserError if --compile on does not work
    """
    if cfg.compile == "off":
        return False, "asked for with --compile off"
    try:
        torch.compile(lambda x: (x.sin() + 1).sum())(
            torch.ones(8, device=device, requires_grad=True)).backward()
        # with its scalars on the CPU, this one needs a C++ compiler even where the rest runs on a GPU
        one = torch.tensor(1.0)
        torch.compile(lambda x, scalar: x.mul_(scalar))(torch.ones(8, device=device), one)
        return True, "a tiny function compiled"
    except Exception as error:      # a missing compiler, header or kernel: each has its own; all say "no"
        reason = f"torch.compile does not work here ({type(error).__name__}: {first_line(error)})"
        if cfg.compile == "on":
            raise UserError(f"{reason}; on Debian it needs: apt install g++ python3-dev") from error
        return False, reason


@dataclass(frozen=True)
class Kernels:
    """What computes the model, and why it is that."""
    compiled: bool
    compile_reason: str
    flex: dict | None       # options of FlexAttention; None: DenseAttention
    attention: str


def choose_kernels(cfg, world: World) -> Kernels:
    """What works on all processes; every process asks the others, whatever works on it."""
    compiled, reason = min(world.gather(choose_compile(cfg, world.device)))     # one that cannot decides
    kernels = Kernels(compiled, reason, None, "plain products")
    if world.device.type == "cpu":      # FlexAttention has no backward there
        return kernels
    problem = flex_problem(cfg, world) if compiled else "FlexAttention needs torch.compile"
    problem = next(filter(None, world.gather(problem)), "")
    if problem:
        return dataclasses.replace(kernels, attention=f"plain products: {problem}")
    return dataclasses.replace(kernels, flex=flex_options(world.device), attention="FlexAttention")


def flex_problem(cfg, world: World) -> str:
    """What goes wrong when a tiny row attends by FlexAttention, forward and backward; nothing if it works."""
    if cfg.head_dim < 16:
        return f"FlexAttention takes heads of 16 or more; these have {cfg.head_dim}"
    try:
        heads, length = (3, 1, 1, 256, cfg.head_dim), 256
        q, k, v = torch.ones(heads, dtype=world.dtype, device=world.device, requires_grad=True).unbind()
        mask = create_block_mask(lambda batch, head, query, key: key <= query, None, None, length, length,
                                 device=world.device)
        torch.compile(flex_attention)(q, k, v, block_mask=mask, kernel_options=flex_options(world.device),
                                      ).sum().backward()
        torch.cuda.synchronize()
        return ""
    except Exception as error:      # a compiler's, a driver's, a kernel's: each has its own; all say "no"
        return f"FlexAttention does not work here ({type(error).__name__}: {first_line(error)})"


def flex_options(device: torch.device) -> dict:
    """Smaller tiles for GPUs with 100 KB of shared memory, where those for 164 KB and more do not fit."""
    if torch.cuda.get_device_capability(device) not in ((8, 6), (8, 9), (12, 0), (12, 1)):
        return {}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32}
