"""Weights & Biases, Trackio and TensorBoard beside the run folder; all optional. No network."""

import sys
from types import SimpleNamespace

import pytest
from tiny_runs import drive, flags, newest, rows_of, summary_of, train_here

import train_gpt
from benchtop import trackers
from benchtop.errors import UserError


@pytest.mark.slow
def test_wandb_gets_every_row_offline(lab, tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    spy = """
import wandb
real_init = wandb.init
def init(**options):
    run = real_init(**options)
    assert run.settings.mode == "offline", run.settings.mode
    real_log = run.log
    def log(values, step):
        print("LOGGED", step, values["train_loss"], flush=True)
        real_log(values, step)
    run.log = log
    print("INIT", options["project"], options["config"]["num_steps"], flush=True)
    return run
wandb.init = init
"""
    environment = {"WANDB_MODE": "offline", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path),
                   "MY_API_KEY": "very-secret-value"}
    done = drive(lab, spy, *flags(wandb="bench", model_name="followed", num_samples=0,
                                  prompt="very-secret-value"), env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = newest(lab, "followed")
    logged = [line.split() for line in done.stdout.splitlines() if line.startswith("LOGGED")]
    assert [(int(step), float(f"{float(loss):.6g}")) for _, step, loss in logged] == [
        (int(row["step"]), float(row["train_loss"])) for row in rows_of(folder)]
    assert "INIT bench 4" in done.stdout
    assert list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    # not even in what it writes on its own: the command line, uncommitted changes
    files = [path for place in (folder, tmp_path) for path in place.rglob("*") if path.is_file()]
    assert not [path for path in files if b"very-secret-value" in path.read_bytes()]


def test_wandb_is_told_no_secret(here, monkeypatch, capsys):
    told = {}

    class Fake(SimpleNamespace):
        Error = RuntimeError
        Settings = dict

        @staticmethod
        def init(**options):
            told.update(options)
            raise RuntimeError("the key very-secret-value is too short")
    monkeypatch.setitem(sys.modules, "wandb", Fake())
    monkeypatch.setenv("MY_API_KEY", "very-secret-value")
    with pytest.raises(UserError, match=r"the key \[MY_API_KEY\] is too short"):
        trackers.WandB(train_gpt.Config(wandb="bench", prompt="say very-secret-value"), here)
    assert told["config"]["prompt"] == "say [MY_API_KEY]" and "very-secret" not in str(told)
    assert told["config"]["num_layers"] == 6
    settings = told["settings"]
    assert settings["x_disable_meta"] and settings["disable_git"] and settings["disable_code"]


class FakeTrackio(SimpleNamespace):
    """What benchtop uses of the package, with the arguments that it has there."""

    def __init__(self):
        super().__init__(__spec__=SimpleNamespace(), options={}, logged=[], finished=0)

    def init(self, project: str, name: str | None = None, config: dict | None = None, resume: str = "never",
             ) -> None:
        print("* Trackio project initialized")
        self.options = {"project": project, "name": name, "config": config, "resume": resume}

    def log(self, metrics: dict, step: int | None = None) -> None:
        self.logged.append((step, dict(metrics)))

    def finish(self) -> None:
        self.finished += 1


def test_trackio_gets_every_row_and_no_secret(here, monkeypatch, capsys):
    fake = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.setenv("MY_API_KEY", "very-secret-value")
    folder = train_here(here, trackio="bench", num_samples=1, prompt="say very-secret-value")
    *rows, final = fake.logged
    assert [(step, float(f"{values['train_loss']:.6g}")) for step, values in rows] == [
        (int(row["step"]), float(row["train_loss"])) for row in rows_of(folder)]
    summary = summary_of(folder)
    assert final == (4, {"final/val_loss": summary["val_loss"], "final/val_bpb": summary["val_bpb"]})
    assert fake.options["project"] == "bench" and fake.options["name"] == folder.name
    assert fake.options["resume"] == "allow" and fake.options["config"]["num_steps"] == 4
    assert fake.options["config"]["prompt"] == "say [MY_API_KEY]"
    assert "very-secret" not in str((fake.options, fake.logged)) and fake.finished == 1
    assert "Trackio" not in capsys.readouterr().out


def test_trackio_that_does_not_begin_is_said_without_secrets(here, monkeypatch):
    fake = FakeTrackio()

    def init(**_):
        raise RuntimeError("no very-secret-value")
    fake.init = init
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.setenv("MY_API_KEY", "very-secret-value")
    with pytest.raises(UserError, match=r"--trackio bench does not work here \(no \[MY_API_KEY\]\)"):
        trackers.Trackio(train_gpt.Config(trackio="bench"), here)


def test_tensorboard_has_the_curves(here):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator",
                                 reason="tensorboard is not installed")
    folder = train_here(here, tensorboard=True, num_samples=0)
    board = events.EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    for column in ("train_loss", "val_bpb", "lr_scale", "flops"):
        ours = [(int(row["step"]), float(row[column])) for row in rows_of(folder) if row[column]]
        theirs = [(event.step, event.value) for event in board.Scalars(column)]
        assert [step for step, _ in theirs] == [step for step, _ in ours]
        assert [value for _, value in theirs] == pytest.approx([value for _, value in ours], rel=1e-5)


@pytest.mark.parametrize(("knobs", "package"),
                         [({"wandb": "x"}, "wandb"), ({"trackio": "x"}, "trackio"),
                          ({"tensorboard": True}, "tensorboard")])
def test_a_missing_package_is_named_before_anything_is_written(here, monkeypatch, knobs, package):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        train_here(here, **knobs)
    assert not (here / "experiments").exists()


def test_a_tracker_that_fails_is_given_up_and_the_run_goes_on(here, monkeypatch, capsys):
    class Fragile:
        calls = 0

        def __init__(self, *_):
            pass

        def row(self, step, values):
            Fragile.calls += 1
            raise BrokenPipeError("its process died")
    monkeypatch.setattr(trackers, "TensorBoard", Fragile)
    folder = train_here(here, tensorboard=True, num_samples=0)
    assert summary_of(folder)["status"] == "finished" and Fragile.calls == 1
    assert capsys.readouterr().err.count("warning: no longer logging to Fragile (its process died)") == 1


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_its_curve(lab):
    """What was written behind the checkpoint shows no more."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator",
                                 reason="tensorboard is not installed")
    die = """
import os, signal
real = benchtop.run.Run.validate_and_log
def validate_and_log(run):
    real(run)
    if run.step == 4:
        run.log.trackers.trackers[0].writer.flush()
        os.kill(os.getpid(), signal.SIGKILL)
benchtop.run.Run.validate_and_log = validate_and_log
"""
    knobs = [*flags(num_samples=0, num_steps=6, val_every=3, model_name="revived"), "--tensorboard"]
    assert drive(lab, die, *knobs).returncode == -9
    folder = newest(lab, "revived")
    assert drive(lab, "", *knobs, "--resume", str(folder)).returncode == 0
    board = events.EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train_loss")] == [1, 2, 3, 4, 5, 6]


def test_nothing_is_imported_unless_asked_for(here):
    before = set(sys.modules)
    train_here(here, num_samples=0)
    imported = {name.split(".")[0] for name in set(sys.modules) - before}
    assert not imported & {"wandb", "trackio", "tensorboard"}
