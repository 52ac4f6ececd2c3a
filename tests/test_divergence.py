"""A run whose numbers are no longer finite ends as failed, in a line, with a checkpoint from before.

Run: ./run.sh test tests/test_divergence.py
"""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_sampling import talkative
from tiny_runs import summary_of, train_here

from benchtop import run
from benchtop.checkpoints import read_checkpoint
from benchtop.errors import NonFinite, UserError
from benchtop.evaluation import HeldOut, Validation
from benchtop.folder import find_run, read_weights
from benchtop.sampling import generate
from benchtop.tasks import Task
from train_gpt import Optimizer


def fail(here: Path, **knobs) -> tuple[str, Path]:
    """What a run says that must fail, and its folder."""
    with pytest.raises(UserError) as error:
        train_here(here, **knobs)
    folder, = here.glob("experiments/*")
    assert str(error.value).startswith(summary_of(folder)["status"].removeprefix("failed: "))
    return str(error.value), folder


@pytest.mark.parametrize("bad", [Validation(math.nan, 1.0), Validation(math.inf, 1.0),
                                 Validation(1.0, math.inf)])
def test_a_validation_that_is_not_finite_ends_the_run_and_takes_its_checkpoint_back(here, monkeypatch, bad):
    results = iter([Validation(5.0, 2.0), bad])
    monkeypatch.setattr(HeldOut, "evaluate", lambda *_: next(results))
    said, folder = fail(here, num_steps=8, val_every=2)
    assert said.startswith(f"the val_loss of step 4 is {bad.val_loss}; try a lower learning rate")
    assert "the last good checkpoint is of step 2" in said
    assert read_checkpoint(folder)["step"] == 2
    assert summary_of(folder)["best_step"] == 2
    with pytest.raises(UserError, match="failed: the val_loss of step 4"):     # not again and again
        find_run("auto", "gpt")


def test_where_the_first_validation_is_not_finite_there_is_no_checkpoint(here, monkeypatch):
    monkeypatch.setattr(HeldOut, "evaluate", lambda *_: Validation(math.nan, math.nan))
    said, folder = fail(here)
    assert said.endswith("there is no checkpoint") and not [*folder.glob("*.pt")]


def test_a_resumed_run_does_not_go_on_behind_a_validation_that_is_not_finite(here, monkeypatch):
    """It was killed while it validated step 4, and the checkpoint of that step was there."""
    def killed(*_):
        raise KeyboardInterrupt
    results = iter([lambda *_: Validation(5.0, 2.0), killed])
    monkeypatch.setattr(HeldOut, "evaluate", lambda *_: next(results)())
    with pytest.raises(KeyboardInterrupt):
        train_here(here, num_steps=8, val_every=2)
    folder, = here.glob("experiments/*")
    assert read_checkpoint(folder)["step"] == 4
    monkeypatch.setattr(HeldOut, "evaluate", lambda *_: Validation(math.nan, math.nan))
    said, _ = fail(here, num_steps=8, val_every=2, resume=str(folder))
    assert "the last good checkpoint is of step 2" in said and read_checkpoint(folder)["step"] == 2


def test_weights_that_are_not_finite_are_not_saved(here, monkeypatch):
    real = Optimizer.step

    def step(optimizer, scale):
        real(optimizer, scale)
        if optimizer.steps_done == 3:
            optimizer.parameters["embed"].data[7, 3] = math.inf
    monkeypatch.setattr(Optimizer, "step", step)
    said, folder = fail(here, save_every_steps=1)
    assert said.startswith("embed is not finite after step 3; ") and read_checkpoint(folder)["step"] == 2


@pytest.mark.parametrize("part", ["sample_held_out", "score"])
def test_samples_and_benchmarks_that_are_not_finite_end_the_run_as_a_loss_does(here, monkeypatch, part):
    def diverged(*_):
        raise NonFinite("the model gives logits that are not finite")
    monkeypatch.setattr(run, part, diverged)
    tasks = {"piqa": Task("piqa", "", 0, [])} if part == "score" else {}
    monkeypatch.setattr(run, "tasks_of", lambda _: tasks)
    said, folder = fail(here)
    assert said.startswith("the model gives logits that are not finite; the last good checkpoint is of step")
    assert read_checkpoint(folder)["step"] == 4


def test_a_model_that_gives_no_numbers_is_not_sampled():
    model, cfg = talkative(temperature=1.0)
    model.head.data[5] = math.nan
    with pytest.raises(NonFinite, match="logits that are not finite"):
        generate(model, [[300, 1]], cfg)


def test_weights_of_a_run_that_diverged_are_refused_by_their_name(tmp_path):
    save_file({"embed": torch.ones(3), "head": torch.tensor([1.0, math.nan])}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="comes from a run that diverged: head is not finite"):
        read_weights(tmp_path)
