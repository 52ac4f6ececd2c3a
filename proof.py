"""Is this machine fit for training, and what will it give? Some minutes, no data needed; start it by

    ./run.sh proof                        gpt2-small on a GPU, the demo on a CPU
    ./run.sh proof xs --gpu_cost_per_hour 2.5
    python proof.py --only product,kernels

A line for each check; the exit code is 0 unless one FAILED. Any other flag is a knob of train_gpt.py for the
part `speed`, such as --fp8. The parts:

    machine    driver, versions, power, memory, disk; versions that do not go together
    product    a large matrix product and a large copy, beside what the maker promises
    kernels    attention, loss, FP8 head, Newton-Schulz and block mask against float64
    compiled   gradients of compiled kernels against eager ones
    losses     eight steps of a small model against the CPU in float32
    processes  all GPUs against one, and how fast they exchange; on a CPU, two processes
    speed      the preset: tokens/s, MFU, memory, where the time goes, and what the whole run takes and costs

It leaves experiments/DATE_TIME_proof with a table to paste, the figures as JSON and what libraries printed.
"""

import dataclasses
import functools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchtop import host, memory, places
from benchtop.apart import FAILED, SKIPPED, WARNING, Finding, exit_code, findings_of, run_parts, teller
from benchtop.batches import Batch, batch_of, micro_batch_shape
from benchtop.briefing import duration, operations_of
from benchtop.command_line import Parser, command, counted
from benchtop.compiled_check import MIX_ORDER, avoid_known_faults, compare_compiled
from benchtop.driver import ask_nvidia_smi, bad_pair
from benchtop.errors import UserError, first_line
from benchtop.evaluation import TokenLosses
from benchtop.files import write_json, write_text
from benchtop.folder import new_folder
from benchtop.identity import facts_about_session
from benchtop.knobs import parse_config
from benchtop.machine import Kernels, World, choose_kernels
from benchtop.measure import (
    by_kind,
    copy_bytes,
    fp8_product_flops,
    kernels_of,
    product_flops,
    relative_error,
    seconds_of,
)
from benchtop.processes import places_by_torchrun
from benchtop.run import make_model, warm_up
from benchtop.synthetic import SyntheticRun, zipf_tokens
from train_gpt import (
    EXPERIMENT,
    GPT,
    ChunkedLoss,
    Config,
    Context,
    choose_loss_kernel,
    dense_mask,
    fp8_problem,
    newton_schulz,
    soft_cap,
    token_losses,
)

SILENCE, SECONDS = 100, 300         # after which a part counts as hanging; for all parts
LEAST_SHARE = 0.6                   # of the peak that the maker states, for a large product
# of the norm, against float64: some roundings to the dtype in a row, and FP8's of 3 and 2 bits of mantissa
BOUNDS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2, torch.float8_e4m3fn: 0.15}
LOSS_BOUNDS = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 1e-2}
# small, and calm: with rates this low some steps do not amplify what kernels round differently
SMALL = dict(num_layers=3, num_heads=2, model_dim=256, seq_len=256, batch_tokens=2048, num_steps=8,
             vocab_size=1000, micro_batch_tokens=1024, log_every=1, muon_lr=0.01, embed_lr=0.01, head_lr=0.002,
             scalar_lr=0.01)
VOCABULARY = {"demo": 4097, "five-minutes": 8193}       # of a preset's tokenizer; GPT-2's for all others
NEVER = 2**40                       # steps


@dataclasses.dataclass(frozen=True)
class Proof:
    """What the parts share: the preset's Config and this machine."""
    cfg: Config
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

    def small(self, **knobs) -> Config:
        """A small Config for this machine."""
        return Config(**SMALL | {"device": self.cfg.device, "dtype": self.cfg.dtype} | knobs)


def short_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def within(check: str, errors: dict[str, float], bound: float, says: str) -> Finding:
    """A finding of relative errors, which fails where one is above the bound, or no number."""
    wrong = [name for name, error in errors.items() if not error <= bound]
    figures = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return Finding(check, f"{says}: {figures}; bound {bound:.0e}", FAILED if wrong else "ok",
                   {"errors": errors, "bound": bound})


# ------------------------------------------------------------------------------------------------
# The machine, and what it can do
# ------------------------------------------------------------------------------------------------

def machine(proof: Proof) -> Iterator[Finding]:
    world, version = proof.world, str(torch.__version__)
    fault = avoid_known_faults(version)
    is_open = fault and os.environ[MIX_ORDER] != "0"
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}" \
        if torch.version.hip else "no GPU"
    yield Finding("torch", fault or f"{version} for {built}, Python {sys.version.split()[0]}",
                  FAILED if is_open else WARNING if fault else "ok",
                  {"torch": version, "cuda": torch.version.cuda, "fault": fault})
    facts = world.facts() | {"dtype_reason": world.dtype_reason}
    yield Finding("device", f"{world.device_name()}; {facts['dtype']}: {world.dtype_reason}", values=facts)
    if proof.device.type == "cuda":
        yield from describe_cards()
    free, disk = memory.free_memory_mib(world), shutil.disk_usage(places.ROOT).free / 2**20
    yield Finding("memory", f"{free:,.0f} MiB free for training, {host.free_memory_mib():,.0f} MiB of the "
                            "machine's own", values={"free_mib": free, "host_mib": host.free_memory_mib()})
    yield Finding("disk", f"{disk:,.0f} MiB free", WARNING if disk < 10_000 else "ok", {"free_mib": disk})


def describe_cards() -> Iterator[Finding]:
    """A line for each GPU, by nvidia-smi."""
    capability = torch.cuda.get_device_capability()
    found, problem = ask_nvidia_smi()
    if problem:
        yield Finding("driver", f"not known: {problem}; capability {capability}", WARNING)
        return
    pair = bad_pair(found[0].driver, torch.version.cuda)
    yield Finding("driver", pair or f"{found[0].driver}, capability {capability[0]}.{capability[1]}",
                  WARNING if pair else "ok", {"driver": found[0].driver, "capability": capability})
    for number, card in enumerate(found):
        problems = card.problems()
        says = (f"{card.name}: {card.power_limit:.0f} W of {card.usual_power_limit:.0f}, {card.clock:.0f} MHz "
                f"of {card.most_clock:.0f}, {card.temperature:.0f} C")
        yield Finding(f"GPU {number}", "; ".join([says, *problems]), WARNING if problems else "ok",
                      dataclasses.asdict(card))


def product(proof: Proof) -> Iterator[Finding]:
    world, cfg, on_cpu = proof.world, proof.cfg, proof.device.type == "cpu"
    size = 2048 if on_cpu else 8192
    found, peak = product_flops(world, proof.dtype, size) / 1e12, world.peak_flops(cfg) / world.size / 1e12
    share = found / peak if peak else None
    beside = f", {share:.0%} of the table's {peak:,.0f}" if peak else "; no table has this device's peak"
    slow = share is not None and share < LEAST_SHARE
    yield Finding("product", f"{found:,.3g} TFLOP/s {short_name(proof.dtype)}{beside}"
                  + (": it is throttled, shared or busy" if slow else ""), WARNING if slow else "ok",
                  {"tflops": found, "peak_tflops": peak, "share": share, "size": size})
    if not on_cpu and not fp8_problem(proof.device, proof.dtype):
        fp8 = fp8_product_flops(world, size) / 1e12
        yield Finding("product FP8", f"{fp8:,.3g} TFLOP/s, {fp8 / found:.2f} times that", values={"tflops": fp8})
    if not on_cpu:
        yield clocks_under_load(proof)
    copied = copy_bytes(world, 2**28 if on_cpu else 2**30) / 1e9
    yield Finding("copy", f"{copied:,.3g} GB/s read and written", values={"gb_per_second": copied})


def clocks_under_load(proof: Proof) -> Finding:
    """What nvidia-smi says while products are queued for a second or two."""
    a = torch.randn(8192, 8192, device=proof.device).to(proof.dtype)
    queued = max(10, min(2000, int(1.5 / max(1e-4, seconds_of(lambda: a @ a, proof.world)))))
    for _ in range(queued):
        a @ a
    found, problem = ask_nvidia_smi()
    proof.world.synchronize()
    if problem:
        return Finding("clocks", f"not known: {problem}", SKIPPED)
    card = found[0]
    return Finding("clocks", f"{card.clock:.0f} MHz of {card.most_clock:.0f} while products run, "
                             f"{card.temperature:.0f} C", values=dataclasses.asdict(card))


# ------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------

def kernels(proof: Proof) -> Iterator[Finding]:
    chosen, on_cpu = proof.kernels, proof.device.type == "cpu"
    says = f"compile {'on' if chosen.compiled else 'off'}: {chosen.compile_reason}; {chosen.attention}"
    plain = not on_cpu and (not chosen.compiled or chosen.flex is None)
    yield Finding("chosen", says, WARNING if plain else "ok", dataclasses.asdict(chosen))
    width = proof.cfg.head_dim
    for check in (*(functools.partial(attention, proof, length, window, width)
                    for length, window in ((512, 200), (700, 300), (333, 2**30))),
                  functools.partial(loss, proof), functools.partial(loss, proof, fp8=True),
                  functools.partial(orthogonal, proof), functools.partial(blocks, proof)):
        name = check.func.__name__
        try:
            yield check()
        except Exception as error:
            yield Finding(name, f"{type(error).__name__}: {first_line(error)}", FAILED)
            proof.world.synchronize()       # where the device is of no more use, the others need a new process


def context_of(proof: Proof, cfg: Config, inputs: Tensor, flex: dict | None) -> Context:
    """What the first layer receives."""
    model = GPT(cfg, cfg.vocab_size - 1, proof.dtype, flex).to(inputs.device)
    return model.contexts(inputs)[0]


def rows_of_documents(rows: int, length: int, eot_id: int = 99) -> Tensor:
    """(B, T) token ids on the CPU, in documents of some 90 tokens; the first row is one document."""
    tokens = torch.from_numpy(zipf_tokens(rows * length, eot_id + 1, eot_id, 90).astype("int64"))
    tokens = tokens.view(rows, length)
    tokens[0][tokens[0] == eot_id] = 0
    tokens[:, 0] = eot_id
    return tokens


def attend(ctx: Context, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return ctx.attend(q, k, v, scale)


def attention(proof: Proof, length: int, window: int, width: int) -> Finding:
    """Attention as the run does it; also that a query's gradient reaches those values alone that it sees."""
    rows, heads = 4, 2
    window, scale = min(window, length), proof.cfg.attention_cap / width
    cfg = proof.small(model_dim=heads * width, num_heads=heads, seq_len=length, batch_tokens=rows * length,
                      micro_batch_tokens=0, vocab_size=100, num_layers=2, long_window=window,
                      short_window=window)
    inputs = rows_of_documents(rows, length)
    ctx = context_of(proof, cfg, inputs.to(proof.device), proof.kernels.flex)
    work = torch.compile(attend, dynamic=False) if proof.kernels.compiled else attend
    draw = torch.Generator().manual_seed(0)
    q, k, v, weight = (torch.randn(rows, heads, length, width, generator=draw).to(proof.dtype)
                       for _ in range(4))
    q, k = (torch.nn.functional.rms_norm(t, (width,)) for t in (q, k))
    here = [t.to(proof.device).requires_grad_() for t in (q, k, v)]
    y = work(ctx, *here, scale)
    found = [y, *torch.autograd.grad(y, here, weight.to(proof.device), retain_graph=True)]
    docs = (inputs == 99).cumsum(1, dtype=torch.int32)
    seen = dense_mask(docs, torch.tensor(window, dtype=torch.int32))                        # (B, T, T)
    errors = {name: relative_error(*pair) for name, pair in zip(
        ("y", "dq", "dk", "dv"), zip(found, exact_attention(q, k, v, seen, scale, weight), strict=True),
        strict=True)}
    one = torch.zeros_like(weight)          # of a gradient that only some queries have
    queries = [length - 1 - 40 * row for row in range(rows)]
    for row, query in enumerate(queries):
        one[row, :, query] = 1
    reached = torch.autograd.grad(y, here[2], one.to(proof.device))[0].cpu().ne(0).any(-1)  # (B, H, T)
    leaks = sum(int((reached[row] != seen[row, query]).sum()) for row, query in enumerate(queries))
    finding = within("attention", errors, BOUNDS[proof.dtype], f"{length} x {width}, window {window}")
    return dataclasses.replace(finding, says=f"{finding.says}; {leaks} keys seen wrongly",
                               status=FAILED if leaks else finding.status)


def exact_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, weight: Tensor,
                    ) -> list[Tensor]:
    """Output and gradients in float64, by plain softmax."""
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    z = (leaves[0] @ leaves[1].mT) * scale                                                  # (B, H, T, T)
    y = z.masked_fill(~seen[:, None], -math.inf).softmax(-1) @ leaves[2]                    # (B, H, T, K)
    return [y, *torch.autograd.grad(y, leaves, weight.double())]


def loss(proof: Proof, fp8: bool = False) -> Finding:
    """The loss of the head with its gradients: in chunks, with a padded vocabulary and targets of -1."""
    name, tokens, width = "loss FP8" if fp8 else "loss", 992, 256
    problem = fp8 and (fp8_problem(proof.device, proof.dtype)
                       or (proof.device.type == "cpu" and "is for GPUs"))
    if problem:
        return Finding(name, f"the FP8 head {problem}", SKIPPED)
    cfg = proof.small(vocab_size=4097, logit_cap=proof.cfg.logit_cap, fp8=fp8)
    kernel = choose_loss_kernel(cfg)
    if proof.kernels.compiled:
        kernel = torch.compile(kernel, dynamic=False)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=draw).to(proof.dtype)
    head = 0.1 * torch.randn(cfg.padded_vocab_size, width, generator=draw)
    targets = torch.randint(-1, cfg.vocab_size, (tokens,), generator=draw)
    targets[::50] = -1
    here = [t.to(proof.device).requires_grad_() for t in (x, head)]
    total = ChunkedLoss.apply(*here, targets.to(proof.device), cfg, kernel)
    found = [total, *torch.autograd.grad(total, here)]
    leaves = [x.double().requires_grad_(), head.to(proof.dtype).double().requires_grad_()]
    z = soft_cap(leaves[0] @ leaves[1][:cfg.vocab_size].T, cfg.logit_cap)                   # (N, V)
    exact = token_losses(z, targets, cfg).sum()
    wanted = [exact, *torch.autograd.grad(exact, leaves)]
    errors = dict(zip(("loss", "dx", "dW"), map(relative_error, found, wanted), strict=True))
    bound = BOUNDS[torch.float8_e4m3fn if fp8 else proof.dtype]
    return within(name, errors, bound, f"{tokens} tokens, {cfg.vocab_size:,} columns, cap {cfg.logit_cap:g}")


def orthogonal(proof: Proof) -> Finding:
    """Newton-Schulz in the dtype of the optimizer's products."""
    dtype = torch.bfloat16 if proof.dtype == torch.bfloat16 else torch.float32
    G = torch.randn(4, 256, 1024, generator=torch.Generator().manual_seed(0))
    found = newton_schulz(G.to(proof.device), dtype=dtype).float().cpu()
    values = torch.linalg.svdvals(found)
    low, high = float(values.min()), float(values.max())
    error = relative_error(found, newton_schulz(G.double(), dtype=torch.float64))
    finding = within("newton", {"X": error}, BOUNDS[dtype],
                     f"{short_name(dtype)}, singular values {low:.2f} to {high:.2f}")
    return finding if 0.6 < low <= high < 1.3 else dataclasses.replace(finding, status=FAILED)


def blocks(proof: Proof) -> Finding:
    """The block mask made on the device against all pairs of tokens, evaluated on the CPU."""
    rows, length, wrong = 6, 1000, 0
    inputs = rows_of_documents(rows, length)
    docs = (inputs == 99).cumsum(1, dtype=torch.int32)
    for window in (100, 300, length):
        cfg = proof.small(seq_len=length, batch_tokens=length, micro_batch_tokens=0, vocab_size=100,
                          num_layers=2, long_window=window, short_window=window)
        mask = context_of(proof, cfg, inputs.to(proof.device), proof.kernels.flex or {}).blocks
        wrong += wrong_blocks(mask, dense_mask(docs, torch.tensor(window, dtype=torch.int32)))
    return Finding("blocks", f"{rows} rows of {length} tokens, 3 windows: {wrong} blocks differ from the mask",
                   FAILED if wrong else "ok", {"wrong": wrong})


def wrong_blocks(mask, seen: Tensor) -> int:
    """Blocks that are skipped although seen, or taken as a whole although not, in the lists of keys or
    queries; seen (B, T, T) bool."""
    size = mask.BLOCK_SIZE[0]
    pad = -seen.size(1) % size
    some = torch.nn.functional.pad(seen, (0, pad, 0, pad))
    every = torch.nn.functional.pad(seen, (0, pad, 0, pad), value=True)
    some, every = (t.unflatten(2, (-1, size)).unflatten(1, (-1, size)) for t in (some, every))
    some, every = some.any(4).any(2), every.all(4).all(2)                                   # (B, J, J)
    wrong = 0
    for side, transposed in (("kv", False), ("q", True)):
        part, whole = (listed_blocks(getattr(mask, f"{kind}{side}_num_blocks"),
                                     getattr(mask, f"{kind}{side}_indices")) for kind in ("", "full_"))
        if transposed:
            part, whole = part.mT, whole.mT
        wrong += int(((some & ~(part | whole)) | (whole & ~every) | (part & whole)).sum())
    return wrong


def listed_blocks(count: Tensor, indices: Tensor) -> Tensor:
    """The lists of a BlockMask, (B, 1, J) and (B, 1, J, J), as (B, J, J) bool."""
    count, indices = count[:, 0].cpu().long(), indices[:, 0].cpu().long()
    size = indices.size(-1)
    listed = torch.where(torch.arange(size) < count[..., None], indices, size)
    found = torch.zeros(*indices.shape[:-1], size + 1, dtype=torch.bool)
    return found.scatter(-1, listed, True)[..., :size]


# ------------------------------------------------------------------------------------------------
# Steps
# ------------------------------------------------------------------------------------------------

def compiled(proof: Proof) -> Iterator[Finding]:
    if not proof.kernels.compiled:
        yield Finding("compiled", f"nothing is compiled here: {proof.kernels.compile_reason}", SKIPPED)
        return
    found = compare_compiled(EXPERIMENT, proof.cfg, proof.world, proof.kernels)
    yield Finding("compiled", f"gradients are eager ones up to {found}", "ok" if found.agrees else FAILED,
                  dataclasses.asdict(found))


def losses_of_steps(cfg: Config, world: World, chosen: Kernels) -> list[float]:
    """The loss of each step of a small model."""
    model, optimizer = make_model(EXPERIMENT, cfg, cfg.vocab_size - 1, world, chosen)
    run = SyntheticRun(EXPERIMENT, cfg, world, model, optimizer, chosen.compiled, mean=90)
    EXPERIMENT.train(run)
    return [row["train_loss"] for row in run.rows]


def same_losses(check: str, found: list[float], wanted: list[float], bound: float, says: str) -> Finding:
    error = max(abs(a / b - 1) for a, b in zip(found, wanted, strict=True))
    shown = f"{says} {wanted[0]:.4f} to {wanted[-1]:.4f}, apart by {error:.1e}; bound {bound:.0e}"
    return Finding(check, shown, "ok" if error <= bound else FAILED,
                   {"losses": found, "wanted": wanted, "error": error, "bound": bound})


def losses(proof: Proof) -> Iterator[Finding]:
    plain = proof.small(device="cpu", dtype="float32", compile="off")
    wanted = losses_of_steps(plain, World(plain), Kernels(False, "", None, ""))
    with fresh_compiler():
        found = losses_of_steps(proof.small(), proof.world, proof.kernels)
    yield same_losses("losses", found, wanted, LOSS_BOUNDS[proof.dtype],
                      f"{counted(len(wanted), 'step')} here and by the CPU in float32:")


def fresh_compiler():
    from benchtop.compiled_check import own_compilations
    return own_compilations()


def processes(proof: Proof) -> Iterator[Finding]:
    """The same steps by all devices together as by one."""
    on_gpu = proof.device.type == "cuda"
    size = torch.cuda.device_count() if on_gpu else min(2, host.available_cores())
    if size < 2:
        yield Finding("processes", "there is one device", SKIPPED)
        return
    cfg = together_config(proof, size)
    wanted = losses_of_steps(cfg, proof.world if on_gpu else World(cfg), Kernels(False, "", None, ""))
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}",
             __file__, *sys.argv[1:], "--together", str(answer)],
            capture_output=True, text=True, errors="replace", timeout=SILENCE - 10)
        print(done.stdout, done.stderr, file=sys.stderr)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
            yield Finding("processes", f"{size} processes failed: {(lines or ['no word'])[-1][:150]}", FAILED)
            return
        told = json.loads(answer.read_text(encoding="utf-8"))
    bound = 1e-4 if told["dtype"] == "float32" else 1e-2
    yield same_losses("processes", told["losses"], wanted, bound, f"{size} processes and one:")
    yield Finding("exchange", f"{told['gb_per_second']:,.3g} GB/s, the sum of 256 MiB over {size} processes",
                  values={"gb_per_second": told["gb_per_second"]})


def together_config(proof: Proof, size: int) -> Config:
    """The steps that all processes do together; a CPU's in float32."""
    dtype = {} if proof.device.type == "cuda" else {"dtype": "float32"}
    return proof.small(compile="off", batch_tokens=256 * max(8, size), micro_batch_tokens=256, num_steps=5,
                       timeout_seconds=60, **dtype)


def together(proof: Proof, answer: Path) -> None:
    """What each of the processes does that torchrun starts for `processes`."""
    world = proof.world
    found = losses_of_steps(together_config(proof, world.size), world, Kernels(False, "", None, ""))
    numbers = torch.ones(2**26, device=world.device)
    seconds = seconds_of(lambda: world.sum(numbers), world)
    moved = 2 * (world.size - 1) / world.size * 4 * numbers.numel()     # by each process, in each direction
    if world.is_main:
        write_json(answer, {"losses": found, "gb_per_second": moved / seconds / 1e9,
                            "dtype": short_name(world.dtype)})


# ------------------------------------------------------------------------------------------------
# Speed
# ------------------------------------------------------------------------------------------------

class Stopwatch:
    """Times steps while a run goes on: some to warm up, some of which each is waited for, then on a GPU some
    that queue up. Called when a step is queued; True when that is enough.

    waits  calls of a step that waited for a GPU, as FILE:LINE
    """

    def __init__(self, world: World, seconds: float):
        self.world, self.budget, self.on_gpu = world, seconds, world.device.type == "cuda"
        self.warm_ups, self.calls = (2 if self.on_gpu else 1), 0
        self.queued, self.done, self.waits, self.step_seconds = [], [], [], 0.0
        self.begun = self.last = time.perf_counter()
        self.free = None        # how many steps are still to queue up
        self.watch = None

    def __call__(self, run: SyntheticRun) -> bool:
        self.calls += 1
        now = time.perf_counter()
        if self.watch:
            self.stop_watching()
        if self.free:
            self.free -= 1
            if not self.free:
                self.world.synchronize()
                self.step_seconds = (time.perf_counter() - self.last) / self.many
            return not self.free
        self.world.synchronize()
        if self.calls > self.warm_ups:
            self.queued.append(now - self.last)
            self.done.append(time.perf_counter() - self.last)
            self.step_seconds = statistics.median(self.done)
            used = time.perf_counter() - self.begun
            if not self.on_gpu:
                return len(self.done) >= 2 and (used > self.budget or len(self.done) >= 9)
            if len(self.done) == 4:
                self.many = self.free = max(4, min(40, int(self.budget / self.step_seconds)))
            elif len(self.done) == 3:
                self.start_watching()
        self.last = time.perf_counter()
        return False

    def start_watching(self) -> None:
        """Let torch warn of calls that wait for the GPU, in the next step."""
        self.watch = warnings.catch_warnings(record=True)
        self.heard = self.watch.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def stop_watching(self) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self.watch.__exit__(None, None, None)
        self.watch = None
        self.waits = [f"{Path(one.filename).name}:{one.lineno}" for one in self.heard
                      if "synchronizing" in str(one.message)]


def prepared(proof: Proof, say: Callable[[str], None]) -> tuple[Config, object, object]:
    """The preset's model and optimizer, compiled and warm, and the Config with micro-batches that fit."""
    cfg, world, flex = proof.cfg, proof.world, proof.kernels.flex
    sized = memory.choose_micro_batch(EXPERIMENT, cfg, world, flex)
    model, optimizer = make_model(EXPERIMENT, cfg, cfg.vocab_size - 1, world, proof.kernels)
    losses_of = TokenLosses(model, proof.kernels.compiled)
    sized = memory.fit_micro_batch(
        sized, world, lambda cfg: warm_up(losses_of, optimizer, cfg, world), optimizer.clear_gradients, say,
        lambda: memory.memory_advice(EXPERIMENT, sized, world, flex))
    with torch.no_grad():       # products of zeros take less power, and are faster, than those of a run
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.01)
    return sized, model, optimizer


def halfway(proof: Proof, cfg: Config, model, optimizer, after_step: Callable) -> SyntheticRun:
    """A run in the middle of its budget, where windows that grow have their mean length."""
    cfg = dataclasses.replace(cfg, num_steps=cfg.num_steps or 1000, train_minutes=0.0, target_loss=0.0,
                              log_every=NEVER, val_every=NEVER)
    run = SyntheticRun(EXPERIMENT, cfg, proof.world, model, optimizer, proof.kernels.compiled, after_step)
    run.step, run.progress, run.progress_before = cfg.num_steps // 2, 0.5, 0.5
    return run


def speed(proof: Proof) -> Iterator[Finding]:
    proof, note = within_reach(proof)
    said, begun = [], time.perf_counter()
    with fresh_compiler(), proof.world.memory_of("speed"):
        sized, model, optimizer = prepared(proof, said.append)
        ready = time.perf_counter() - begun
        watch = Stopwatch(proof.world, seconds=8)
        run = halfway(proof, sized, model, optimizer, watch)
        EXPERIMENT.train(run)
        yield from describe_speed(proof, run, watch, [*said, *note], ready)
        yield used_memory(proof, sized)
        yield from described(parts_of_step, proof, run, watch.step_seconds)
        if proof.device.type == "cuda":
            yield from described(kernels_of_step, proof, run, watch.step_seconds)


def within_reach(proof: Proof) -> tuple[Proof, list[str]]:
    """The same with fewer tokens a step, if a step would take a CPU too long; and a word about it."""
    cfg = proof.cfg
    if proof.device.type != "cpu":
        return proof, []
    with torch.device("meta"):
        per_token = GPT(cfg, 0).flops_per_token()
    able = 3 * 0.3 * product_flops(proof.world, proof.dtype, 1024)      # operations in three seconds
    rows = max(1, int(able / (per_token * cfg.seq_len)))
    if rows >= cfg.rows_per_step:
        return proof, []
    fewer = dataclasses.replace(cfg, batch_tokens=rows * cfg.seq_len)
    return Proof(fewer, proof.world), [f"measured on {fewer.batch_tokens:,} tokens a step, since all "
                                       f"{cfg.batch_tokens:,} take long"]


def described(describe: Callable[..., Finding], *arguments) -> Iterator[Finding]:
    """One finding; where it is not to be had, the figures before it are no worse."""
    try:
        yield describe(*arguments)
    except Exception as error:
        yield Finding(describe.__name__.split("_")[0], f"not known: {type(error).__name__}: {first_line(error)}",
                      WARNING)


def describe_speed(proof: Proof, run: SyntheticRun, watch: Stopwatch, notes: list[str], ready: float,
                   ) -> Iterator[Finding]:
    cfg, seconds, model, world = run.cfg, watch.step_seconds, run.model, proof.world
    count, rows = micro_batch_shape(cfg, 1)
    tokens = cfg.batch_tokens / seconds
    model.progress = 0.5
    peak = world.peak_flops(cfg)
    mfu = tokens * model.flops_per_token() / peak if peak else None
    says = (f"{tokens:,.0f} tokens/s" + (f", MFU {mfu:.1%}" if peak else "") + f": {1000 * seconds:,.0f} ms for "
            f"{cfg.batch_tokens:,} tokens in {count} micro-batches of {rows} x {cfg.seq_len}")
    yield Finding("speed", says, values={"tokens_per_second": tokens, "mfu": mfu, "step_seconds": seconds,
                                         "batch_tokens": cfg.batch_tokens, "micro_batches": count,
                                         "rows": rows, "ready_seconds": ready})
    for note in notes:
        yield Finding("note", note)
    queued, done = statistics.median(watch.queued), statistics.median(watch.done)
    if watch.on_gpu:
        waits = f"; the step waits in {', '.join(sorted({*watch.waits}))}" if watch.waits else \
            "; no call waits for the GPU"
        late = queued > 0.9 * done
        yield Finding("queue", f"a step is queued in {1000 * queued:,.0f} ms and done in {1000 * done:,.0f}{waits}",
                      WARNING if late or watch.waits else "ok",
                      {"queued_seconds": queued, "done_seconds": done, "waits": watch.waits})
    yield whole_run(proof, model, tokens)


def whole_run(proof: Proof, model, tokens_per_second: float) -> Finding:
    """Time and cost of the preset on all devices of this machine, where the exchange costs nothing."""
    cfg = proof.cfg
    full = preset_config(cfg)
    devices = torch.cuda.device_count() if proof.device.type == "cuda" else 1
    by_clock = 60 * full.train_minutes or math.inf
    model.progress = 0.5
    middle = model.flops_per_token()
    work = operations_of(full, model) / middle if full.num_steps else math.inf     # tokens, as in the middle
    seconds = min(by_clock, work / (tokens_per_second * devices))
    tokens = min(full.train_tokens or math.inf, tokens_per_second * devices * seconds)
    cost = cfg.gpu_cost_per_hour * seconds / 3600
    says = (f"{cfg.preset}: {tokens:,.0f} tokens in {duration(seconds)} on {counted(devices, 'device')}"
            + (f" for {cost:,.2f}" if cost else "") + ", validation not counted")
    return Finding("whole run", says, values={"seconds": seconds, "tokens": tokens, "devices": devices,
                                              "cost": cost or None})


def preset_config(cfg: Config) -> Config:
    """The Config before `within_reach` cut its steps."""
    return dataclasses.replace(cfg, batch_tokens=cfg.train_tokens // cfg.num_steps) if cfg.num_steps else cfg


def used_memory(proof: Proof, cfg: Config) -> Finding:
    peak = proof.world.peak_memory_mib("speed")
    estimate = memory.memory_estimate_mib(EXPERIMENT, cfg, proof.world, proof.kernels.flex)
    reserved = torch.cuda.max_memory_reserved() / 2**20 if proof.device.type == "cuda" else None
    says = f"peak {peak:,.0f} MiB" + (f", reserved {reserved:,.0f}" if reserved else "")
    return Finding("peak", f"{says}; estimated {estimate:,.0f}",
                   values={"peak_mib": peak, "reserved_mib": reserved, "estimate_mib": estimate})


def parts_of_step(proof: Proof, run: SyntheticRun, step_seconds: float) -> Finding:
    """The share of each part, timed alone on one micro-batch and the optimizer's."""
    model, optimizer, world, cfg = run.model, run.optimizer, proof.world, run.cfg
    batch = first_batch(run)
    inputs, targets = batch.micro_batches[0]
    model.progress, count, times = 0.5, len(batch.micro_batches), 3 if proof.device.type == "cpu" else 5
    x = model.hidden(inputs).detach()
    slope = (torch.randn_like(x, dtype=torch.float32) / targets.numel()).to(x.dtype)
    flat = x.flatten(0, 1).requires_grad_()

    def head() -> None:
        ChunkedLoss.apply(flat, model.head, targets.flatten(), cfg, model.loss_kernel).backward()
    timed = functools.partial(seconds_of, world=world, times=times)
    masks = timed(lambda: model.contexts(inputs))
    found = {"layers": count * (timed(lambda: model.hidden(inputs).backward(slope)) - masks),
             "head": count * timed(head), "masks": count * masks}
    norms, updates = [], []
    for _ in range(times):
        (model(inputs, targets) / batch.num_targets).backward()
        norms.append(seconds_of(optimizer.sum_gradients, world, times=1, warm_ups=0))
        updates.append(seconds_of(lambda: optimizer.step(0.0), world, times=1, warm_ups=0))
    found |= {"optimizer": statistics.median(updates), "norms": statistics.median(norms)}
    found["other"] = max(0.0, step_seconds - sum(found.values()))
    shares = ", ".join(f"{name} {1000 * seconds:,.1f} ms ({seconds / step_seconds:.0%})"
                       for name, seconds in found.items())
    return Finding("parts", shares, values={"seconds": found})


def first_batch(run: SyntheticRun) -> Batch:
    """A step's batch, on the device."""
    batch = batch_of(run.data.rows, run.cfg, run.step, 0, 1)
    return batch.each(lambda tensor: tensor.to(run.world.device))


def kernels_of_step(proof: Proof, run: SyntheticRun, step_seconds: float) -> Finding:
    """How many kernels a step starts, and how long those of each kind take."""
    again = halfway(proof, run.cfg, run.model, run.optimizer, lambda run: True)
    names = kernels_of(lambda: EXPERIMENT.train(again), proof.world)
    kinds = by_kind(names)
    count, busy = (sum(values) for values in zip(*names.values(), strict=True))
    says = ", ".join(f"{kind} {1000 * seconds:,.0f} ms" for kind, (_, seconds) in kinds.items())
    longest = sorted(names.items(), key=lambda item: -item[1][1])[:40]
    return Finding("kernels", f"{count:,} a step, {busy / step_seconds:.0%} of its time: {says}",
                   values={"count": count, "seconds": busy, "kinds": kinds, "longest": longest})


PARTS = {part.__name__: part for part in (machine, product, kernels, compiled, losses, processes, speed)}


# ------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------

@command
def main() -> None:
    parser = Parser("Is this machine fit for training, and what will it give?",
                    epilog="Any other flag is a knob of train_gpt.py for the part speed, such as --fp8.")
    parser.add_argument("--preset", default="", help="whose speed is measured; gpt2-small on a GPU, else demo")
    parser.add_argument("--only", default=",".join(PARTS), metavar="PART,PART", help="the parts to do")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together")
    for flag in ("--parts", "--tell", "--together"):        # for the processes that this one starts
        parser.add_argument(flag, default="", help="==SUPPRESS==")
    args, rest = parser.parse_known_args()
    cfg = config_of(args.preset, rest)
    names = [name.strip() for name in (args.parts or args.only).split(",")]
    unknown = next((name for name in names if name not in PARTS), None)
    if unknown is not None:
        raise UserError(f"there is no part {unknown!r}; they are {', '.join(PARTS)}")
    if args.together:
        world = World(cfg)
        together(Proof(cfg, world), Path(args.together))
        world.close()
    elif args.tell:
        world = World(cfg)
        proof = Proof(cfg, world)
        parts = {name: functools.partial(PARTS[name], proof) for name in names}
        run_parts(parts, teller(int(args.tell)), world.synchronize)
    else:
        sys.exit(show(cfg, names, args.seconds))


def config_of(preset: str, flags: list[str]) -> Config:
    """The preset's Config with the vocabulary and the budget that it would have."""
    gpu = torch.cuda.is_available() and not {"--device=cpu", "cpu"}.intersection(flags)
    preset = preset or ("gpt2-small" if gpu else "demo")
    cfg = parse_config(["--preset", preset, *flags], Config)
    vocabulary = cfg.vocab_size or VOCABULARY.get(preset, 50257)
    return dataclasses.replace(cfg, vocab_size=vocabulary).with_budget(10**12)


def show(cfg: Config, names: list[str], seconds: float) -> int:
    """Print each finding as it comes, and leave all of them in a folder; the exit code."""
    if places_by_torchrun()[1] > 1:
        raise UserError("start proof.py without torchrun; it starts processes by itself")
    folder, begun, findings = new_folder("proof"), time.perf_counter(), []
    command = [sys.executable, __file__, *sys.argv[1:]]
    for finding in findings_of(command, names, folder / "output.txt", SILENCE, seconds):
        findings.append(finding)
        print(finding, flush=True)
    took, code = time.perf_counter() - begun, exit_code(findings)
    table = as_table(findings)
    write_text(folder / "proof.md", table)
    write_json(folder / "proof.json", {
        "status": "unfit" if code else "fit", "run": folder.name, "total_seconds": round(took, 1),
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "config": dataclasses.asdict(cfg), **facts_about_session(Path(__file__).name)})
    failed = [finding.check for finding in findings if finding.status == FAILED]
    verdict = f"not fit: {', '.join(failed)} failed" if failed else "fit"
    print(f"\n{table}\nthis machine is {verdict}; {took:.0f} s; {os.path.relpath(folder)}")
    return code


def as_table(findings: list[Finding]) -> str:
    """A Markdown table to paste."""
    lines = [f"| {finding.check} | {finding.says.replace('|', '/')} | {finding.status} |" for finding in findings]
    return "\n".join(["| check | found | |", "|---|---|---|", *lines]) + "\n"


if __name__ == "__main__":
    main()
