"""When a micro-batch is recorded; what a recording does needs a device (test_gpu.py).

Run: ./run.sh test tests/test_recorded.py
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchtop import recorded
from benchtop.recorded import record


class Net(nn.Module):
    """Reads `progress` where it is told to."""

    def __init__(self, reads_progress: bool = False):
        super().__init__()
        self.weight, self.progress, self.reads_progress = nn.Parameter(torch.ones(3)), 0.25, reads_progress

    def forward(self, inputs: torch.Tensor, _targets: torch.Tensor) -> torch.Tensor:
        return (self.weight * inputs).sum() * (self.progress if self.reads_progress else 1)


@pytest.fixture
def said(monkeypatch):
    """said(model, started, done) is what the log says where these are the seconds of a micro-batch."""
    def graph(model, sample, **_):
        model(*sample)      # as a capture does
        model.is_recorded = True
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graph)
    world = SimpleNamespace(device=torch.device("cuda"), synchronize=lambda: None, empty_cache=lambda: None)

    def said(model, started: float, done: float, deterministic: bool = False) -> str:
        monkeypatch.setattr(recorded, "launch_seconds", lambda *_: (started, done))
        rows = torch.ones(3), torch.ones(3)
        return " ".join(record(model, *rows, SimpleNamespace(deterministic=deterministic), world))
    return said


def test_small_models_are_recorded_and_large_ones_are_not(said):
    small, large = Net(), Net()
    assert "recorded as one CUDA graph" in said(small, 0.009, 0.010) and small.is_recorded
    assert said(large, 0.005, 0.010) == "" and not hasattr(large, "is_recorded")


def test_gradients_of_a_recording_are_copied(said):
    model = Net()
    said(model, 1, 1)
    reused = torch.ones(3)      # a recording gives the same memory each time
    for number in (1.0, 10.0):
        reused.fill_(number)
        (model.weight * reused).sum().backward()
    assert model.weight.grad.tolist() == [11, 11, 11]


def test_a_model_that_changes_with_progress_is_launched_as_before(said):
    model = Net(reads_progress=True)
    assert "changes with model.progress, so it is not recorded" in said(model, 1, 1)
    assert model.progress == 0.25 and model(torch.ones(3), None).item() == 0.75


def test_other_missing_attributes_are_errors(said):
    model = Net()
    model.forward = lambda *_: model.nothing
    with pytest.raises(AttributeError, match="nothing"):
        said(model, 1, 1)


def test_a_property_that_reads_progress_counts_as_well(said):
    """Its AttributeError names the property, not `progress`."""
    class Early(Net):
        @property
        def share(self) -> float:
            return self.progress / 2

        def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return super().forward(inputs, targets) * self.share
    assert "changes with model.progress, so it is not recorded" in said(Early(), 1, 1)


def test_what_cannot_be_recorded_is_launched_as_before_and_said(said, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing")
    model = Net()
    said_before = said(model, 0, 1)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    assert said_before == "" and "cannot be recorded (operation not permitted" in said(model, 1, 1)
    assert model.progress == 0.25


def test_deterministic_runs_are_not_recorded(said):
    assert "not recorded with --deterministic" in said(Net(), 1, 1, deterministic=True)


def test_a_cpu_records_nothing():
    world = SimpleNamespace(device=torch.device("cpu"))
    assert record(Net(), torch.ones(3), torch.ones(3), SimpleNamespace(), world) == []
