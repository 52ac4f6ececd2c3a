"""The budget of a run: tokens, steps or minutes, and what follows from the data where none is given.

Run: ./run.sh test tests/test_budget.py
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import CALM, TINY, drive, flags, newest, rows_of, summary_of, train_here

import benchtop
from benchtop.briefing import time_estimate
from benchtop.budget import VALIDATIONS, Clock, validates
from benchtop.knobs import parse_config
from benchtop.machine import World
from benchtop.run import Run
from train_gpt import GPT, Config, lr_scale

pytestmark = pytest.mark.usefixtures("no_picture")


# ------------------------------------------------------------------------------------------------
# The rule
# ------------------------------------------------------------------------------------------------


sizes = st.integers(1, 10**10)


@given(sizes, st.integers(2, 4096), st.sampled_from([0, 1, 7, 512]))
def test_without_a_budget_a_run_takes_4_million_tokens_or_4_epochs(epoch_tokens, seq_len, rows):
    """Whichever is less, in whole steps, of which there is at least one."""
    cfg = Config(seq_len=seq_len, batch_tokens=rows * seq_len).with_budget(epoch_tokens)
    most = min(4_000_000, 4 * epoch_tokens)
    assert cfg.batch_tokens % seq_len == 0 and (not rows or cfg.batch_tokens == rows * seq_len)
    assert cfg.train_tokens == cfg.num_steps * cfg.batch_tokens
    assert cfg.num_steps == 1 or cfg.train_tokens <= most
    assert cfg.train_tokens > most - cfg.batch_tokens


@given(sizes, sizes, st.integers(2, 4096), st.sampled_from([0, 1, 7, 512]))
def test_so_many_tokens_are_asked_for_so_many_are_trained_on(epoch_tokens, tokens, seq_len, rows):
    cfg = Config(seq_len=seq_len, batch_tokens=rows * seq_len, train_tokens=tokens).with_budget(epoch_tokens)
    assert cfg.train_tokens == cfg.num_steps * cfg.batch_tokens
    assert tokens <= cfg.train_tokens < tokens + cfg.batch_tokens


@given(sizes, st.integers(1, 10**6), st.sampled_from([0, 10**9]), st.sampled_from([0, 0.5]))
def test_steps_that_are_given_are_taken(epoch_tokens, steps, tokens, minutes):
    cfg = Config(num_steps=steps, train_tokens=tokens, train_minutes=minutes).with_budget(epoch_tokens)
    assert (cfg.num_steps, cfg.train_tokens, cfg.train_minutes) == (steps, steps * cfg.batch_tokens, minutes)


@given(sizes, sizes, st.sampled_from([{}, {"train_tokens": 10**7}, {"num_steps": 5}, {"train_minutes": 0.5},
                                      {"train_minutes": 0.5, "train_tokens": 10**7}]))
def test_a_budget_that_was_found_stays_what_it_is_with_any_other_data(epoch_tokens, other, knobs):
    """As in a run that is resumed from its config.json."""
    cfg = Config(**knobs).with_budget(epoch_tokens)
    assert cfg.with_budget(other) == cfg.with_budget(epoch_tokens) == cfg


def test_minutes_alone_leave_the_number_of_steps_to_the_clock():
    cfg = Config(train_minutes=0.5).with_budget(10**9)
    assert (cfg.num_steps, cfg.train_tokens) == (0, 0)
    assert cfg.batch_tokens == Config().with_budget(10**9).batch_tokens


@pytest.mark.parametrize(("tokens", "batch"), [(10**6, 8192), (4 * 10**6, 16384), (7 * 10**8, 524288)])
def test_the_batch_grows_with_the_budget(tokens, batch):
    assert Config(train_tokens=tokens).with_budget(10**9).batch_tokens == batch


@pytest.mark.parametrize(("words", "wanted"), [
    ("--preset xs", dict(train_tokens=98_304_000, num_steps=0, batch_tokens=0)),
    ("--preset xs --batch_tokens 65536", dict(train_tokens=98_304_000, num_steps=0, batch_tokens=65536)),
    ("--preset xs --num_steps 10", dict(train_tokens=98_304_000, num_steps=10, batch_tokens=0)),
    ("--preset gpt2-small --num_steps 10", dict(train_tokens=0, num_steps=10, batch_tokens=393216)),
    ("--preset gpt2-small --train_tokens 1e9", dict(train_tokens=10**9, num_steps=0, batch_tokens=0)),
    ("--preset gpt2-small --train_tokens 1e9 --batch_tokens 65536",
     dict(train_tokens=10**9, num_steps=0, batch_tokens=65536)),
    ("--train_tokens 1_000_000", dict(train_tokens=10**6, num_steps=0, batch_tokens=0))])
def test_a_flag_replaces_what_a_preset_derived_from_what_it_replaces(words, wanted):
    cfg = parse_config(words.split(), Config)
    assert {knob: getattr(cfg, knob) for knob in wanted} == wanted
    budget = cfg.with_budget(10**10)
    assert budget.train_tokens == budget.num_steps * budget.batch_tokens


@given(st.integers(1, 300))
def test_validations_are_at_the_first_step_behind_each_tenth_of_a_run(steps):
    cfg = Config(num_steps=steps)
    found = [step for step in range(1, steps + 1) if validates(cfg, step, step / steps, (step - 1) / steps)]
    # in whole numbers: -(-a // b) is a / b rounded up
    assert found == sorted({-(-steps * tenth // VALIDATIONS) for tenth in range(1, VALIDATIONS + 1)})
    assert len(found) == min(VALIDATIONS, steps) and found[-1] == steps


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------

def config_of(run_folder: Path) -> dict:
    return json.loads((run_folder / "config.json").read_text())


def log_of(run_folder: Path) -> str:
    return (run_folder / "training_log.txt").read_text()


def test_a_run_without_a_budget_ends_after_four_epochs_and_names_that_one_budget(here):
    folder = train_here(here, num_steps=0, batch_tokens=0, val_every=0)
    config, summary, rows = config_of(folder), summary_of(folder), rows_of(folder)
    steps, batch, tokens = (config[knob] for knob in ("num_steps", "batch_tokens", "train_tokens"))
    assert tokens == steps * batch == summary["tokens"] == int(rows[-1]["tokens"])
    assert steps == summary["step"] == int(rows[-1]["step"]) > 1
    # one step more would be more than four epochs
    assert float(rows[-1]["epoch"]) <= 4 < float(rows[-1]["epoch"]) * (steps + 1) / steps
    assert f"budget      {steps:,} steps of {batch:,} tokens ({tokens:,} in all); " in log_of(folder)
    assert f"epochs      {steps:,} steps: {float(rows[-1]['epoch']):.2f} epochs\n" in log_of(folder)
    assert summary["budget"] == f"{steps:,} steps of {batch:,} tokens"


def test_tokens_that_make_no_whole_steps_are_rounded_up_in_every_place(here):
    folder = train_here(here, num_steps=0, train_tokens=300)
    config, summary = config_of(folder), summary_of(folder)
    assert (config["train_tokens"], config["num_steps"]) == (384, 3)
    assert (summary["tokens"], summary["step"]) == (384, 3)


def test_many_epochs_are_advised_against(here):
    said = log_of(train_here(here, num_steps=1000, train_minutes=1e-9))
    assert re.search(r"epochs      1,000 steps: \d\.\d\d epochs \(beyond 4, repeated text teaches l", said)


def test_minutes_end_a_run_and_its_schedule(here):
    """It ends with the first step that ends behind the time; rates fall by the time before their step."""
    budget = 0.6
    folder = train_here(here, num_steps=10**6, train_minutes=budget / 60, val_every=10**6)
    check_clock(rows_of(folder), budget)
    assert config_of(folder)["num_steps"] == 10**6
    summary = summary_of(folder)
    assert summary["budget"] == "0.01 minutes of training" and summary["tokens"] == 128 * summary["step"]
    assert not {"train_tokens", "num_steps"} & {*summary}, "of a schedule that it did not reach"


# the clock of the first process shows that the budget is used up in step 6; the others' clocks show nonsense
CLOCK = """
from benchtop.budget import Clock
def share(clock, cfg):
    clock.shown = getattr(clock, "shown", 0) + 1
    return clock.shown / 5.5 if clock.world.is_main else 99.0
Clock.share = share
benchtop.machine.World.reports_behind = {behind}
"""


@pytest.mark.parametrize(("behind", "steps"), [(0, 6), (1, 7)])
def test_one_process_and_many_end_at_the_same_step_by_the_first_ones_clock(lab, here, monkeypatch, behind,
                                                                           steps):
    """A step later where steps are reported later."""
    knobs = dict(num_steps=0, train_minutes=1, model_name=f"clock{behind}", log_every=100, val_every=100)
    done = drive(lab, CLOCK.format(behind=behind), *flags(**knobs), processes=2)
    assert done.returncode == 0, done.stderr
    with monkeypatch.context() as patch:
        # exec's assignments to classes, taken back afterwards
        patch.setattr(Clock, "share", Clock.share)
        patch.setattr(World, "reports_behind", World.reports_behind)
        exec(CLOCK.format(behind=behind), {"benchtop": benchtop})
        alone = train_here(here, **knobs)
    for folder, processes in ((newest(lab, f"clock{behind}"), 2), (alone, 1)):
        summary = summary_of(folder)
        assert (summary["step"], summary["processes"]) == (steps, processes)
        assert float(rows_of(folder)[-1]["val_loss"]) > 0


def check_clock(rows: list[dict], budget: float) -> None:
    seconds = [float(row["train_seconds"]) for row in rows]
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    # times are read just before the clock stops for a row, and rows have six digits
    assert seconds[-1] >= 0.9999 * budget and all(second < 1.0001 * budget for second in seconds[:-2])
    cfg = Config(**TINY)
    for number, row in enumerate(rows):
        latest, earliest = ([0.0, 0.0, *seconds][number + place] / budget for place in (1, 0))
        lowest, highest = (lr_scale(cfg, number, min(1.0, used)) for used in (latest, earliest))
        assert lowest - 1e-4 <= float(row["lr_scale"]) <= highest + 1e-4
    assert rows[-1]["val_loss"]


def test_minutes_alone_train_as_many_steps_as_fit(here):
    budget = 0.6
    folder = train_here(here, num_steps=0, train_minutes=budget / 60, val_every=0)
    config, summary, rows, log = config_of(folder), summary_of(folder), rows_of(folder), log_of(folder)
    check_clock(rows, budget)
    assert (config["num_steps"], config["train_tokens"], config["train_minutes"]) == (0, 0, budget / 60)
    assert summary["budget"] == "0.01 minutes of training"
    assert summary["step"] == len(rows) and summary["tokens"] == 128 * len(rows)
    assert 1 <= len([row for row in rows if row["val_loss"]]) <= VALIDATIONS
    assert f"budget      {budget / 60:g} minutes of training in steps of 128 tokens; " in log
    assert "\nepochs " not in log       # nobody knows
    steps = re.findall(r"^step (\d+)  train_loss .* training done, 0:0\d left$", log, re.MULTILINE)
    assert list(map(int, steps)) == list(range(1, len(rows) + 1))
    per_step = float(rows[-1]["epoch"]) / len(rows)
    assert float(rows[0]["epoch"]) == pytest.approx(per_step, rel=1e-4) and per_step > 0


def test_the_first_of_steps_and_minutes_ends_a_run(here):
    rows = rows_of(train_here(here, train_minutes=60))
    assert len(rows) == 4 and float(rows[-1]["lr_scale"]) == pytest.approx(lr_scale(Config(**TINY), 3, 0.75))


@pytest.mark.parametrize("budget", [{"num_steps": 20}, {"num_steps": 0, "train_minutes": 1.5 / 60}], ids=str)
def test_a_terminal_shows_a_bar_that_moves(here, monkeypatch, budget):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))       # rows, columns
    said = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):      # its end, as Linux says it
            while piece := os.read(ours, 1000):
                said.extend(piece)
    reader = threading.Thread(target=read)
    reader.start()

    def between_steps(run: Run, real=Run.between_steps) -> None:
        real(run)
        time.sleep(0.05)
    monkeypatch.setattr(Run, "between_steps", between_steps)
    try:
        with open(theirs, "w") as terminal, monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            train_here(here, **{**budget, "val_every": 10**6, **CALM})
    finally:
        reader.join()
        os.close(ours)
    shown = re.findall(r"(\d+)% \|.*?\| step +(\d+)(/\d+)?  loss [\d.]+  \d:\d\d left", said.decode())
    percents, steps, of = zip(*shown, strict=True)
    assert sorted(map(int, percents)) == list(map(int, percents)) and len(set(percents)) > 1
    assert sorted(map(int, steps)) == list(map(int, steps))
    assert set(of) == ({"/20"} if budget["num_steps"] else {""})


@pytest.mark.parametrize(("knobs", "peak", "wanted"), [
    (dict(train_minutes=30), 0, "about 1.00 for that time"), (dict(num_steps=10), 1e9, "about 0."),
    (dict(num_steps=10), 0, "not known without the time; --peak_tflops 989 gives the cost on H100s")])
def test_a_cost_that_was_asked_for_is_said_or_why_it_is_not_known(knobs, peak, wanted):
    knobs = {**TINY, "num_steps": 0, "vocab_size": 301, "gpu_cost_per_hour": 2.0, **knobs}
    cfg = Config(**knobs).with_budget(10**6)
    world = SimpleNamespace(peak_flops=lambda _: peak)
    cost, = (line for line in time_estimate(cfg, GPT(cfg, 300), world) if line.startswith("cost "))
    assert wanted in cost
    free = dataclasses.replace(cfg, gpu_cost_per_hour=0.0)
    assert not any(line.startswith("cost ") for line in time_estimate(free, GPT(free, 300), world))
