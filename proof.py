"""Check that this machine is fit for training and measure its speed, in a few minutes and without data.

    ./run.sh proof                        gpt2-small on a GPU, the demo on a CPU
    ./run.sh proof xs --gpu_cost_per_hour 2.5
    python proof.py --only product,kernels

Each check prints a line; the exit code is 0 unless a check FAILED. Other flags, such as --fp8, are knobs of
train_gpt.py for the part `speed`. The parts:

    machine    driver, versions, power, memory, disk; names versions that do not work together
    product    a large matrix product and a large copy, compared with the maker's figures
    kernels    attention, loss, FP8 head, Newton-Schulz and block mask against float64
    compiled   gradients of compiled kernels against eager ones
    losses     eight steps of a small model against the CPU in float32
    processes  all GPUs against one, and their communication speed; on a CPU, two processes
    speed      the preset: tokens/s, MFU, memory, time of each part, and time and cost of the whole run

It writes experiments/DATE_TIME_proof with a table to paste, all figures as JSON, and the libraries' output.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchtop import host
from benchtop.apart import FAILED, OK, SKIPPED, WARNING, Finding, exit_code, findings_of, run_parts, teller
from benchtop.command_line import Parser, command, counted, figure
from benchtop.compiled_check import compare_compiled, own_compilations
from benchtop.errors import UserError, first_line
from benchtop.files import write_json, write_text
from benchtop.fitness import Proof, machine, product, short_name
from benchtop.folder import new_folder
from benchtop.identity import facts_about_session
from benchtop.knobs import parse_config
from benchtop.machine import Kernels, World, choose_device, choose_dtype, choose_kernels
from benchtop.measure import relative_error, seconds_of
from benchtop.processes import places_by_torchrun
from benchtop.speed import with_speed
from benchtop.synthetic import SyntheticRun, zipf_tokens
from benchtop.throughput import speed
from benchtop.warm_up import make_model
from train_gpt import (
    EXPERIMENT,
    GPT,
    Config,
    Context,
    Model,
    dense_mask,
    fp8_problem,
    newton_schulz,
    soft_cap,
    token_losses,
)

SILENCE, SECONDS = 120, 300         # seconds of silence that count as hanging; seconds for all parts
# relative error in norm against float64: a few roundings to the dtype; FP8 has 3 or 2 mantissa bits
BOUNDS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2, torch.float8_e4m3fn: 0.15}
LOSS_BOUNDS = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 1e-2}
# a small model; at learning rates this low, a few steps do not amplify rounding differences of kernels
SMALL = dict(num_layers=3, num_heads=2, model_dim=128, seq_len=256, batch_tokens=1024, num_steps=8,
             vocab_size=1000, micro_batch_tokens=512, log_every=1,
             muon_lr=0.01, embed_lr=0.01, head_lr=0.002, scalar_lr=0.01)
VOCABULARY = {"demo": 4097, "five-minutes": 8192}       # size by preset; all others use GPT-2's
END = 99        # token that begins a document in the checks of kernels


def small(proof: Proof, **knobs) -> Config:
    """A small Config for this machine."""
    return Config(**SMALL | {"device": proof.cfg.device, "dtype": proof.cfg.dtype} | knobs)


def within(check: str, errors: dict[str, float], bound: float, says: str) -> Finding:
    """A finding about relative errors, FAILED if one of them exceeds the bound or is NaN."""
    wrong = [name for name, error in errors.items() if not error <= bound]
    figures = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return Finding(check, f"{says}: {figures} (bound {bound:.0e})", FAILED if wrong else OK,
                   {"errors": errors, "bound": bound})


# ------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------

def kernels(proof: Proof) -> Iterator[Finding]:
    chosen = proof.kernels
    says = (f"compile {'on' if chosen.compiled else 'off'}: {chosen.compile_reason}; attention by "
            f"{chosen.attention}")
    plain = proof.on_cuda and (not chosen.compiled or chosen.flex is None)
    yield Finding("chosen", says, WARNING if plain else OK, dataclasses.asdict(chosen))
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
            proof.world.synchronize()       # raises if the device is no longer usable in this process


def context_of(proof: Proof, cfg: Config, inputs: Tensor, flex: dict | None) -> Context:
    """The Context of the first layer."""
    model = GPT(cfg, cfg.vocab_size - 1, proof.dtype, flex).to(inputs.device)
    return model.contexts(inputs)[0]


def rows_of_documents(rows: int, length: int) -> Tensor:
    """(B, T) token ids on the CPU, in documents of about 90 tokens; the first row is one document."""
    tokens = torch.from_numpy(zipf_tokens(rows * length, END + 1, END, 90).astype("int64"))
    tokens = tokens.view(rows, length)
    tokens[0][tokens[0] == END] = 0
    tokens[:, 0] = END
    return tokens


def attend(ctx: Context, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return ctx.attend(q, k, v, scale)


def attention(proof: Proof, length: int, window: int, width: int) -> Finding:
    """Check attention as a run computes it, and that a query's gradient reaches exactly what it sees."""
    rows, heads = 4, 2
    window, scale = min(window, length), proof.cfg.attention_cap / width
    cfg = small(proof, model_dim=heads * width, num_heads=heads, seq_len=length, batch_tokens=rows * length,
                      micro_batch_tokens=0, vocab_size=100, num_layers=2, long_window=window,
                      short_window=window)
    inputs = rows_of_documents(rows, length)
    ctx = context_of(proof, cfg, inputs.to(proof.device), proof.kernels.flex)
    work = torch.compile(attend, dynamic=False) if proof.kernels.compiled else attend
    draw = torch.Generator().manual_seed(0)
    q, k, v, weight = (torch.randn(rows, length, heads, width, generator=draw).to(proof.dtype)
                       for _ in range(4))
    q, k = (F.rms_norm(t, (width,)) for t in (q, k))
    here = [t.to(proof.device).requires_grad_() for t in (q, k, v)]
    y = work(ctx, *here, scale)
    found = [y, *torch.autograd.grad(y, here, weight.to(proof.device))]
    docs = (inputs == END).cumsum(1, dtype=torch.int32)
    seen = dense_mask(docs, torch.tensor(window, dtype=torch.int32))                        # (B, T, T)
    errors = {name: relative_error(*pair) for name, pair in zip(
        ("y", "dq", "dk", "dv"), zip(found, exact_attention(q, k, v, seen, scale, weight), strict=True),
        strict=True)}
    one = torch.zeros_like(weight)          # a gradient for one query per row
    queries = [length - 1 - 40 * row for row in range(rows)]
    for row, query in enumerate(queries):
        one[row, query] = 1
    reached, = torch.autograd.grad(work(ctx, *here, scale), here[2], one.to(proof.device))
    reached = reached.cpu().ne(0).any(-1)                                                   # (B, T, H)
    leaks = sum(int((reached[row] != seen[row, query, :, None]).sum()) for row, query in enumerate(queries))
    finding = within("attention", errors, BOUNDS[proof.dtype], f"{length} x {width}, window {window}")
    if not leaks:
        return finding
    return dataclasses.replace(finding, says=f"{finding.says}; {leaks} keys masked wrongly", status=FAILED)


def exact_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, weight: Tensor,
                    ) -> list[Tensor]:
    """Output and gradients of plain softmax attention in float64; q, k, v and weight (B, T, H, K)."""
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    queries, keys, values = (leaf.transpose(1, 2) for leaf in leaves)                       # (B, H, T, K)
    z = (queries @ keys.mT) * scale                                                         # (B, H, T, T)
    y = z.masked_fill(~seen[:, None], -math.inf).softmax(-1) @ values                       # (B, H, T, K)
    y = y.transpose(1, 2)                                                                   # (B, T, H, K)
    return [y, *torch.autograd.grad(y, leaves, weight.double())]


class HeadAlone(Model):
    """The head and the loss of any model, on given hidden states (N, D)."""

    def __init__(self, cfg: Config, states: Tensor, head: Tensor):
        super().__init__(cfg, cfg.vocab_size - 1, states.dtype)
        self.states, self.head, self.layers = states, nn.Parameter(head), nn.ModuleList()

    def hidden(self, inputs: Tensor) -> Tensor:
        return self.states[None]                                                            # (1, N, D)


def loss(proof: Proof, fp8: bool = False, tokens: int = 992, vocab_size: int = 4097) -> Finding:
    """Check the head's loss and its gradients: in chunks, with a padded vocabulary and targets of -1."""
    name, width = "loss FP8" if fp8 else "loss", 256
    problem = fp8 and (fp8_problem(proof.device, proof.dtype) or (proof.on_cpu and "is for GPUs"))
    if problem:
        return Finding(name, f"the FP8 head {problem}", SKIPPED)
    cfg = small(proof, vocab_size=vocab_size, logit_cap=proof.cfg.logit_cap, fp8=fp8)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=draw).to(proof.dtype)
    head = 0.1 * torch.randn(cfg.padded_vocab_size, width, generator=draw)
    targets = torch.randint(-1, cfg.vocab_size, (tokens,), generator=draw)
    targets[::50] = -1
    model = HeadAlone(cfg, x.to(proof.device).requires_grad_(), head.to(proof.device))
    if proof.kernels.compiled:
        model.compile_parts()
    here = targets[None].to(proof.device)
    total = model(here, here)
    found = [total, *torch.autograd.grad(total, (model.states, model.head))]
    leaves = [x.double().requires_grad_(), head.to(proof.dtype).double().requires_grad_()]
    z = soft_cap(leaves[0] @ leaves[1][:cfg.vocab_size].T, cfg.logit_cap)                   # (N, V)
    exact = token_losses(z, targets, cfg).sum()
    wanted = [exact, *torch.autograd.grad(exact, leaves)]
    errors = dict(zip(("loss", "dx", "dW"), map(relative_error, found, wanted), strict=True))
    bound = BOUNDS[torch.float8_e4m3fn if fp8 else proof.dtype]
    return within(name, errors, bound, f"{tokens} tokens, {cfg.vocab_size:,} columns, cap {cfg.logit_cap:g}")


def orthogonal(proof: Proof) -> Finding:
    """Check Newton-Schulz in the dtype of the optimizer's products."""
    dtype = torch.bfloat16 if proof.dtype == torch.bfloat16 else torch.float32
    G = torch.randn(4, 256, 1024, generator=torch.Generator().manual_seed(0))
    found = newton_schulz(G.to(proof.device), dtype=dtype).float().cpu()
    squares = torch.linalg.eigvalsh(found.double() @ found.double().mT)     # squared singular values
    low, high = float(squares.min()) ** 0.5, float(squares.max()) ** 0.5
    error = relative_error(found, newton_schulz(G.double(), dtype=torch.float64))
    finding = within("newton", {"X": error}, BOUNDS[dtype],
                     f"{short_name(dtype)}, singular values {low:.2f} to {high:.2f}")
    return finding if 0.6 < low <= high < 1.3 else dataclasses.replace(finding, status=FAILED)


def blocks(proof: Proof) -> Finding:
    """Check the block mask made on the device against the mask of all token pairs, made on the CPU."""
    rows, length, wrong = 6, 1000, 0
    inputs = rows_of_documents(rows, length)
    docs = (inputs == END).cumsum(1, dtype=torch.int32)
    for window in (100, 300, length):
        cfg = small(proof, seq_len=length, batch_tokens=length, micro_batch_tokens=0, vocab_size=100,
                          num_layers=2, long_window=window, short_window=window)
        mask = context_of(proof, cfg, inputs.to(proof.device), proof.kernels.flex or {}).blocks
        wrong += wrong_blocks(mask, dense_mask(docs, torch.tensor(window, dtype=torch.int32)))
    says = f"{rows} rows of {length} tokens, 3 windows: {wrong or 'no'} blocks differ from the mask"
    return Finding("blocks", says, FAILED if wrong else OK, {"wrong": wrong})


def wrong_blocks(mask, seen: Tensor) -> int:
    """Number of wrong blocks in the lists of keys and of queries: skipped although some pair is seen, taken
    as a whole although some pair is not, or in both lists; seen (B, T, T) bool."""
    size = mask.BLOCK_SIZE[0]
    pad = -seen.size(1) % size
    some = F.pad(seen, (0, pad, 0, pad))
    every = F.pad(seen, (0, pad, 0, pad), value=True)
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
    """A BlockMask's counts (B, 1, J) and indices (B, 1, J, J) as a (B, J, J) bool."""
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
    yield Finding("compiled", f"compiled gradients differ from eager ones by {found}",
                  OK if found.agrees else FAILED, dataclasses.asdict(found))


def losses_of_steps(cfg: Config, world: World, chosen: Kernels) -> list[float]:
    """The train_loss of each step of a small model."""
    model, optimizer = make_model(EXPERIMENT, cfg, cfg.vocab_size - 1, world, chosen)
    run = SyntheticRun(EXPERIMENT, cfg, world, model, optimizer, chosen.compiled, mean=90)
    EXPERIMENT.train(run)
    return [row["train_loss"] for row in run.rows]


def same_losses(check: str, found: list[float], wanted: list[float], bound: float, says: str) -> Finding:
    errors = [abs(a / b - 1) for a, b in zip(found, wanted, strict=True)]
    error = math.nan if any(map(math.isnan, errors)) else max(errors)
    shown = f"{says} {wanted[0]:.4f} to {wanted[-1]:.4f}, relative error {error:.1e} (bound {bound:.0e})"
    return Finding(check, shown, OK if error <= bound else FAILED,
                   {"losses": found, "wanted": wanted, "error": error, "bound": bound})


def losses(proof: Proof) -> Iterator[Finding]:
    plain = small(proof, device="cpu", dtype="float32", compile="off")
    world, chosen = World(plain), proof.kernels
    wanted = losses_of_steps(plain, world, choose_kernels(plain, world))
    with own_compilations():
        found = losses_of_steps(small(proof), proof.world, chosen)
    yield same_losses("losses", found, wanted, LOSS_BOUNDS[proof.dtype],
                      f"{counted(len(wanted), 'step')} here and on the CPU in float32:")


def processes(proof: Proof) -> Iterator[Finding]:
    """Check that all devices together reach the losses of one, and time their communication."""
    size = torch.cuda.device_count() if proof.on_cuda else min(2, host.available_cores()) * proof.on_cpu
    if size < 2:
        yield Finding("processes", "there is one device", SKIPPED)
        return
    cfg = together_config(proof, size)
    world = World(cfg)
    wanted = losses_of_steps(cfg, world, choose_kernels(cfg, world))
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}",
             __file__, *sys.argv[1:], "--together", str(answer)],
            capture_output=True, text=True, errors="replace", timeout=SILENCE - 10)
        print(done.stdout, done.stderr, file=sys.stderr)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or ["no message"]
            yield Finding("processes", f"{size} processes failed: {lines[-1][:150]}", FAILED)
            return
        told = json.loads(answer.read_text(encoding="utf-8"))
    bound = 1e-4 if told["dtype"] == "float32" else 1e-2
    yield same_losses("processes", told["losses"], wanted, bound, f"{size} processes against one:")
    rate = told["gb_per_second"]
    yield Finding("exchange", f"{figure(rate)} GB/s, the sum of 256 MiB over {size} processes",
                  values={"gb_per_second": rate})


def together_knobs(on_cuda: bool) -> dict:
    """The knobs of the World in which all processes do some steps together; in float32 on a CPU."""
    return {"timeout_seconds": 60} | ({} if on_cuda else {"dtype": "float32"})


def together_config(proof: Proof, size: int) -> Config:
    """The Config of the steps that all processes do together."""
    return small(proof, compile="off", batch_tokens=256 * max(4, size), micro_batch_tokens=256, num_steps=5,
                 **together_knobs(proof.on_cuda))


def together(proof: Proof, answer: Path) -> None:
    """What each process started by `processes` with torchrun does."""
    world, cfg = proof.world, together_config(proof, proof.world.size)
    found = losses_of_steps(cfg, world, choose_kernels(cfg, world))
    numbers = torch.ones(2**26, device=world.device)
    seconds = seconds_of(lambda: world.sum(numbers), world)
    moved = 2 * (world.size - 1) / world.size * 4 * numbers.numel()     # bytes per process and direction
    if world.is_main:
        write_json(answer, {"losses": found, "gb_per_second": moved / seconds / 1e9,
                            "dtype": short_name(world.dtype)})


PARTS = {part.__name__: part for part in (machine, product, kernels, compiled, losses, processes, speed)}


# ------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------

@command
def main() -> None:
    parser = Parser("Check that this machine is fit for training, and measure its speed.",
                    epilog="Any other flag is a knob of train_gpt.py for the part speed, such as --fp8.")
    parser.add_argument("--preset", default="", help="preset to measure; empty: gpt2-small, or demo on a CPU")
    parser.add_argument("--only", default=",".join(PARTS), metavar="PART,PART", help="parts to run")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit for all parts together")
    for flag in ("--parts", "--tell", "--together"):        # for the processes that this script starts
        parser.add_argument(flag, default="", help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    cfg = config_of(args.preset, rest)
    names = [name.strip() for name in (args.parts or args.only).split(",")]
    unknown = next((name for name in names if name not in PARTS), None)
    if unknown is not None:
        raise UserError(f"there is no part {unknown!r}; the parts are {', '.join(PARTS)}")
    if args.together:
        on_cuda = choose_device(cfg, 0, 1).type == "cuda"
        proof = proof_here(dataclasses.replace(cfg, **together_knobs(on_cuda)))
        together(proof, Path(args.together))
        proof.world.close()
    elif args.tell:
        proof = proof_here(cfg)
        parts = {name: functools.partial(PARTS[name], proof) for name in names}
        run_parts(parts, teller(int(args.tell)), proof.world.synchronize)
    else:
        if not args.seconds > 0:
            raise UserError(f"--seconds must be above 0; it is {args.seconds:g}")
        sys.exit(show(cfg, names, args.seconds))


def config_of(preset: str, flags: list[str]) -> Config:
    """The preset's Config, with the size of the vocabulary that it would have."""
    gpu = torch.cuda.is_available() and not {"--device=cpu", "cpu"}.intersection(flags)
    preset = preset or ("gpt2-small" if gpu else "demo")
    cfg = parse_config(["--preset", preset, *flags], Config)
    return dataclasses.replace(cfg, vocab_size=cfg.vocab_size or VOCABULARY.get(preset, 50257))


def proof_here(cfg: Config) -> Proof:
    """What the parts share; the budget is that of a run with enough text."""
    world = World(cfg)
    cfg.require_machine(world.device, world.dtype)
    return Proof(EXPERIMENT, with_speed(cfg, world).with_budget(10**12), world)


def require_possible(cfg: Config) -> None:
    """raises  UserError if the knobs need what this machine lacks, or torchrun started this script"""
    if places_by_torchrun()[1] > 1:
        raise UserError("start proof.py without torchrun; it starts processes by itself")
    device = choose_device(cfg, 0, 1)
    if device.type != "cuda":       # asking a GPU takes some of its memory, so the child process asks
        cfg.require_machine(device, choose_dtype(cfg, device)[0])


def show(cfg: Config, names: list[str], seconds: float) -> int:
    """Print each finding as it comes and write all of them to a folder; returns the exit code."""
    require_possible(cfg)
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
        "config": dataclasses.asdict(cfg), **identity(cfg)})
    failed = [finding.check for finding in findings if finding.status == FAILED]
    verdict = f"not fit: {', '.join(failed)} failed" if failed else "fit"
    print(f"\n{table}\nthis machine is {verdict}; {took:.0f} s; {os.path.relpath(folder)}")
    return code


def identity(cfg: Config) -> dict:
    """Code and machine, as in a run's summary; the error if they cannot be read, as on a broken device."""
    try:
        return facts_about_session(Path(__file__), World(cfg))
    except Exception as error:
        return {"identity_error": f"{type(error).__name__}: {first_line(error)}"}


def as_table(findings: list[Finding]) -> str:
    """A Markdown table to paste."""
    lines = [f"| {finding.check} | {finding.says.replace('|', '/')} | {finding.status} |"
             for finding in findings]
    return "\n".join(["| check | found | |", "|---|---|---|", *lines]) + "\n"


if __name__ == "__main__":
    main()
