"""A make-believe GPU: what torch would do on a card that this machine does not have.

After plug_in() and become(CARDS["H100"]) torch.cuda finds that card. Tensors on it have shapes and no content
(torch's FakeTensorMode). torch.compile writes the code that it would write for the card, Triton compiles that
to machine code with its own assembler, and launches of kernels are only reported.

So a test can see graphs, recompiles, launches, memory, registers, and calls that wait for the card. It cannot
see numbers, times, cuBLAS, NCCL or the allocator. The patches are to inner parts of torch 2.13.0 and Triton
3.7.1, and they are global: make_believe_steps.py and make_believe_attention.py run in processes of their own.
"""

import collections
import ctypes
import hashlib
import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

VERSIONS = {"torch": "2.13.0", "triton": "3.7.1"}


@dataclass(frozen=True)
class Card:
    """shared_kib is what one block of threads may have."""
    name: str
    capability: tuple[int, int]
    shared_kib: int
    memory_gib: float
    processors: int


CARDS = {
    "H100": Card("NVIDIA H100 80GB HBM3", (9, 0), 227, 79.2, 132),
    "A100": Card("NVIDIA A100-SXM4-40GB", (8, 0), 163, 39.4, 108),
    "3070": Card("NVIDIA GeForce RTX 3070", (8, 6), 99, 7.8, 46),
    "3090": Card("NVIDIA GeForce RTX 3090", (8, 6), 99, 23.6, 82),
    "4090": Card("NVIDIA GeForce RTX 4090", (8, 9), 99, 23.5, 128),
    "5090": Card("NVIDIA GeForce RTX 5090", (12, 0), 99, 31.4, 170)}

# What torch asks a GPU for in C++: whether there is one, and which device is current. A torch that is built
# for CUDA has its own answers; it takes these hooks as they are preferred, and this guard as it comes last.
DEVICE = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::Stream;
static const Device card(DeviceType::CUDA, 0);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
    Device getDevice() const override { return card; }
    Device exchangeDevice(Device) const override { return card; }
    Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, card); }
    Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, card); }
    Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, card); }
};

struct Hooks final : at::CUDAHooksInterface {
    explicit Hooks(at::CUDAHooksArgs) {}
    void init() const override {}
    bool hasCUDA() const override { return true; }
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(DeviceIndex) const override { return true; }
    bool isPinnedPtr(const void*) const override { return false; }
    int getNumGPUs() const override { return 1; }
    DeviceIndex deviceCount() const override { return 1; }
    DeviceIndex current_device() const override { return 0; }
    DeviceIndex getCurrentDevice() const override { return 0; }
    DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
    DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
    void setCurrentDevice(DeviceIndex) const override {}
};

namespace at {
using CUDAHooks = ::Hooks;      // torch finds them by this name
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, CUDAHooks)
}

extern "C" void take_over() { c10::impl::DeviceGuardImplRegistrar(DeviceType::CUDA, new Guard); }
"""


def what_is_missing() -> str:
    """Why this machine cannot pretend; nothing if it can."""
    for package, wanted in VERSIONS.items():
        try:
            found = version(package).partition("+")[0]
        except PackageNotFoundError:
            return f"a make-believe GPU needs {package} {wanted}; install requirements-dev.txt"
        if found != wanted:
            return f"a make-believe GPU needs {package} {wanted}; this is {found}"
    try:
        device_library()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"a make-believe GPU needs g++ and the headers of torch ({error})"
    return ""


def cache() -> Path:
    """What is compiled is kept here from one run of the tests to the next, until this file changes."""
    versions = f"{version('torch')} {sys.version}".encode()
    key = hashlib.sha256(Path(__file__).read_bytes() + versions).hexdigest()
    return Path(tempfile.gettempdir()) / f"benchtop_make_believe_{os.getuid()}" / key[:16]


def device_library() -> Path:
    """DEVICE, compiled."""
    path = cache() / "device.so"
    if not path.exists():
        torch = Path(importlib.util.find_spec("torch").origin).parent
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = path.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", "-shared", "-fPIC", "-std=c++20", "-x", "c++", "-", f"-I{torch / 'include'}",
                        f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}",
                        "-o", mine], input=DEVICE, text=True, capture_output=True, check=True)
        mine.replace(path)
    return path


# ------------------------------------------------------------------------------------------------
# Becoming a GPU: what torch, Inductor and Triton ask for, and the answers
# ------------------------------------------------------------------------------------------------

class Nothing:
    """A stream, an event or a guard of a device, on which nothing happens."""
    cuda_stream = 0

    def __init__(self, *_args, **_options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_error) -> bool:
        return False

    def record(self, *_args) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        synchronize()


def synchronize() -> None:
    for told in WAITS:
        told("synchronize")


def plug_in() -> None:
    """Let torch find a GPU; before it is imported, since it asks only once."""
    assert "torch" not in sys.modules, "torch has been imported and has found no GPU"
    os.environ |= {f"{owner}_CACHE_DIR": str(cache() / owner) for owner in ("TORCHINDUCTOR", "TRITON")}
    ctypes.CDLL(str(device_library()), mode=ctypes.RTLD_GLOBAL)


def become(card: Card, machine_code: bool = True) -> None:
    """Make this process, which is plugged in, find the card; it may become another one before it compiles.

    machine_code  False: do not compile Triton's kernels, which is faster and tells all but registers
    """
    import torch
    ctypes.CDLL(str(device_library())).take_over()
    see(card)
    answer(torch.cuda, is_available=True, is_initialized=True, device_count=1, current_device=0,
           get_device_properties=SEEN, get_rng_state=torch.get_rng_state(), set_rng_state=None,
           manual_seed_all=None, set_device=None, current_stream=Nothing(), _lazy_init=None)
    answer(torch.cuda, torch.accelerator, empty_cache=None, memory_stats={}, reset_peak_memory_stats=None,
           max_memory_allocated=0, max_memory_reserved=0, memory_allocated=0, memory_reserved=0)
    for module in (torch.cuda, torch.accelerator):      # torch.compile wants two functions
        module.synchronize = lambda _device=None: synchronize()
    torch.cuda.get_device_capability = lambda _device=None: (SEEN.major, SEEN.minor)
    torch.cuda.is_bf16_supported = lambda *_args, **_options: SEEN.major >= 8
    torch.cuda.get_device_name = lambda _device=None: SEEN.name
    for module, name in ((torch.cuda, "mem_get_info"), (torch.accelerator, "get_memory_info")):
        setattr(module, name, lambda _device=None: (SEEN.total_memory, SEEN.total_memory))
    answer(torch._C, _cuda_getDevice=0, _cuda_getDeviceCount=1, _cuda_exchangeDevice=0,
           _cuda_maybeExchangeDevice=0, _cuda_getCurrentRawStream=0)
    torch.cuda.device = torch.cuda._DeviceGuard = torch.cuda.Event = Nothing
    torch.version.cuda = "13.0"
    torch._subclasses.FakeTensorMode.avoid_device_init = True
    let_triton_find_it()
    let_inductor_find_it(compile_kernel if machine_code else leave_kernel)


SEEN = types.SimpleNamespace()      # the properties of the card that is found


def see(card: Card) -> None:
    vars(SEEN).update(
        name=card.name, major=card.capability[0], minor=card.capability[1], uuid="", gcnArchName="",
        total_memory=int(card.memory_gib * 2**30), multi_processor_count=card.processors,
        warp_size=32, regs_per_multiprocessor=65536, L2_cache_size=50 * 2**20, max_threads_per_block=1024,
        max_threads_per_multi_processor=1536 if card.shared_kib < 100 else 2048,
        shared_memory_per_block=48 * 2**10, shared_memory_per_block_optin=card.shared_kib * 2**10,
        shared_memory_per_multiprocessor=(card.shared_kib + 1) * 2**10)


def answer(*modules: object, **answers: object) -> None:
    """Replace functions of modules by ones that always give these answers."""
    for module, (name, given) in itertools.product(modules, answers.items()):
        setattr(module, name, lambda *_args, given=given, **_options: given)


def let_triton_find_it() -> None:
    import torch
    import torch.utils._triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    found = types.SimpleNamespace(utils=types.SimpleNamespace())
    found.get_current_target = lambda: GPUTarget("cuda", 10 * SEEN.major + SEEN.minor, 32)
    found.utils.get_device_properties = lambda _device: {
        "max_shared_mem": SEEN.shared_memory_per_block_optin, "warpSize": SEEN.warp_size,
        "multiprocessor_count": SEEN.multi_processor_count, "max_num_regs": SEEN.regs_per_multiprocessor}
    answer(found, get_current_device=0, get_current_stream=0, is_active=True, get_device_interface=torch.cuda,
           get_active_torch_device=torch.device("cuda", 0))
    driver.set_active(found)
    answer(torch.utils._triton, has_triton=True, has_triton_package=True)


def let_inductor_find_it(compiler: Callable) -> None:
    import torch
    import torch._functorch.config
    import torch._inductor.compile_fx
    from torch._inductor import config
    from torch._inductor.fx_passes import fuse_attention, joint_graph, misc_patterns, pad_mm
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    config.compile_threads = 1
    config.use_static_triton_launcher = torch._functorch.config.enable_autograd_cache = False
    # patterns to search for are traced on the device, with numbers
    answer(fuse_attention, _sfdp_init=None)
    answer(pad_mm, _pad_mm_init=None)
    answer(misc_patterns, _misc_patterns_init=None)
    answer(triton_helpers, set_driver_to_gpu=None)
    # constants are folded by computing with them, which the card cannot
    folder = joint_graph.UniformValueConstantFolder
    deduce = folder._deduce_value

    def deduce_on_cpu(self, node):
        given = node.kwargs
        if "device" in given:
            node.kwargs = {**given, "device": torch.device("cpu")}
        try:
            return deduce(self, node)
        finally:
            node.kwargs = given
    folder._deduce_value = deduce_on_cpu
    CachingAutotuner.precompile, CachingAutotuner.run = compiler, count_launch
    guards = torch._C._dynamo.guards
    guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda")
    guards._reinterpret_tensor = lambda tensor, size, stride, offset=0: tensor.as_strided(
        size, stride, tensor.storage_offset() + offset)


KERNELS: dict[str, list] = collections.defaultdict(list)    # what Triton compiled, by the kernel's name
LAUNCHES: list[Callable[[str, tuple], None]] = []       # are told name and arguments of each launch
WAITS: list[Callable[[str], None]] = []                 # are told of each call that waits for the card


def compile_kernel(self, *_args, **_options) -> None:
    """CachingAutotuner.precompile: the first configuration that fits into shared memory."""
    if self.launchers:
        return
    self.launchers = [None]
    needs, limit = [], SEEN.shared_memory_per_block_optin
    for config in self.configs:
        kernel = self._precompile_config(config).kernel
        needs.append(kernel.metadata.shared)
        if kernel.metadata.shared <= limit:
            KERNELS[self.fn.__name__].append(kernel)
            return
    raise RuntimeError(f"out of shared memory: {self.fn.__name__} needs {needs}, the limit is {limit}")


def leave_kernel(self, *_args, **_options) -> None:
    """The same, where what Triton makes of the kernel does not matter."""
    self.launchers = [None]


def count_launch(self, *_args, **_options) -> None:
    """CachingAutotuner.run"""
    for told in LAUNCHES:
        told(self.fn.__name__, _args)
