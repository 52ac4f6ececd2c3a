"""The benchmarks run, on tiny inputs. Run: ./run.sh test tests/test_benchmarks.py"""

import csv
import importlib
import json
import math
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import forking
from scipy.optimize import curve_fit
from test_resume import DIE_AFTER, KEEP, assert_same_run
from tiny_runs import CALM, ROOT, drive, flags, newest, run

import train_gpt
from benchtop import smoke
from benchtop.errors import UserError
from benchtop.files import sha256_of
from benchtop.folder import module_of
from benchtop.groups import Group, SavedRun
from benchtop.initial import draw_weights
from benchtop.machine import World

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def measure(lab):
    """Runs a benchmark of the lab's copy and gives what it says."""
    shutil.copytree(ROOT / "benchmarks", lab / "benchmarks", dirs_exist_ok=True)

    def measure(name: str, *arguments: str) -> str:
        return run(lab, forking(lab), f"benchmarks/{name}", *arguments).stdout
    return measure


def test_the_tokenizer_benchmark_compares_the_same_merges(measure):
    said = measure("tokenizer.py", "--source", "text.jsonl", "--vocabsize", "300", "--runs", "1",
                     "--num_workers", "1")
    assert "| 300 | benchtop |" in said


def test_the_tokenizing_benchmark_compares_the_same_tokens(measure, lab: Path):
    said = measure("tokenizing.py", "--source", "text.jsonl", "--tokenizer", "tiny_v300_n1073741824",
                     "--runs", "1", "--num_workers", "1")
    assert "times tiktoken's speed" in said and not list(lab.glob("data/benchmark*"))


TINY_MODEL = ("--model_dim 16 --num_layers 2 --num_heads 1 --seq_len 64 --compile off --batch_tokens 256 "
              "--device cpu")


# ------------------------------------------------------------------------------------------------
# Variants
# ------------------------------------------------------------------------------------------------

VARIANTS = sorted((ROOT / "benchmarks/variants").glob("*.diff"))


@pytest.fixture(scope="module")
def patched(lab):
    """Makes the lab's train_gpt.py with a variant, beside it; the name of that script without .py."""
    def patched(variant: str) -> str:
        script = lab / f"with_{variant}.py"
        if not script.exists():
            subprocess.run(["patch", "-p1", "-o", script, "-i", ROOT / f"benchmarks/variants/{variant}.diff"],
                           cwd=lab, check=True, capture_output=True)
        return script.stem
    return patched


@cache
def plain_losses() -> list[float]:
    return losses_of(train_gpt)


def losses_of(script) -> list[float]:
    """The losses of a whole short run, before each step and at its end."""
    cfg = script.Config(vocab_size=101, num_layers=6, num_heads=2, model_dim=32, seq_len=32, batch_tokens=64,
                        num_steps=10, device="cpu")
    torch.manual_seed(0)
    model = script.GPT(cfg, 100)
    draw_weights(model, 0)
    optimizer = script.Optimizer(model, cfg, World(cfg))
    tokens, model.progress = torch.randint(0, 101, (2, 32), generator=torch.Generator().manual_seed(1)), 0.0
    losses = []
    for _ in range(cfg.num_steps + 1):
        loss = model(tokens, tokens.roll(-1, 1)) / tokens.numel()
        losses.append(loss.item())
        loss.backward()
        optimizer.sum_gradients()
        optimizer.step(1.0)
    return losses


@pytest.mark.parametrize("variant", [path.stem for path in VARIANTS])
def test_a_kept_variant_fits_the_script_is_sound_and_says_what_it_is(variant, patched, lab):
    text = (ROOT / f"benchmarks/variants/{variant}.diff").read_text()
    assert re.match(r"[A-Z].{10,}\.\n--- a/train_gpt.py\n", text)
    assert f"| {variant} |" in (ROOT / "experiments/RECIPE.md").read_text()
    script = module_of(lab / f"{patched(variant)}.py")
    cfg = script.Config(vocab_size=101, num_layers=4, num_heads=2, model_dim=32, seq_len=32, batch_tokens=64)
    model = smoke.fresh_model(SimpleNamespace(Model=script.GPT), cfg).eval()
    smoke.stir(model)
    for check in (smoke.require_gradients, smoke.require_slope, smoke.require_causal, smoke.require_apart):
        check(model, cfg)
    losses = losses_of(script)
    assert losses[-1] < losses[0]
    assert losses != plain_losses()


@pytest.mark.parametrize("what", ["depth_warmup", "sampled_softmax"])
def test_a_variant_that_changes_over_time_resumes_bit_for_bit_and_on_two_processes(what, patched, lab):
    """Killed within its first part, and again where it ends. A row has a sample of its own here: of several
    rows, two processes make other groups than one."""
    name = patched(what)
    tamper = f"import {name}\ntrain_gpt.main = {name}.main\n{name}.SAMPLED_AT_ONCE = 32\n" + KEEP
    knobs = {**CALM, "num_layers": 4, "num_steps": 10, "val_every": 5, "num_samples": 1, "batch_tokens": 256,
             f"{what}_frac": 0.5}

    def train(name: str, lines: str = "", *arguments: str, processes: int = 1) -> Path:
        done = drive(lab, tamper + lines, *flags(model_name=name, **knobs), *arguments, processes=processes)
        assert (done.returncode != 0) == bool(lines), done.stderr
        return newest(lab, name)
    whole = train(f"{what}-whole")
    for step in (3, 5):
        train(f"{what}-cut", DIE_AFTER.format(step=step, rank=0), "--save_every_steps=1", "--resume=auto")
    assert_same_run(whole, train(f"{what}-cut", "", "--resume=auto"))
    assert_same_run(whole, train(f"{what}-two", processes=2), exact=False)


def test_a_depth_warmup_trains_the_first_layer_and_then_all(patched, lab):
    script = module_of(lab / f"{patched('depth_warmup')}.py")
    cfg = script.Config(vocab_size=101, num_layers=5, num_heads=2, model_dim=16, seq_len=32, batch_tokens=64,
                        value_embeddings=2, depth_warmup_frac=0.5, device="cpu")
    torch.manual_seed(0)
    model = script.GPT(cfg, 100)
    torch.nn.init.normal_(model.head)
    optimizer = script.Optimizer(model, cfg, World(cfg))
    tokens = torch.randint(0, 101, (2, 32))
    whole = model.flops_per_token()
    for progress in (0.0, 0.49, 0.5):
        model.progress, asleep = progress, r"layers\.[1-4]\.|value_embeds\.1" if progress < 0.5 else "none"
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        model(tokens, tokens).backward()
        norms = dict(zip(optimizer.parameters, optimizer.sum_gradients().tolist(), strict=True))
        optimizer.step(1.0)
        for name, parameter in model.named_parameters():
            state = [piece.state for piece in optimizer.pieces if piece.name == name]
            if re.match(asleep, name):
                assert parameter.equal(before[name]) and norms[name] == 0, name
                assert not any(tensor.any() for each in state for tensor in each.values())
            elif "out" in name or "down" in name or name == "head":
                assert not parameter.equal(before[name]) and norms[name] > 0, name
        assert (model.flops_per_token() < whole) == (progress < 0.5)
    model.progress = 0.0
    model(tokens, tokens).backward()
    model.head.grad = None
    with pytest.raises(UserError, match="parameter head has no gradient"):
        optimizer.sum_gradients()


@pytest.fixture(scope="module")
def sampling(patched, lab):
    """train_gpt.py with the sampled softmax, as a module."""
    return module_of(lab / f"{patched('sampled_softmax')}.py")


def text_like(rows: int, seed: int = 0) -> torch.Tensor:
    """(rows, 64) tokens of 3,000 that are as unevenly frequent as words; some places predict nothing."""
    frequency = 1 / torch.arange(1, 3001)       # Zipf's law
    targets = frequency.multinomial(rows * 64, True, generator=torch.Generator().manual_seed(seed))
    targets[::50] = -1
    return targets.view(rows, 64)


@pytest.mark.parametrize("rows", [16, 64, 128])
def test_a_softmax_sample_has_room_for_all_targets_of_text_and_finds_them(sampling, rows):
    cfg, targets = sampling.Config(vocab_size=3000), text_like(rows).flatten()
    sample, places = sampling.softmax_sample(targets, cfg)
    assert len(sample.unique()) == len(sample) == sampling.sample_size(cfg, len(targets)) < 3000
    assert torch.equal(places < 0, targets < 0)
    assert torch.equal(sample[places[targets >= 0]], targets[targets >= 0])
    # rare tokens have their turn
    samples = [sampling.softmax_sample(text_like(rows, seed).flatten(), cfg)[0] for seed in range(60)]
    assert len(torch.cat(samples).unique()) > 2990


def test_a_softmax_sample_leaves_out_targets_for_which_there_is_no_room(sampling):
    targets = torch.randperm(3000)
    sample, places = sampling.softmax_sample(targets, sampling.Config(vocab_size=3000))
    assert (places >= 0).sum() == len(sample) < 3000
    assert torch.equal(sample[places[places >= 0]], targets[places >= 0])


@pytest.mark.parametrize("cap", [15, 0])
def test_a_sampled_loss_is_that_of_its_sample_with_its_gradients(sampling, cap, monkeypatch):
    torch.manual_seed(0)
    cfg = sampling.Config(vocab_size=3000, model_dim=16, num_layers=2, num_heads=2, seq_len=64, logit_cap=cap,
                          batch_tokens=128, sampled_softmax_frac=0.5)
    model, targets = sampling.GPT(cfg, 2999), text_like(2)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    inputs = targets.clamp(min=0).roll(1, 1)
    monkeypatch.setattr(sampling, "SAMPLED_AT_ONCE", 50)
    monkeypatch.setattr(sampling, "chunk_rows", lambda x, columns: 16)
    plain, x = 0, model.hidden(inputs).flatten(0, 1)
    for group, wanted in zip(x.split(50), targets.flatten().split(50), strict=True):
        sample, places = sampling.softmax_sample(wanted, cfg)
        z = sampling.soft_cap(group @ model.head[sample].T, cap)
        plain = plain + torch.nn.functional.cross_entropy(z, places, ignore_index=-1, reduction="sum")
    whole, parameters = model(inputs, targets), list(model.parameters())
    model.progress = 0.4
    sampled = model(inputs, targets)
    torch.testing.assert_close(sampled, plain)
    wanted = torch.autograd.grad(2.5 * plain, parameters)
    torch.testing.assert_close(torch.autograd.grad(2.5 * sampled, parameters), wanted, rtol=1e-4, atol=1e-4)
    assert sampled < 0.95 * whole       # trained models differ less
    model.progress = 0.5
    assert torch.equal(model(inputs, targets), whole)
    with pytest.raises(UserError, match="--fp8 must be off with --sampled_softmax_frac"):
        sampling.Config(fp8=True)


# ------------------------------------------------------------------------------------------------
# What takes time
# ------------------------------------------------------------------------------------------------

def test_the_benchmark_of_the_step_names_floor_and_share(measure):
    said = measure("step.py", "demo", "--times", "1", *TINY_MODEL.split())
    rows = re.findall(r"^\| (demo.*?) \| 256 \| [\d,]+ \| \d\.\d\d \| - \| [\d,]+ \| \d+ of \d+ ms, "
                      r"[\d.]+% \|", said, re.MULTILINE)
    assert rows == ["demo"]


SWEPT = {"num_layers": 2, "model_dim": 16, "train_tokens": 512, "batch_tokens": 256, "val_tokens": 256,
         "seq_len": 64, "compile": "off"}


def sweep_of(knob: str, *values: str) -> list[str]:
    """The words of a tiny sweep."""
    others = [f"--{name}={value}" for name, value in SWEPT.items() if name != knob]
    return ["--vary", knob, *values, *others]


@pytest.mark.parametrize(("knob", "values"), [("num_layers", ("1", "2")), ("model_dim", ("16", "32")),
                                              ("train_tokens", ("512", "1024"))])
def test_a_sweep_leaves_a_table_and_a_picture(measure, lab: Path, knob, values):
    said = measure("transfer.py", "--data", "tiny", "--factors", "1", "2", *sweep_of(knob, *values))
    with open(lab / f"experiments/transfer/{knob}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    points = {(row[knob], row["factor"]): row["val_bpb"] for row in rows}
    assert list(points) == [(value, factor) for value in values for factor in ("1", "2")]
    assert re.findall(r"val_bpb (\S+)", said) == [f"{float(bpb):.4f}" for bpb in points.values()]
    assert len(set(points.values())) == 4 and all(0 < float(bpb) < 20 for bpb in points.values())
    assert {row["code_sha256"] for row in rows} == {sha256_of(lab / "train_gpt.py")}
    assert all(0 < int(row["step"]) <= int(row["tokens"]) / 256 for row in rows)
    assert (lab / f"experiments/transfer/{knob}.png").read_bytes().startswith(b"\x89PNG")
    runs = {*lab.glob("experiments/2*")}
    again = measure("transfer.py", "--data", "tiny", "--factors", "1", "2", *sweep_of(knob, *values))
    assert again == said and {*lab.glob("experiments/2*")} == runs      # none is trained again


def test_what_a_sweep_varies_cannot_be_set(measure, lab: Path):
    for flag in ("--num_layers=3", "--muon_lr=0.1"):
        done = run(lab, forking(lab), "benchmarks/transfer.py", "--data", "tiny", flag,
                   *sweep_of("num_layers", "1"), expect=None)
        assert f"{flag.partition('=')[0]} is what this sweep varies" in done.stderr and done.returncode


def test_a_sweep_survives_a_rate_that_is_too_high_and_nothing_else(measure, lab: Path):
    source = (lab / "train_gpt.py").read_text()
    line = "loss += part.detach()"
    wild = source.replace(line, f"{line} * (math.nan if cfg.muon_lr > 0.07 else 1)")
    assert wild != source
    (lab / "wild.py").write_text(wild)

    def sweep(data: str) -> subprocess.CompletedProcess:
        return run(lab, forking(lab), "benchmarks/transfer.py", "--factors", "2", "1", "--data", data,
                   "--script", "wild.py", *sweep_of("num_layers", "2"), expect=None)
    done = sweep("tiny")
    assert done.returncode == 0 and "failed: " in done.stdout and "is nan" in done.stdout, done.stderr
    values = re.findall(r"val_bpb (\S+)", done.stdout)
    assert values[0] == "inf" and 0 < float(values[1]) < 20
    written = (lab / "experiments/transfer/num_layers.csv").read_text()
    done = sweep("absent")
    assert done.returncode != 0 and "no absent in" in done.stderr and "val_bpb" not in done.stdout
    assert (lab / "experiments/transfer/num_layers.csv").read_text() == written


def test_the_best_factor_is_the_bottom_of_a_parabola():
    transfer = module_of(ROOT / "benchmarks/transfer.py")
    curve = {factor: 2 + math.log(factor / 1.3) ** 2 for factor in (0.5, 0.71, 1, 1.41, 2)}
    assert transfer.best_factor(curve) == pytest.approx(1.3)
    assert transfer.best_factor(curve | {4.0: math.inf}) == pytest.approx(1.3)
    falling = {factor: -factor for factor in (0.5, 1, 2)}
    assert transfer.best_factor(falling) is None and transfer.best_factor({1: 2.0, 2: math.inf}) is None


@pytest.mark.parametrize("words", ["model_dim", "nonsense 1", "muon_lr 1 2", "model_dim wide"])
def test_a_sweep_of_what_is_no_whole_number_is_refused(words):
    transfer = module_of(ROOT / "benchmarks/transfer.py")
    assert transfer.values_of(["model_dim", "1_28", "256"]) == ("model_dim", [128, 256])
    with pytest.raises(UserError, match="--vary needs a knob with whole numbers"):
        transfer.values_of(words.split())


def test_the_hellaswag_benchmark_compares_the_same_choices(here, monkeypatch, capsys):
    """With a model that is not compiled."""
    row = {"ctx": "the cat saw", "endings": ["a dog", "the big tree", "and", "sat"], "label": 0}
    (here / "rows.jsonl").write_text((json.dumps(row) + "\n") * 3)
    monkeypatch.setattr(torch._dynamo.config, "disable", True)
    monkeypatch.setattr(sys, "argv", ["hellaswag.py", "--rows", str(here / "rows.jsonl"), "--tokenizer",
                                      "tiny_v300_n1073741824", "--rounds", "1"])
    module_of(ROOT / "benchmarks/hellaswag.py").main()
    said = capsys.readouterr().out
    assert "times as fast" in said and "acc: the same choice in 3 of 3 rows" in said


@pytest.fixture(scope="module")
def load_benchmark():
    """A program of benchmarks/ as a module, found with its neighbours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module


@pytest.fixture(scope="module")
def race(load_benchmark):
    return load_benchmark("race")


A_PEER = """
import torch
from dataclasses import dataclass
from torch import nn
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float; bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(config.vocab_size, config.n_embd),
                                          "h": nn.ModuleList([nn.Linear(config.n_embd, config.n_embd)])})
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def get_num_params(self):
        return 1000

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas)

    def forward(self, idx, targets):
        z = self.lm_head(torch.relu(self.transformer["h"][0](self.transformer["wte"](idx))))
        return z, F.cross_entropy(z.flatten(0, 1), targets.flatten(), ignore_index=-1)
"""


@pytest.fixture
def books(lab: Path):
    """Data under the name that the settings give theirs; other tests want one data set alone."""
    folder = lab / "data/settings_all_8192"
    shutil.copytree(lab / "data/tiny", folder)
    yield
    shutil.rmtree(folder)


def test_a_race_gives_each_side_the_same_time_and_a_checkout_needs_no_change(measure, lab, tmp_path, books):
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer/model.py").write_text(A_PEER)
    words = ["race.py", str(tmp_path / "peer"), "--sides", "train_gpt", "--seconds", "0.3",
             "--own_seconds", "0.2", "0.3", "--untuned", "train_gpt,peer=2:256:0.1", "--seeds", "2", "--keep",
             "--report", "RACE_2.md", *TINY_MODEL.split()]
    measure(*words)
    report = (lab / "experiments/RACE_2.md").read_text()
    rows = re.findall(r"^\| (0\.\d) \| (\S.*?) \| .*? \| ([\d.]+) ± \S+ \|", report, re.MULTILINE)
    assert [row[:2] for row in rows] == [("0.2", "train_gpt"), ("0.3", "train_gpt"), ("0.3", "peer's own")]
    assert "peer, with rates x 2, 256 tokens per step, warm-up 0.1" in report
    kept = [json.loads(path.read_text())
            for path in lab.glob("experiments/race/minute_peer_0.3s/*/summary.json")]
    assert len(kept) == 2 and str(tmp_path) not in json.dumps(kept)
    ends = [run["val_bpb"] for run in kept]
    assert float(rows[-1][2]) == pytest.approx(sum(ends) / 2, abs=1e-4)
    before = set((lab / "experiments").glob("2*"))
    measure(*words)     # what is there is not repeated
    assert set((lab / "experiments").glob("2*")) == before


def test_every_side_is_tuned_one_axis_after_the_other_and_beyond_a_best_edge(race, monkeypatch):
    worth = {"rate": {4.0: -0.2, 2.0: -0.1, 8.0: -0.1}, "batch": {4096: -0.1}, "warmup": {0.2: -0.05}}
    tried = []

    def run(self, wanted):
        tried.extend(point for _, point, _, seed in wanted if seed == race.TUNING_SEED)
        ends = [2 + sum(gains.get(getattr(point, axis), 0) for axis, gains in worth.items())
                for _, point, _, _ in wanted]
        return [SavedRun(Path(), {}, {"status": "finished", "val_bpb": end}) for end in ends]
    monkeypatch.setattr(race.Race, "run", run)
    one = race.Race.__new__(race.Race)
    best, found = one.tune(race.Racer("x", Path("x.py"), {"rate": 1.0}), 60)
    assert best == race.Point(4.0, 4096, 0.2) and len(tried) == len(set(tried)) == len(found)
    assert {point.rate for point in tried} == {0.5, 1.0, 2.0, 4.0, 8.0}
    assert {point.batch for point in tried} == {2048, 4096, 8192, 16384}
    ours, _ = one.tune(race.Racer("train_gpt", Path("x.py"), {"rate": 1.0}), 60)
    assert ours == race.Point(4.0, 4096, 0.02)


def test_any_edit_of_a_checkout_makes_new_runs(race, monkeypatch, tmp_path):
    monkeypatch.setattr(race.places, "ROOT", tmp_path)
    model = tmp_path / "peers/x/model.py"
    model.parent.mkdir(parents=True)
    hashes = set()
    for text in ("a = 1", "a = 2", "a = 3"):
        model.write_text(text)
        hashes.add(race.Racer("x", Path("x.py"), {}, ("--checkout", "peers/x")).code_sha256)
    assert len(hashes) == 3 and race.Racer("y", Path("y.py"), {}).code_sha256 == ""


def test_a_side_races_with_the_point_of_an_earlier_tuning(race):
    names = ["train_gpt", "nanochat"]
    assert race.untuned_points("", names) == {}
    assert race.untuned_points("all", names) == dict.fromkeys(names, race.Point())
    assert race.untuned_points("nanochat=4:4096:0.2", names) == {"nanochat": race.Point(4.0, 4096, 0.2)}
    for words, says in (("llama3", "must be all, or of train_gpt, nanochat"), ("nanochat=4", "as in"),
                        ("nanochat=4:many:0", "as in"), ("nanochat=1:2:3:4", "as in"), ("nanochat=", "as in"),
                        ("nanochat=0:8:0", "as in"), ("nanochat=nan:8:0", "as in")):
        with pytest.raises(UserError, match=says):
            race.untuned_points(words, names)


def test_the_time_to_a_value_is_read_off_between_means(race):
    def group(*values: float) -> Group:
        return Group("train_gpt", [SavedRun(Path(), {}, {"status": "finished", "val_bpb": value})
                                   for value in values])
    for pair in ((1.6, 1.7), (1.7, 1.6)):
        first = {60.0: group(*pair), 240.0: group(1.4, 1.5)}
        assert race.seconds_to(first, 1.55) == "120 s"      # half-way, in the logarithm
        assert race.seconds_to(first, 1.44) == "not within 240 s"
        assert race.seconds_to(first, 1.66) == "less than 60 s"


def test_a_side_of_which_no_run_finished_is_shown_as_such(race):
    lost = Group("x", [SavedRun(Path(), {}, {"status": "failed: the loss is nan"})] * 3)
    assert race.table({("x", 60.0): lost})[1] == ["60", "x", "", "", "", "", "none of 3 runs finished", ""]


# ------------------------------------------------------------------------------------------------
# The ladder
# ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ladder(load_benchmark):
    return load_benchmark("ladder")


RUNG_FLOPS = np.tile(np.geomspace(3e12, 1e14, 5), 2)


def bpb_of_law(flops: np.ndarray, floor: float, gain: float, exponent: float) -> np.ndarray:
    return floor + gain * (flops / np.exp(np.log(flops).mean())) ** -exponent


@settings(max_examples=30, deadline=None)
@given(floor=st.floats(0.5, 2), gain=st.floats(0.2, 2), exponent=st.floats(0.1, 0.5), seed=st.integers(0, 99))
def test_the_law_is_the_least_squares_fit(ladder, floor, gain, exponent, seed):
    """scipy, which starts at the true law, is the oracle; the exponent's grid may cost a little."""
    noise = np.random.default_rng(seed).normal(0, 0.003, len(RUNG_FLOPS))
    bpb = bpb_of_law(RUNG_FLOPS, floor, gain, exponent) + noise
    law = ladder.fit(RUNG_FLOPS, bpb[None])
    best, _ = curve_fit(bpb_of_law, RUNG_FLOPS, bpb, p0=(floor, gain, exponent), maxfev=10_000,
                        bounds=((0, 0, 0.0005), (np.inf, np.inf, 1)))
    error, least = (((fitted - bpb) ** 2).sum()
                    for fitted in (law.at(RUNG_FLOPS)[0], bpb_of_law(RUNG_FLOPS, *best)))
    assert error <= 1.02 * least and law.floor[0] >= 0


def test_an_interval_of_the_law_holds_the_truth_as_often_as_it_says(ladder, monkeypatch):
    monkeypatch.setattr(ladder, "DRAWS", 200)                               # for speed
    monkeypatch.setattr(ladder, "EXPONENTS", np.arange(0.004, 1, 0.004))
    truth, random = (1.0, 0.9, 0.2), np.random.default_rng(0)
    there = np.array([3e15])
    unit = np.exp(np.log(RUNG_FLOPS).mean())
    true = truth[0] + truth[1] * (there[0] / unit) ** -truth[2]
    held = {0.95: 0, 0.5: 0}
    for _ in range(80):
        bpb = bpb_of_law(RUNG_FLOPS, *truth) + random.normal(0, 0.004, len(RUNG_FLOPS))
        drawn = ladder.draws_of(ladder.fit(RUNG_FLOPS, bpb[None]), RUNG_FLOPS, bpb).at(there)[:, 0]
        for share in held:
            low, high = np.quantile(drawn, [(1 - share) / 2, (1 + share) / 2])
            held[share] += low <= true <= high
    # of 80, three standard deviations of a binomial around 76 and 40
    assert held[0.95] >= 70 and 27 <= held[0.5] <= 53


def test_a_ladder_leaves_runs_a_law_and_a_picture_and_goes_on_where_it_was(measure, lab: Path):
    words = ("ladder.py", "--data", "tiny", "--sizes", "1x16", "1x32", "2x16", "2x32",
             "--tokens_per_weight", "1", "--seeds", "1", "--predict", "demo", "--batch_tokens=256",
             "--seq_len=64", "--val_tokens=256", "--compile=off")
    said = measure(*words)
    with open(lab / "experiments/ladder/runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["size"] for row in rows] == ["1x16", "1x32", "2x16", "2x32"]
    assert re.findall(r"val_bpb (\S+)", said) == [f"{float(row['val_bpb']):.4f}" for row in rows]
    for row in rows:
        model = newest(lab, f"ladder_{row['size']}_seed0")
        knobs = json.loads((model / "config.json").read_text())
        assert knobs["train_tokens"] == pytest.approx(int(row["weights"]), rel=0.1)
    text = (lab / "experiments/ladder/README.md").read_text()
    assert "| demo |" in text and "- a = " in text and "python benchmarks/ladder.py --data tiny" in text
    assert (lab / "experiments/ladder/loss.png").read_bytes().startswith(b"\x89PNG")

    def number_of_runs() -> int:
        return len([*lab.glob("experiments/*_ladder_*")])
    measure(*words)
    assert number_of_runs() == 4
    table = lab / "experiments/ladder/runs.csv"
    before = table.read_text()
    measure(*words, "--muon_lr=0.1")                # another ladder, whose runs come after these
    assert number_of_runs() == 8 and table.read_text().startswith(before)

    def refused(*more: str) -> str:
        return run(lab, forking(lab), "benchmarks/ladder.py", *words[1:], *more, expect=1).stderr
    assert "--seed is what the ladder sets" in refused("--seed", "3")
    assert "four sizes or more" in refused("--sizes", "1x16", "1x32", "2x16", "2x16")
    assert "its size depends on the machine" in refused("--predict", "five-minutes")
    table.write_text(before.replace("1x32", ""))
    assert "runs.csv is damaged" in refused()
    assert number_of_runs() == 8


@pytest.mark.parametrize("word", ["4", "4x", "x128", "0x128", "4x-8", "wide"])
def test_a_size_of_the_ladder_is_layers_x_width(ladder, word):
    assert str(ladder.Rung.of("4x128")) == "4x128"
    with pytest.raises(UserError, match="a size is layers x width"):
        ladder.Rung.of(word)
