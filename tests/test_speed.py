"""The size that --by_speed and the preset five-minutes choose. Run: ./run.sh test tests/test_speed.py"""

import itertools
import json
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import summary_of, train_here

import train_gpt
import train_llama3
import train_nanogpt
from benchtop import measure, speed
from benchtop.checkpoints import LAST
from benchtop.errors import UserError
from benchtop.identity import changes_since
from benchtop.knobs import parse_config
from benchtop.machine import World
from benchtop.run import Run, check
from benchtop.speed import product_tflops, with_speed
from train_gpt import EXPERIMENT, Config

BY_SPEED = dict(by_speed=True, num_layers=0, num_heads=0, model_dim=0, num_steps=3, train_minutes=60)


def five_minutes(tflops: float, *flags: str, config=Config):
    """The Config of the preset on devices of this speed, with all that follows from it."""
    words = ["--preset", "five-minutes", "--measured_tflops", str(tflops), *flags]
    return parse_config(words, config).with_size().with_budget(10**9)


# ------------------------------------------------------------------------------------------------
# The rule
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("device", "tflops", "layers", "width", "batch", "val_tokens"), [
    ("H100", 650, 8, 512, 262_144, 20_971_520), ("RTX 3090", 65, 6, 384, 65_536, 20_662_943),
    ("RTX 3060", 25, 5, 384, 65_536, None), ("two AMX cores", 1.1, 3, 256, 16_384, 1_079_895),
    ("two AVX2 cores", 0.27, 2, 128, 16_384, None), ("a slow one", 0.001, 1, 128, 2048, None)])
def test_a_slower_device_gets_less_to_compute(device, tflops, layers, width, batch, val_tokens):
    cfg = five_minutes(tflops)
    assert (cfg.num_layers, cfg.model_dim, cfg.batch_tokens) == (layers, width, batch)
    assert (cfg.seq_len, cfg.train_minutes, cfg.num_steps, cfg.head_dim) == (2048, 5, 0, 128)
    assert cfg.val_tokens == (val_tokens or cfg.tokens_by_speed // 4)


@given(st.lists(st.floats(1e-4, 1e5), min_size=2, max_size=2).map(sorted), st.sampled_from([0.5, 5, 600]))
def test_no_faster_device_gets_a_smaller_model(speeds, minutes):
    slow, fast = (five_minutes(tflops, "--train_minutes", str(minutes)) for tflops in speeds)
    assert 1 <= slow.num_layers <= fast.num_layers and 128 <= slow.model_dim <= fast.model_dim
    for cfg in (slow, fast):
        weights = 12 * cfg.num_layers * cfg.model_dim**2 + 8192 * cfg.model_dim
        operations = 0.35e12 * cfg.measured_tflops * 60 * minutes
        assert cfg.tokens_by_speed == pytest.approx(operations / (6 * weights), abs=1)
        assert cfg.val_tokens == min(20_971_520, cfg.tokens_by_speed // 4)


def test_flags_win_over_the_rule_and_the_rest_stays_by_rule():
    cfg = five_minutes(650, "--num_layers", "5")
    assert (cfg.num_layers, cfg.model_dim, cfg.tokens_by_speed > 5e8) == (5, 384, True)
    cfg = five_minutes(650, "--num_layers", "5", "--model_dim", "320", "--batch_tokens", "4096")
    assert (cfg.num_layers, cfg.model_dim, cfg.batch_tokens, cfg.val_tokens) == (5, 320, 4096, 20_971_520)
    assert five_minutes(0.001, "--val_tokens", "7").val_tokens == 7
    assert five_minutes(650, "--num_heads", "8").num_heads == 8


@pytest.mark.parametrize("script", [train_gpt, train_nanogpt, train_llama3], ids=lambda each: each.__name__)
def test_every_script_has_the_preset(script):
    cfg = five_minutes(9000, config=script.Config)
    assert cfg.num_layers == 13 and cfg.model_dim == 7 * 128 and cfg.model_dim == cfg.num_heads * cfg.head_dim
    assert five_minutes(10**5, config=script.Config).with_size().num_layers > 13
    if script is train_llama3:
        assert five_minutes(10**5, config=script.Config).num_kv_heads == 2, "of the heads that it got"


def test_without_by_speed_nothing_is_by_speed():
    cfg = Config(measured_tflops=650, train_minutes=5)
    assert cfg.with_size() == cfg and cfg.with_budget(10**9).val_tokens == 0 and not cfg.remarks()
    assert with_speed(cfg, None) is cfg
    with pytest.raises(UserError, match="--num_layers must be 1 or more; it is 0"):
        Config(num_layers=0)
    with pytest.raises(UserError, match="--train_minutes must be above 0 for --by_speed; it is 0"):
        Config(by_speed=True)


# ------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------

def test_the_speed_is_that_of_the_median_measurement(monkeypatch):
    """With a clock by which a product takes 9.9 ms at first, and 1, 2, 4, 1, 2, 4, 1 in the measurements."""
    monkeypatch.setattr(speed, "WIDTH_ON_CPU", 64)
    shape, now, made = (64, 64), [0.0], []
    takes = itertools.chain([9.9e-3] * 5, *([each * 1e-3] * 5 for each in (10, 1, 2, 4, 1, 2, 4, 1)))

    def product(left, right, out):
        assert left.shape == right.shape == out.shape == shape
        made.append(out)
        now[0] += next(takes)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "mm", product)
    world = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, synchronize=lambda: None)
    assert product_tflops(world) == pytest.approx(2e-12 * 64**3 / 2e-3)
    # as many at once as take 50 ms
    assert len(made) == 5 + 5 * 8


def test_this_machine_has_a_speed():
    assert product_tflops(World(Config(device="cpu"))) > 0


def test_the_speeds_of_all_processes_add_up_and_are_measured_once(monkeypatch):
    monkeypatch.setattr(speed, "product_tflops", lambda world: 1.23456)
    world = SimpleNamespace(gather=lambda own: [own, 2.0, 3.0])
    cfg = with_speed(Config(**BY_SPEED), world)
    assert cfg.measured_tflops == 6.23 and cfg.num_layers == Config(
        **BY_SPEED, measured_tflops=6.23).with_size().num_layers
    monkeypatch.setattr(speed, "product_tflops", None)
    assert with_speed(cfg, world) == cfg


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------

def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_a_run_keeps_its_size_when_it_goes_on(here, monkeypatch):
    """On a machine that has become faster."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(speed, "product_tflops", lambda world: 1e-6)
        between_steps = Run.between_steps

        def interrupt(run):
            between_steps(run)
            if run.step == 2:
                raise KeyboardInterrupt
        patch.setattr(Run, "between_steps", interrupt)
        train_here(here, **BY_SPEED, save_every_steps=1)
    folder, = here.glob("experiments/*")
    before = config_of(folder)
    assert (before["num_layers"], before["model_dim"], before["measured_tflops"]) == (1, 128, 1e-6)
    assert (folder / LAST).is_file()
    monkeypatch.setattr(speed, "product_tflops", lambda world: 0.1)
    cfg = parse_config(["--resume", str(folder)], Config)
    assert with_speed(cfg, None) == cfg
    train_here(here, **vars(cfg))
    assert config_of(folder) == before and summary_of(folder)["step"] == 3
    line = r"speed       1e-06 TFLOP/s in large matrix products, which sets the size; enough for \d+\.\d m"
    assert len(re.findall(line, (folder / "training_log.txt").read_text())) == 2
    assert with_speed(Config(**BY_SPEED), World(cfg)).num_layers > 1, "a new run would be larger"
    other = {"config": before | {"measured_tflops": 1.0}, "identity": summary_of(folder)}
    assert any("--measured_tflops is 1e-06, was 1.0" in change
               for change in changes_since(other, cfg, summary_of(folder)))


def test_check_says_the_size_that_a_run_will_have(here, monkeypatch, capsys):
    monkeypatch.setattr(speed, "product_tflops", lambda world: 0.1)
    cfg = Config(**BY_SPEED, device="cpu", compile="off", dtype="float32", seq_len=32, data="tiny")
    assert check(EXPERIMENT, cfg, World(cfg))
    said = capsys.readouterr().out
    sized = with_speed(cfg, World(cfg))
    assert "speed       0.1 TFLOP/s" in said
    assert f": {sized.num_layers} layers, width {sized.model_dim}, " in said and sized.num_layers > 1
