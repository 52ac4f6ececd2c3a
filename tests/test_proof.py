"""./run.sh proof: each check passes here and finds what is broken, and each stands apart from the others.

Run: ./run.sh test tests/test_proof.py
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launch import copy_scripts, run
from tiny_runs import train_here
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

import benchtop.speed
import proof
import train_gpt
from benchtop import apart, compiled_check, fitness, gpus, measure, places, throughput
from benchtop import run as bench_run
from benchtop.apart import FAILED, OK, SKIPPED, WARNING, Finding
from benchtop.command_line import figure
from benchtop.errors import UserError
from benchtop.fitness import Proof
from benchtop.machine import MIX_ORDER, Kernels, World
from train_gpt import EXPERIMENT, GPT, Config, Context

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--device", "cpu", "--dtype", "float32", "--compile", "off", "--num_layers", "2", "--model_dim", "32",
        "--num_heads", "2", "--seq_len", "64", "--batch_tokens", "256"]
LONG = SimpleNamespace(train_minutes=0, num_steps=10**9, batch_tokens=256, peak_tflops=0)


class OnCuda(Proof):
    """A machine that takes every branch that is for a CUDA device, and computes on the CPU."""
    on_cuda, on_cpu = True, False


def proof_of(*flags: str, kind: type[Proof] = Proof) -> Proof:
    cfg = proof.config_of("demo", [*TINY, *flags])
    return kind(EXPERIMENT, cfg.with_budget(10**12), World(cfg))


def status_of(findings) -> list[str]:
    return [finding.status for finding in findings]


# ------------------------------------------------------------------------------------------------
# Parts stand apart
# ------------------------------------------------------------------------------------------------

PARTS = """
import os, sys, time
sys.path.insert(0, {root!r})
from benchtop.apart import Finding, run_parts, teller

def good(): yield Finding("good", "found", values={{"figure": 7}})
def bad():
    yield Finding("bad", "half of it")
    raise ValueError("what went wrong\\nand where")
def dies(): os.abort(); yield
def hangs(): time.sleep(600); yield
def breaks_the_device(): raise RuntimeError("device-side assert"); yield

parts = dict(good=good, bad=bad, dies=dies, hangs=hangs, breaks=breaks_the_device, last=good)
names = sys.argv[sys.argv.index("--parts") + 1].split(",")
def still_works():
    if names[0] == "breaks":
        raise RuntimeError("the device is lost")
print("said by a library")
tell = teller(int(sys.argv[sys.argv.index("--tell") + 1]))
run_parts({{name: parts[name] for name in names}}, tell, still_works)
"""


@pytest.fixture
def script(tmp_path) -> list[str]:
    (tmp_path / "parts.py").write_text(PARTS.format(root=str(ROOT)))
    return [sys.executable, str(tmp_path / "parts.py")]


def test_parts_that_fail_crash_or_break_the_device_leave_the_others(script, tmp_path):
    names = ["good", "bad", "dies", "breaks", "last"]
    found = list(apart.findings_of(script, names, tmp_path / "out", 60, 60))
    assert [(one.check, one.status) for one in found] == [
        ("good", OK), ("bad", OK), ("bad", FAILED), ("dies", FAILED), ("breaks", FAILED), ("good", OK)]
    assert found[0].values == {"figure": 7}
    assert found[2].says == "ValueError: what went wrong" and "SIGABRT" in found[3].says
    said = (tmp_path / "out").read_text()
    assert "said by a library" in said and "what went wrong\nand where" in said


def test_a_part_that_hangs_is_ended(script, tmp_path):
    found = list(apart.findings_of(script, ["hangs", "good"], tmp_path / "out", 2, 60))
    assert status_of(found) == [FAILED, OK] and "hangs: no message from it for 2 s" in found[0].says


def test_parts_for_which_no_time_is_left_are_skipped(script, tmp_path):
    found = list(apart.findings_of(script, ["hangs", "good"], tmp_path / "out", 60, 2))
    assert [(one.check, one.status) for one in found] == [("good", SKIPPED), ("hangs", FAILED)]


def test_a_child_that_cannot_start_is_said(tmp_path):
    found, = apart.findings_of([sys.executable, "-c", "raise SystemExit('no torch')"], ["good"],
                               tmp_path / "out", 60, 60)
    assert found.status == FAILED and "exit code 1" in found.says and "no torch" in found.says


def test_only_what_failed_counts_for_the_exit_code():
    def code(*statuses: str) -> int:
        return apart.exit_code([Finding("x", "", status) for status in statuses])
    assert code(OK, WARNING, SKIPPED) == 0
    assert code(OK, FAILED, OK) == 1
    assert code() == 1


def test_a_long_line_is_wrapped_and_its_status_stands_where_others_do():
    short, long = (str(Finding("check", says)).splitlines() for says in ("says", "much to say " * 20))
    assert len(short) == 1 and len(long) > 1
    assert short[0].index(" ok") == long[-1].index(" ok") == 12 + apart.WIDTH


# ------------------------------------------------------------------------------------------------
# The machine
# ------------------------------------------------------------------------------------------------

SMI = "NVIDIA H100 80GB HBM3, {driver}, {power}, 1755, 1980, 2619, 2619, 700.00, {heat}, {used}, 81559\n"
GOOD = dict(driver="580.95.05", power="700.00", heat=41, used=5)


@pytest.fixture
def smi(monkeypatch):
    """nvidia-smi that says this, or does this."""
    def smi(says: str = "", code: int = 0, error: Exception | None = None) -> None:
        def ask(*_, **options):
            assert options["timeout"]
            if error:
                raise error
            return subprocess.CompletedProcess([], code, says, "")
        monkeypatch.setattr(gpus, "subprocess", SimpleNamespace(
            run=ask, TimeoutExpired=subprocess.TimeoutExpired))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
    return smi


@pytest.mark.parametrize(("change", "word"), [
    ({}, ""), ({"driver": "570.133.20"}, "older than 580, which CUDA 13.0 needs"),
    ({"power": "350.00"}, "limited to 350 W of 700"), ({"heat": 92}, "hot"),
    ({"used": 40000}, "40,000 MiB of its memory"), ({"power": "[N/A]", "heat": "[N/A]"}, "")])
def test_a_card_that_is_held_back_is_named(change, word, smi):
    smi(2 * SMI.format(**GOOD | change))
    found = list(fitness.cards())
    assert [one.check for one in found] == ["driver", "GPU 0", "GPU 1"]
    assert (WARNING in status_of(found)) == bool(word)
    assert word in " ".join(one.says for one in found)


@pytest.mark.parametrize(("how", "word"), [
    (dict(error=FileNotFoundError()), "not installed"), (dict(says="No devices", code=6), "No devices"),
    (dict(error=subprocess.TimeoutExpired("nvidia-smi", 20)), "did not answer"), (dict(says="?"), "says: ?")])
def test_nvidia_smi_may_be_absent_slow_or_broken(how, word, smi):
    smi(**how)
    found, = fitness.cards()
    assert found.status == WARNING and word in found.says


def test_torch_2_10_is_known_to_compile_wrong_gradients(monkeypatch):
    """Its compiler reads the setting when it is imported."""
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu128")
    monkeypatch.setenv(MIX_ORDER, "1")
    World(Config(device="cpu"))     # the user's setting wins
    assert fitness.versions().status == FAILED
    monkeypatch.delenv(MIX_ORDER)
    World(Config(device="cpu"))
    found = fitness.versions()
    assert found.status == WARNING and "wrong gradients" in found.says
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    assert fitness.versions().status == OK


def test_the_setting_for_torch_2_10_is_one_that_its_compiler_reads():
    config = Path(torch.__file__).parent / "_inductor" / "config.py"
    assert MIX_ORDER in config.read_text(encoding="utf-8")


def test_a_product_far_below_the_table_is_warned_of():
    for peak, status in ((1000, WARNING), (101, OK)):
        assert fitness.beside_the_table(proof_of("--peak_tflops", str(peak)), found=100.0).status == status
    assert fitness.beside_the_table(proof_of(), found=100.0).status == OK


# ------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------

def test_all_kernels_pass_here():
    found = list(proof.kernels(proof_of()))
    assert status_of(found) == [OK] * 5 + [SKIPPED] + [OK] * 2, found
    assert [one.check for one in found] == ["chosen", *["attention"] * 3, "loss", "loss FP8", "newton",
                                            "blocks"]


def attention_by(monkeypatch, change) -> Finding:
    """What the check finds of an attention whose mask and scale are changed."""
    def attend(ctx, q, k, v, scale):
        seen, scale = change(ctx.mask(), scale)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        y = ((q @ k.mT) * scale).masked_fill(~seen, -math.inf).softmax(-1) @ v
        return y.transpose(1, 2)
    monkeypatch.setattr(Context, "attend", attend)
    return proof.attention(proof_of(), 300, 100, 16)


def test_attention_with_one_key_too_many_or_another_scale_is_found(monkeypatch):
    assert attention_by(monkeypatch, lambda seen, scale: (seen, scale)).status == OK
    assert attention_by(monkeypatch, lambda seen, scale: (seen, 1.001 * scale)).status == FAILED
    wider = attention_by(monkeypatch, lambda seen, scale: (seen | seen.roll(-1, -1).tril(), scale))
    assert wider.status == FAILED and "keys masked wrongly" in wider.says


def test_a_loss_with_a_wrong_gradient_is_found(monkeypatch):
    def kernel(logits, targets, cfg):
        losses, gradient = train_gpt.losses_and_gradient(logits, targets, cfg)
        return losses, 1.01 * gradient
    assert proof.loss(proof_of()).status == OK
    monkeypatch.setattr(train_gpt, "choose_loss_kernel", lambda cfg: kernel)
    found = proof.loss(proof_of())
    assert found.status == FAILED and found.values["errors"]["loss"] < 1e-4


def test_the_fp8_head_is_checked_where_there_is_one():
    there = proof_of("--dtype", "bfloat16", kind=OnCuda)
    if train_gpt.fp8_problem(there.device, there.dtype):
        pytest.skip("this CPU has no FP8 products")
    assert proof.loss(there, fp8=True, tokens=96, vocab_size=257).status == OK


def test_newton_schulz_that_differs_from_float64_is_found(monkeypatch):
    assert proof.orthogonal(proof_of()).status == OK
    exact = train_gpt.newton_schulz
    for wrong in (lambda G, steps=5, dtype=torch.float32: exact(G, steps - (dtype != torch.float64), dtype),
                  lambda G, steps=5, dtype=torch.float32: 1.5 * exact(G, steps, dtype)):
        monkeypatch.setattr(proof, "newton_schulz", wrong)
        assert proof.orthogonal(proof_of()).status == FAILED


def test_a_block_mask_that_skips_or_trusts_too_much_is_found(monkeypatch):
    assert proof.blocks(proof_of()).status == OK

    def skips(docs, window):
        seen, whole = train_gpt.seen_blocks(docs, window)
        return seen & torch.eye(seen.size(-1), dtype=torch.bool), whole

    def trusts(docs, window):
        seen, _ = train_gpt.seen_blocks(docs, window)
        return seen, seen
    for wrong in (skips, trusts):
        monkeypatch.setattr(train_gpt, "choose_blocks", lambda wrong=wrong: wrong)
        assert proof.blocks(proof_of()).status == FAILED


def test_a_kernel_that_raises_leaves_the_other_checks(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of registers\nand more")
    monkeypatch.setattr(proof, "newton_schulz", broken)
    found = {one.check: one for one in proof.kernels(proof_of())}
    assert found["orthogonal"].status == FAILED
    assert found["orthogonal"].says == "RuntimeError: out of registers"
    assert found["blocks"].status == OK


# ------------------------------------------------------------------------------------------------
# Compiled equals eager
# ------------------------------------------------------------------------------------------------

class Faithful(GPT):
    """What is compiled computes what it did."""
    def compile_parts(self) -> None:
        pass


class Unfaithful(GPT):
    """The compiled norm has a gradient of its own."""
    def compile_parts(self) -> None:
        self.norm_kernel = lambda x: train_gpt.rms_norm(x) + 0.1 * (x - x.detach())


COMPILED = Kernels(True, "a tiny function compiled", None, "plain products")


def test_a_compiled_function_that_differs_is_found_and_named():
    bench = proof_of()
    good, bad = (compiled_check.compare_compiled(dataclasses.replace(EXPERIMENT, Model=model), bench.cfg,
                                                 bench.world, COMPILED) for model in (Faithful, Unfaithful))
    assert good.agrees and good.error == 0
    assert not bad.agrees and bad.parameter in dict(GPT(bench.cfg, 0).named_parameters())


def test_the_worst_parameter_is_named_and_rounding_is_allowed_for():
    draw = torch.Generator().manual_seed(0)
    exact = {name: torch.randn(size, generator=draw) for name, size in (("a", 100), ("b", 100), ("few", 2))}
    eager = {name: 1.01 * gradient for name, gradient in exact.items()}

    def worst(**factors: float) -> compiled_check.Comparison:
        found = {name: factors.get(name, 1.0) * gradient for name, gradient in exact.items()}
        return compiled_check.worst(found, eager, exact, 1e-3)
    assert worst(a=1.03).agrees and worst(a=1.03).parameter == "a"
    assert not worst(b=1.05).agrees and worst(b=1.05).parameter == "b"
    assert not worst(a=1.05, b=math.nan).agrees and worst(a=1.05, b=math.nan).parameter == "b"
    assert not worst(few=0.9).agrees


@pytest.mark.parametrize(("agrees", "compiled"), [(True, True), (False, False), (None, False)])
def test_a_long_run_goes_on_eagerly_where_gradients_differ(agrees, compiled):
    def compare(*_) -> compiled_check.Comparison:
        if agrees is None:
            raise RuntimeError("no kernel image")
        return compiled_check.Comparison("layers.0.qkv", 0.01 if agrees else 0.2, 0.03)
    bench = proof_of()
    kernels = dataclasses.replace(COMPILED, flex={}, attention="FlexAttention")
    long, short = (dataclasses.replace(bench.cfg, num_steps=steps, train_minutes=0.0) for steps in (10**9, 1))
    chosen = compiled_check.trusted_kernels(EXPERIMENT, long, bench.world, kernels, compare)
    assert chosen.compiled == compiled and (chosen.flex is not None) == compiled
    assert re.search("no kernel image" if agrees is None else "layers.0.qkv", chosen.compile_reason)
    assert compiled_check.trusted_kernels(EXPERIMENT, short, bench.world, kernels, compare) == kernels
    eager = dataclasses.replace(kernels, compiled=False)
    assert compiled_check.trusted_kernels(EXPERIMENT, long, bench.world, eager, compare) == eager


def test_a_run_says_that_it_goes_on_eagerly(here, monkeypatch):
    """Where compiled gradients are wrong, the run's log says so in one line, and nothing is compiled."""
    monkeypatch.setattr(compiled_check, "LONG_RUN_SECONDS", 0)
    monkeypatch.setattr(bench_run, "choose_kernels", lambda *_: COMPILED)
    experiment = dataclasses.replace(EXPERIMENT, Model=Unfaithful)
    folder = train_here(here, experiment, data="tiny", tokenizer="tiny")
    line, = (line for line in (folder / "training_log.txt").read_text().splitlines() if "compile " in line)
    assert re.match(r"compile +off: compiled gradients differ from eager ones by [\d.]+% \(\S+; round", line)


def test_losses_that_differ_are_found():
    found = list(proof.losses(proof_of()))
    assert status_of(found) == [OK] and found[0].values["wanted"][-1] < found[0].values["wanted"][0] - 0.1
    values = found[0].values["wanted"]
    for wrong in ([1.02 * loss for loss in values], [*values[:-1], math.nan]):
        assert proof.same_losses("losses", wrong, values, 1e-2, "").status == FAILED


# ------------------------------------------------------------------------------------------------
# What only a GPU does, on a CPU that pretends
# ------------------------------------------------------------------------------------------------

class Profile:
    """torch.profiler.profile with what a GPU leaves in it."""
    def __init__(self, activities, acc_events):
        assert activities == [torch.profiler.ProfilerActivity.CUDA] and acc_events

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def events(self) -> list[FunctionEvent]:
        def event(name, start, end, device=DeviceType.CUDA, **more):
            return FunctionEvent(0, name, 0, start, end, device_type=device, use_device="cuda", **more)
        return [event("triton_tem_fused_flex_attention_1", 0, 3000), event("nvjet_hsh_128", 3000, 8000),
                event("nvjet_hsh_128", 8000, 9000), event("cudaLaunchKernel", 0, 9, DeviceType.CPU),
                event("step", 0, 9000, is_user_annotation=True)]


def warn_as_torch_does(mode: str) -> None:
    """When the mode is set, of the mode itself; and here at once of a call that waits."""
    if mode == "warn":
        warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all "
                      "synchronizing operations", stacklevel=2)
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)


@pytest.fixture
def pretended(monkeypatch):
    for name, value in (("max_memory_reserved", lambda: 2**30), ("empty_cache", lambda: None),
                        ("mem_get_info", lambda: (2**33, 2**34)),
                        ("device_count", lambda: 8), ("get_device_capability", lambda *_: (9, 0)),
                        ("set_sync_debug_mode", warn_as_torch_does)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(fitness, "LARGE", 64)
    monkeypatch.setattr(fitness, "LOAD_SECONDS", 0.001)
    monkeypatch.setattr(throughput, "SECONDS_OF_STEPS", 0.1)
    return proof_of("--gpu_cost_per_hour", "2", "--num_steps", "600", "--peak_tflops", "1", kind=OnCuda)


def test_each_line_for_a_gpu_runs(pretended, smi):
    smi(SMI.format(**GOOD))
    parts = (proof.machine, proof.product, proof.speed)
    found = {one.check: one for part in parts for one in part(pretended)}
    assert {"driver", "GPU 0", "clocks", "FP8", "copy", "queue", "parts", "kernels"} <= set(found)
    assert found["FP8"].status in (OK, WARNING)      # some CPUs have such products
    assert "1,755 MHz of 1,980" in found["clocks"].says
    assert re.search(r"it waits in test_proof\.py:\d+$", found["queue"].says)
    assert found["queue"].status == WARNING
    assert "reserved 1,024" in found["peak memory"].says
    assert re.search(r"on 8 devices at a cost of \d+\.\d\d;", found["whole run"].says)
    assert re.match(r"3 in a step, .*: products 6 ms, attention 3 ms", found["kernels"].says)
    assert re.search(r"tokens/s, MFU [\d.]+%: ", found["speed"].says)
    json.dumps([dataclasses.asdict(one) for one in found.values()])


def test_figures_are_shown_without_exponents():
    assert list(map(figure, (0, 0.16349, 1.474, 22.16, 688.4, 1303.4, 4216.0))) == [
        "0", "0.163", "1.47", "22.2", "688", "1,303", "4,216"]


def test_a_figure_that_is_not_to_be_had_is_only_a_warning(pretended, monkeypatch):
    def denied(*_, **__):
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")
    monkeypatch.setattr(torch.profiler, "profile", denied)
    found = {one.check: one for one in proof.speed(pretended)}
    assert found["kernels"].status == WARNING and "INSUFFICIENT" in found["kernels"].says
    assert found["parts"].status == OK


def test_kernels_are_grouped_by_what_they_do():
    names = ["triton_tem_fused_flex_attention_backward_9", "sm90_xmma_gemm_bf16", "nvjet_tst_128x256",
             "embedding_backward_feature_kernel", "ncclDevKernel_Reduce", "Memcpy HtoD",
             "triton_red_fused_mul_3", "void at::native::vectorized_elementwise_kernel"]
    kinds = measure.by_kind(measure.added_up((name, 1.0) for name in names))
    assert {kind: count for kind, (count, _) in kinds.items()} == {
        "attention": 1, "products": 2, "embeddings": 1, "exchange": 1, "copies": 1, "compiled": 1, "other": 1}


def test_a_step_that_would_take_a_cpu_long_is_made_smaller(monkeypatch):
    monkeypatch.setattr(throughput, "product_flops", lambda *_: 1e6)
    bench = proof_of()
    smaller, note = throughput.within_reach(bench)
    assert smaller.cfg.batch_tokens == 64 and "64 tokens, since 256" in note
    assert throughput.within_reach(OnCuda(EXPERIMENT, bench.cfg, bench.world))[1] == ""


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------

def test_proof_says_that_this_machine_is_fit_and_leaves_table_and_figures(tmp_path):
    copy_scripts(tmp_path)
    done = run(tmp_path, "proof.py", *TINY, "--preset", "demo", "--only", "machine,compiled,processes,speed",
               "--num_steps", "100", env=os.environ | {"OMP_NUM_THREADS": "1"})
    folder, = (tmp_path / "experiments").iterdir()
    assert folder.name.endswith("_proof") and "this machine is fit" in done.stdout
    content = json.loads((folder / "proof.json").read_text())
    status = {one["check"]: one["status"] for one in content["findings"]}
    assert content["status"] == "fit" and set(status.values()) <= {OK, SKIPPED, WARNING}, done.stdout
    assert status["compiled"] == SKIPPED and status["processes"] == status["speed"] == OK
    assert content["bench_sha256"] and "train_gpt.py" in content["sources"] and content["code_sha256"]
    table = (folder / "proof.md").read_text()
    assert table in done.stdout and len(table.splitlines()) == 2 + len(content["findings"])


def test_a_preset_whose_size_the_speed_decides_is_measured_first(tmp_path, monkeypatch):
    copy_scripts(tmp_path)
    done = run(tmp_path, "proof.py", "--preset", "five-minutes", "--device", "cpu", "--only", "machine")
    assert "this machine is fit" in done.stdout
    cfg = proof.config_of("five-minutes", ["--device", "cpu"])
    assert (cfg.num_layers, cfg.vocab_size) == (0, 8192)
    monkeypatch.setattr(benchtop.speed, "product_tflops", lambda world: 0.27)
    sized = proof.proof_here(cfg).cfg
    assert (sized.num_layers, sized.model_dim, sized.batch_tokens) == (2, 128, 16_384)


def test_run_sh_takes_a_preset_and_flags(tmp_path):
    """With a Python that only says what it is asked for."""
    for name in ("run.sh", "requirements.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    ready = subprocess.run(["cksum", "requirements.txt"], cwd=tmp_path, capture_output=True, text=True)
    (tmp_path / ".venv" / "ready").write_text(ready.stdout)
    for words, asked in (([], ""), (["xs"], " --preset xs"), (["xs", "--fp8"], " --preset xs --fp8"),
                         (["--only", "product"], " --only product")):
        done = subprocess.run(["bash", "run.sh", "proof", *words], cwd=tmp_path, capture_output=True,
                              text=True)
        assert done.stdout == f"proof.py{asked}\n", done.stderr


def test_an_unfit_machine_is_told_by_the_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(proof, "findings_of",
                        lambda *_: iter([Finding("product", "fine"), Finding("loss", "wrong", FAILED)]))
    monkeypatch.setattr(proof, "new_folder", lambda name: tmp_path)
    assert proof.show(proof_of().cfg, ["product"], 1) == 1
    assert "not fit: loss failed" in capsys.readouterr().out
    assert json.loads((tmp_path / "proof.json").read_text())["status"] == "unfit"


def test_an_unknown_part_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["proof.py", "--only", "prodct", *TINY])
    with pytest.raises(SystemExit, match="there is no part 'prodct'"):
        proof.main()


def test_knobs_of_the_experiment_are_for_the_speed():
    cfg = proof.config_of("gpt2-small", ["--micro_batch_tokens", "8192", "--device", "cpu"])
    assert (cfg.preset, cfg.micro_batch_tokens, cfg.vocab_size) == ("gpt2-small", 8192, 50257)
    with pytest.raises(UserError, match="one of"):
        proof.config_of("huge", [])


@pytest.mark.parametrize(("flags", "complaint"), [
    (["--device", "mps"], "--device mps needs an Apple GPU that torch can use"),
    (["--device", "xpu"], "--device xpu needs an Intel GPU"), (["--bogus"], "there is no flag --bogus"),
    (["--device", "cpu", "--dtype", "float32", "--fp8"], "--fp8 needs --dtype bfloat16"),
    (["--only", "machin"], "there is no part 'machin'"), (["--seconds", "0"], "--seconds must be above 0"),
    (["--seconds", "nan"], "--seconds must be above 0"), (["--preset", "nope"], "--preset must be one of")])
def test_what_this_machine_cannot_do_is_said_before_a_folder_is_made(tmp_path, monkeypatch, capsys, flags,
                                                                     complaint):
    monkeypatch.setattr(places, "EXPERIMENTS", tmp_path / "experiments")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    monkeypatch.setattr(sys, "argv", ["proof.py", *flags])
    with pytest.raises(SystemExit) as end:
        proof.main()
    said = f"{end.value.code}{capsys.readouterr().err}"
    assert end.value.code != 0 and complaint in said, said
    assert not (tmp_path / "experiments").exists()
