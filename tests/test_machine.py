"""Devices, kernels and the exchange between processes, on machines that are pretended where none is at hand.

Run: ./run.sh test tests/test_machine.py
"""

import contextlib
import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tiny_runs import redirect, rows_of, summary_of, train_here
from torch.overrides import TorchFunctionMode

from benchtop import host, machine
from benchtop.errors import UserError
from benchtop.machine import TILES, World, choose_compile, choose_device, choose_dtype, choose_kernels
from train_gpt import GPT, Config, Optimizer

pytestmark = pytest.mark.usefixtures("no_picture")

CPU = torch.device("cpu")
GPUS = ("cuda", "mps", "xpu")


# ------------------------------------------------------------------------------------------------
# Pretended accelerators
# ------------------------------------------------------------------------------------------------

class Pretended(TorchFunctionMode):
    """What is asked of a device of this kind happens on the CPU; as Apple's GPUs, it may have no float64."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        given = (*arguments, *options.values())
        if any(isinstance(value, torch.device) and value.type == self.kind for value in given):
            tensors = [value for value in given if isinstance(value, torch.Tensor)]
            if self.kind == "mps" and torch.float64 in (*given, *(tensor.dtype for tensor in tensors)):
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
            def here(value: object) -> object:
                return CPU if isinstance(value, torch.device) and value.type == self.kind else value
            arguments = tuple(map(here, arguments))
            options = {name: here(value) for name, value in options.items()}
        return function(*arguments, **options)


class Mark:
    """As torch.cuda.Event."""
    comes = True

    def record(self) -> None:
        self.waited = False

    def query(self) -> bool:
        return self.comes

    def synchronize(self) -> None:
        self.waited = True


@pytest.fixture
def pretend(monkeypatch) -> Callable:
    """pretend("mps") lets torch find that accelerator, and gives what its module was asked for."""
    def pretend(kind: str, count: int = 1) -> list[str]:
        asked = []
        answers = dict(
            cuda=dict(synchronize=None, empty_cache=None, max_memory_allocated=3 << 20, Event=Mark(),
                      reset_peak_memory_stats=None, mem_get_info=(7 << 20, 9 << 20), set_rng_state=None,
                      get_rng_state=torch.get_rng_state(), get_device_name="NVIDIA A100-SXM4-80GB",
                      get_device_capability=(8, 0),
                      get_device_properties=SimpleNamespace(total_memory=9 << 20)),
            mps=dict(synchronize=None, empty_cache=None, driver_allocated_memory=3 << 20, set_rng_state=None,
                     recommended_max_memory=10 << 20, get_rng_state=torch.get_rng_state()),
            xpu=dict(synchronize=None, empty_cache=None, max_memory_allocated=3 << 20, set_rng_state=None,
                     reset_peak_memory_stats=None, mem_get_info=(7 << 20, 9 << 20),
                     get_rng_state=torch.get_rng_state(), get_device_name="Intel(R) Arc(TM) B580 Graphics",
                     is_bf16_supported=True))[kind]
        module = SimpleNamespace(**{
            name: lambda *given, name=name, answer=answer, **options: asked.append(name) or answer
            for name, answer in answers.items()})
        found = torch.device(kind)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: asked.append(f"on {index}"))
        real = torch.get_device_module
        monkeypatch.setattr(torch, "get_device_module",
                            lambda device: module if device.type == kind else real(device))
        for name in ("get_device_capability", "get_device_properties", "is_bf16_supported"):
            if name in answers:
                monkeypatch.setattr(getattr(torch, kind), name, getattr(module, name))
        monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M2")
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: asked.append("pin_memory") or tensor)
        return asked
    return pretend


def world_of(kind: str, size: int = 1, **knobs) -> World:
    """A World whose device is of this kind; of several processes, though there is only this one."""
    world = World(Config(device="cpu", **knobs))
    world.device, world.size = torch.device(kind, 0), size
    return world


# ------------------------------------------------------------------------------------------------
# Which device, dtype and compiler
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", GPUS)
def test_auto_takes_the_accelerator_that_torch_offers(pretend, kind):
    pretend(kind, count=4)
    assert choose_device(Config(), 3, 4 if kind != "mps" else 1) == torch.device(kind, 3)
    assert choose_device(Config(device=kind), 0, 1) == torch.device(kind, 0)
    assert choose_device(Config(device="cpu"), 0, 1) == CPU


def test_auto_takes_the_cpu_where_torch_offers_nothing_that_is_known(monkeypatch):
    for found in (None, torch.device("hpu")):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available, f=found: f)
        assert choose_device(Config(), 0, 1) == CPU


@pytest.mark.parametrize(("asked", "found", "said"), [
    ("cuda", None, "--device cuda needs an NVIDIA or AMD GPU that torch can use; torch .* finds none; "
                   "use --device cpu"),
    ("mps", "cuda", "--device mps needs an Apple GPU .* finds an NVIDIA or AMD GPU; use --device cuda"),
    ("xpu", "mps", "--device xpu needs an Intel GPU .* finds an Apple GPU; use --device mps")])
def test_a_device_that_is_not_there_is_one_line(monkeypatch, asked, found, said):
    monkeypatch.setattr(torch.accelerator, "current_accelerator",
                        lambda check_available: found and torch.device(found))
    with pytest.raises(UserError, match=said):
        choose_device(Config(device=asked), 0, 1)


def test_a_device_of_no_known_kind_is_refused_by_name():
    with pytest.raises(UserError, match="--device must be one of auto, cpu, cuda, mps, xpu; it is 'tpu'"):
        Config(device="tpu")


def test_more_processes_than_gpus_is_one_line(pretend):
    pretend("cuda", count=2)
    with pytest.raises(UserError, match=r"this is process 3 .* torch finds 2; use --nproc_per_node=2"):
        choose_device(Config(), 2, 4)


def test_several_processes_on_a_mac_take_the_cpu_unless_told_otherwise(pretend):
    pretend("mps")
    assert choose_device(Config(), 0, 2) == CPU
    with pytest.raises(UserError, match=r"cannot exchange tensors of Apple GPUs; .* use --device cpu"):
        choose_device(Config(device="mps"), 0, 2)


def test_the_dtype_is_what_the_hardware_multiplies(monkeypatch):
    for words, torchs, wanted in (("fma amx_bf16", "AVX512", torch.bfloat16),
                                  ("avx512_bf16", "AVX512", torch.bfloat16), ("avx2", "AVX2", torch.float32),
                                  ("fma amx_bf16", "AVX2", torch.float32)):
        monkeypatch.setattr(machine, "cpu_facts", lambda words=words: {"flags": words})
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda torchs=torchs: torchs)
        assert choose_dtype(Config(), CPU)[0] == wanted
    for capability, wanted in (((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, has=capability: has)
        assert choose_dtype(Config(), torch.device("cuda"))[0] == wanted
    for has, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert choose_dtype(Config(), torch.device("xpu"))[0] == wanted
    dtype, reason = choose_dtype(Config(), torch.device("mps"))
    assert dtype == torch.float32 and "Apple GPU" in reason
    assert choose_dtype(Config(dtype="bfloat16"), torch.device("mps"))[0] == torch.bfloat16


def test_a_machine_without_a_compiler_trains_without_one(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no g++\nand a long story")
    monkeypatch.setattr(torch, "compile", broken)
    works, reason = choose_compile(Config(), CPU)
    assert not works and "no g++" in reason and "story" not in reason
    with pytest.raises(UserError, match="no g"):
        choose_compile(Config(compile="on"), CPU)


@pytest.fixture
def compiles(monkeypatch):
    """torch.compile leaves functions as they are."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    yield
    torch._dynamo.config.fail_on_recompile_limit_hit = False


def test_the_prototype_for_apple_gpus_compiles_only_when_asked_for(compiles):
    assert choose_compile(Config(), torch.device("mps")) == (
        False, "torch's compiler for Apple GPUs is a prototype; to try it: --compile on")
    with Pretended("mps"):
        assert choose_compile(Config(compile="on"), torch.device("mps"))[0]


def test_torch_2_10_compiles_without_what_it_gets_wrong_and_says_so(compiles, monkeypatch):
    monkeypatch.setenv(machine.MIX_ORDER, "")
    monkeypatch.delenv(machine.MIX_ORDER)
    for version, wrong in (("2.9.1", False), ("2.10.0+cu128", True), ("2.11.0", False), ("2.1.0", False)):
        monkeypatch.setattr(torch, "__version__", version)
        machine.set_up_torch()
        assert os.environ.pop(machine.MIX_ORDER, None) == ("0" if wrong else None)
        assert choose_compile(Config(), CPU)[1].endswith("compiles wrong gradients") == wrong


@pytest.mark.parametrize("users", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_gpu_memory_comes_in_segments_that_grow_unless_the_user_says_otherwise(monkeypatch, users):
    before = {users: "max_split_size_mb:64"} if users else {}
    wanted = before or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    World(Config(device="cpu"))
    assert {name: value for name, value in os.environ.items() if name.endswith("ALLOC_CONF")} == wanted


# ------------------------------------------------------------------------------------------------
# FlexAttention
# ------------------------------------------------------------------------------------------------

@pytest.fixture
def attends(monkeypatch) -> Callable:
    """attends(working) pretends a GPU on which FlexAttention works by the tiles from that number on."""
    def attends(working: int, capability: tuple[int, int] = (9, 0), world: World | None = None, **knobs):
        monkeypatch.setattr(machine, "choose_compile", lambda cfg, device: (True, "pretended"))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(machine, "flex_problem", lambda cfg, world, tiles:
                            "" if TILES.index(tiles) >= working else f"no shared memory for {tiles}")
        return choose_kernels(Config(**knobs), world or world_of("cuda"))
    return attends


def test_flex_attention_takes_its_own_tiles_where_they_fit_and_smaller_ones_elsewhere(attends):
    assert attends(0).flex == {} and attends(0).attention == "FlexAttention"
    assert attends(1).flex == TILES[1] and attends(2).flex == TILES[2]
    assert attends(3).flex is None and attends(3).attention == "plain products: no shared memory for {}"
    # where its own spill, smaller ones come first
    assert attends(0, (8, 0)).flex == TILES[1]
    assert attends(0, (12, 0)).flex == attends(0, (8, 9)).flex == TILES[2]
    assert attends(2, (8, 0)).flex == TILES[2]


def test_the_process_with_the_weakest_gpu_decides_for_all(attends, monkeypatch):
    world = world_of("cuda")
    others = [(1, "")]
    monkeypatch.setattr(world, "gather", lambda thing: [thing, *others] if thing == (0, "") else [thing])
    assert attends(0, world=world).flex == TILES[1]
    others.append((3, "broken"))
    assert attends(0, world=world).attention == "plain products: broken"


def test_flex_attention_is_left_out_with_a_reason_where_it_is_slow_or_cannot_be(attends, monkeypatch):
    for capability in ((7, 5), (7, 0)):
        assert "below 8.0" in attends(0, capability).attention
    assert attends(0, (8, 0)).flex == TILES[1]
    monkeypatch.setattr(torch.version, "hip", "7.0")        # AMD counts otherwise
    assert attends(0, (7, 5)).flex == {}
    assert "a head width of 16 or more; it is 8" in attends(0, model_dim=16, num_heads=2).attention
    monkeypatch.setattr(machine, "choose_compile", lambda cfg, device: (False, "pretended"))
    assert "needs torch.compile" in choose_kernels(Config(), world_of("cuda")).attention


def test_attention_falls_back_where_flex_attention_fails_and_says_why(monkeypatch):
    assert choose_kernels(Config(compile="off"), World(Config(device="cpu"))).attention == "plain products"
    monkeypatch.setattr(machine, "choose_compile", lambda cfg, device: (True, "pretended"))

    def broken(*arguments, **options):
        raise RuntimeError("no kernel\nand a long story")
    monkeypatch.setattr(machine, "create_block_mask", broken)
    for kind in ("mps", "xpu"):
        with Pretended(kind):
            kernels = choose_kernels(Config(), world_of(kind))
        assert kernels.flex is None
        assert kernels.attention == (
            "plain products: FlexAttention does not work here (RuntimeError: no kernel)")


# ------------------------------------------------------------------------------------------------
# Functions that torch compiles again and again
# ------------------------------------------------------------------------------------------------

@pytest.fixture
def counting():
    """A function that is compiled for each size anew; nine sizes are one too many."""
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    yield torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    torch._dynamo.config.fail_on_recompile_limit_hit = False
    torch._dynamo.reset()


def test_a_function_compiled_too_often_is_an_error_that_is_known_as_such(counting):
    limit = torch._dynamo.config.recompile_limit
    for size in range(2, 2 + limit):
        counting(torch.ones(size))
    with pytest.raises(Exception) as error:
        counting(torch.ones(2 + limit))
    assert machine.is_recompile_limit(error.value) and not machine.is_recompile_limit(RuntimeError())


@pytest.mark.parametrize("forget", [World.forget_kernels,
                                    lambda world: choose_kernels(Config(compile="off"), world)])
def test_kernels_that_are_forgotten_count_no_longer(counting, forget):
    """As when a size was too large for the memory, or when a run begins after another one."""
    limit = torch._dynamo.config.recompile_limit
    for size in range(2, 2 + 2 * limit):
        if size == 2 + limit:
            forget(World(Config(device="cpu")))
        counting(torch.ones(size))


def test_choosing_the_compiler_makes_too_many_compilations_an_error(compiles):
    assert not torch._dynamo.config.fail_on_recompile_limit_hit
    choose_compile(Config(compile="off"), CPU)
    assert not torch._dynamo.config.fail_on_recompile_limit_hit
    choose_compile(Config(), CPU)
    assert torch._dynamo.config.fail_on_recompile_limit_hit


def test_a_run_that_is_compiled_too_often_ends_with_one_line(lab, here, monkeypatch):
    real, calls = GPT.forward, []

    def forward(model, inputs, targets):
        calls.extend([1] * (inputs.device.type != "meta"))
        if len(calls) == 3:
            raise torch._dynamo.exc.FailOnRecompileLimitHit("Hard failure")
        return real(model, inputs, targets)
    monkeypatch.setattr(GPT, "forward", forward)
    with pytest.raises(UserError, match=r"a compiled function met too many shapes .* --compile off"):
        train_here(here)


# ------------------------------------------------------------------------------------------------
# What a World has for every device
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", GPUS)
def test_a_device_is_asked_by_neutral_words(pretend, kind):
    asked = pretend(kind)
    world = World(Config())
    assert world.device == torch.device(kind, 0) and "on 0" in asked
    assert world.device_name() in ("NVIDIA A100-SXM4-80GB", "Apple M2", "Intel(R) Arc(TM) B580 Graphics")
    assert world.peak_flops(Config()) == (312e12 if kind == "cuda" else 0)
    assert world.free_memory_mib() == 7 and world.peak_memory_mib() == 3
    asked.clear()
    with world.memory_of("validation"):
        assert world.peak_memory_mib("validation") == world.peak_memory_mib("training") == 3
    world.empty_cache()
    world.synchronize()
    resets = asked.count("reset_peak_memory_stats")
    assert resets == (0 if kind == "mps" else 2) and asked.count("empty_cache") == 3 - resets
    assert ("Event" if kind == "cuda" else "synchronize") in asked
    tensor, mark = world.fetch(world.pinned(torch.arange(3)))
    assert tensor.tolist() == [0, 1, 2]
    assert world.queues == bool(mark) == ("pin_memory" in asked) == (kind == "cuda")
    world.wait_for(mark)
    assert world.reports_behind == (kind == "cuda")


@pytest.mark.parametrize("kind", GPUS)
def test_random_states_go_on_also_on_another_kind_of_device(pretend, kind):
    asked = pretend(kind)
    world = World(Config())
    state = world.random_state()
    assert set(state) == {"cpu", kind}
    wanted = torch.rand(3)
    world.set_random_state(state)
    assert asked[-1] == "set_rng_state" and torch.equal(torch.rand(3), wanted)
    asked.clear()
    world.set_random_state({"cpu": state["cpu"]})
    other = World(Config(device="cpu"))
    other.set_random_state(state)
    assert set(other.random_state()) == {"cpu"} and not asked and torch.equal(torch.rand(3), wanted)


def test_a_driver_that_does_not_know_its_memory_leaves_the_machines(pretend, monkeypatch):
    pretend("xpu")
    world = World(Config())

    def unknown():
        raise RuntimeError("The device doesn't support querying the available free memory.")
    monkeypatch.setattr(world.module, "mem_get_info", unknown)
    monkeypatch.setattr(host, "free_memory_mib", lambda: 5.0)
    assert world.free_memory_mib() == 5


def test_sums_in_float64_are_made_on_the_cpu_where_the_device_has_none(pretend):
    for kind, wanted in (("mps", CPU), ("cuda", torch.device("cuda", 0))):
        pretend(kind)
        with Pretended(kind):
            assert World(Config()).float64_device == wanted
    assert World(Config(device="cpu")).float64_device == CPU


# ------------------------------------------------------------------------------------------------
# The exchange between processes
# ------------------------------------------------------------------------------------------------

@pytest.fixture
def calls(monkeypatch) -> list:
    """What torch.distributed is asked for, with brackets around what goes together."""
    calls = []

    @contextlib.contextmanager
    def together(device, async_ops):
        assert async_ops
        calls.append("(")
        yield SimpleNamespace(wait=lambda: calls.append("waited"))
        calls.append(")")

    def note(tensor, async_op, **owner):
        calls.append((len(tensor), *owner.items()))
        return SimpleNamespace(wait=lambda: calls.append("waited"))
    monkeypatch.setattr(dist, "_coalescing_manager", together)
    monkeypatch.setattr(dist, "is_backend_available", lambda name: True)
    monkeypatch.setattr(dist, "reduce", note)
    monkeypatch.setattr(dist, "broadcast", note)
    return calls


def test_nccl_exchanges_small_tensors_together_and_large_ones_early(calls, monkeypatch):
    monkeypatch.setattr(machine, "BUCKET_BYTES", 400)
    world = world_of("cuda", size=2)
    for length in (10, 20, 80, 30):
        world.begin_sum(torch.ones(length), owner=1)
    assert calls == ["(", (10, ("dst", 1)), (20, ("dst", 1)), (80, ("dst", 1)), ")"]
    calls.clear()
    world.begin_copy(torch.ones(5), owner=0)
    world.wait()
    assert calls == ["(", (30, ("dst", 1)), (5, ("src", 0)), ")", "waited", "waited"]
    calls.clear()
    world.wait()
    assert calls == []


def test_gloo_exchanges_each_tensor_at_once(calls):
    world = world_of("cpu", size=2)
    for length in (10, 20):
        world.begin_sum(torch.ones(length), owner=1)
    assert calls == [(10, ("dst", 1)), (20, ("dst", 1))]
    world.wait()
    assert calls[2:] == ["waited", "waited"]


def test_a_process_alone_exchanges_nothing(calls):
    world = world_of("cuda")
    world.begin_sum(torch.ones(10), owner=0)
    world.wait()
    assert calls == []


def test_the_exchange_is_by_what_torch_was_built_with(monkeypatch):
    for kind, own in (("cuda", "nccl"), ("xpu", "xccl"), ("cpu", "gloo"), ("mps", "gloo")):
        for available in (True, False):
            monkeypatch.setattr(dist, "is_backend_available", lambda name, has=available: has)
            assert world_of(kind).backend == (own if available else "gloo")


def test_tensors_that_a_device_cannot_hold_are_summed_all_the_same(monkeypatch):
    world = world_of("xpu", size=3)
    monkeypatch.setattr(world, "gather", lambda tensor: [tensor, tensor + 1, tensor * 10])
    sums = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert world.sum(sums) is sums and sums.tolist() == [1 + 2 + 10, 2 + 3 + 20]


def test_waiting_for_a_device_that_waits_for_a_lost_process_ends_with_the_one_clear_line(monkeypatch):
    """NCCL leaves the device waiting, where Python would never hear of it."""
    monkeypatch.setattr(Mark, "comes", False)
    world = world_of("cuda", size=2, timeout_seconds=0.01)
    with pytest.raises(UserError, match=r"died or was silent for 0\.01 s .* start again with --resume auto"):
        world.wait_for(Mark())
    assert world._lost
    world.close()       # which does not wait for the other


def test_several_processes_wait_for_marks_that_come(monkeypatch):
    asked = []
    monkeypatch.setattr(Mark, "query", lambda mark: asked.append(1) or len(asked) > 3)
    world_of("cuda", size=2, timeout_seconds=600).wait_for(Mark())
    assert len(asked) == 4


# ------------------------------------------------------------------------------------------------
# Between steps, on a device that runs behind Python
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("each_step", [dict(log_every=1), dict(log_every=50, save_every_steps=1)], ids=str)
def test_a_stop_is_heard_by_a_run_that_reads_reports_later_but_for_a_row_or_checkpoint(
        lab, here, monkeypatch, each_step):
    real, steps = Optimizer.step, []

    def step(*given):
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)
    monkeypatch.setattr(Optimizer, "step", step)
    monkeypatch.setattr(World, "reports_behind", 1)
    with pytest.raises(SystemExit) as end:
        train_here(here, num_steps=50, val_every=50, **each_step)
    assert end.value.code == 128 + signal.SIGTERM and len(steps) == 3


# ------------------------------------------------------------------------------------------------
# A system that is not Linux
# ------------------------------------------------------------------------------------------------

@pytest.fixture
def mac(monkeypatch):
    """No /proc, no affinity of processes, none of Linux's and glibc's own calls."""
    def hidden(method: str, otherwise: Callable) -> None:
        real = getattr(Path, method)
        monkeypatch.setattr(Path, method, lambda path, *given, **options:
                            otherwise(path) if str(path).startswith("/proc")
                            else real(path, *given, **options))

    def missing(path: Path) -> None:
        raise FileNotFoundError(2, "No such file or directory", str(path))
    for method in ("read_text", "write_text", "open"):
        hidden(method, missing)
    hidden("exists", lambda path: False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())


def test_a_system_without_linuxs_ways_is_asked_by_others(mac, monkeypatch):
    assert host.available_cores() == os.cpu_count()
    assert host.free_memory_mib() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
    world = World(Config(device="cpu"))
    assert world.device_name().endswith(f", {os.cpu_count()} cores")
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3 << 20))
    for system, mib in (("darwin", 3), ("freebsd", 3 << 10)):       # bytes, kilobytes
        monkeypatch.setattr(sys, "platform", system)
        assert world.peak_memory_mib() == mib


def test_a_system_without_linuxs_ways_trains(mac, lab, here):
    assert float(rows_of(train_here(here, num_steps=2))[-1]["peak_memory_mib"]) > 0


# ------------------------------------------------------------------------------------------------
# Whole runs
# ------------------------------------------------------------------------------------------------

WHOLE = dict(num_steps=5, log_every=2, val_every=2, save_every_steps=3)


@pytest.fixture(scope="module")
def on_the_cpu(lab, tmp_path_factory) -> list[dict]:
    """The rows of a run that pretends nothing."""
    folder = tmp_path_factory.mktemp("cpu")
    with pytest.MonkeyPatch.context() as patch:
        redirect(patch, lab, folder)
        return rows_of(train_here(folder, **WHOLE))


@pytest.mark.parametrize("kind", GPUS)
def test_a_run_on_any_accelerator_is_the_run_on_a_cpu(pretend, kind, here, on_the_cpu):
    """As far as a CPU can pretend: by the words that each backend has, and without what it lacks."""
    asked = pretend(kind)
    with Pretended(kind):
        folder = train_here(here, **WHOLE, device="auto", model_name=kind)
    kept = ("step", "train_loss", "val_loss", "val_bpb", "grad_norm", "lr_scale")
    for ours, theirs in zip(rows_of(folder), on_the_cpu, strict=True):
        assert [ours[name] for name in kept] == [theirs[name] for name in kept]
    assert summary_of(folder)["peak_memory_mib"] == 3
    assert ("pin_memory" in asked) == (kind == "cuda")
