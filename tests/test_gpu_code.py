"""What runs do on GPUs, as far as make-believe ones show it (make_believe.py), at the sizes of the presets.

Layers are compiled once per shape, and presets differ in sizes alone, so a few of them stand for all. With
ALL_PRESETS=1 in the environment each one of each script is tried, which takes six minutes.

Run: ./run.sh test tests/test_gpu_code.py
"""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import make_believe
import pytest

import train_gpt

TESTS = Path(__file__).parent
PRESETS = {"train_gpt": ("demo", "gpt2-small"), "train_nanogpt": ("demo",), "train_llama3": ("demo",)}
if os.environ.get("ALL_PRESETS"):
    PRESETS = dict.fromkeys(PRESETS, tuple(train_gpt.PRESETS))
RUNS = [(script, preset) for script, presets in PRESETS.items() for preset in presets]

# The most kernels that a step of a preset launches on one H100: those made by torch.compile, and torch's own
LAUNCHES = {
    "train_gpt": {"demo": 260, "xs": 830, "s": 2_000, "m": 8_600, "gpt2-small": 6_750, "gpt2-medium": 16_100,
                  "gpt2-xl": 172_000},
    "train_nanogpt": {"demo": 245, "gpt2-small": 7_500}, "train_llama3": {"demo": 270, "gpt2-small": 7_950}}
# Bytes of stack that a thread of attention may take, forward and backward, by the width of heads. Best is
# none: a thread has 255 registers, and what does not fit into them lies in the card's memory
STACK = {"A100": {128: (0, 32)}, "3090": {128: (0, 32)}, "4090": {128: (0, 64)},
         "H100": {64: (160, 0), 128: (0, 80)}, "5090": {128: (0, 208)}}


@pytest.fixture(scope="session")
def said(tmp_path_factory):
    """said("make_believe_steps.py", ...) is what that script prints; it runs once for all tests."""
    missing = make_believe.what_is_missing()
    if missing:
        pytest.skip(missing)
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder   # of all of pytest's processes

    def run(*arguments: str) -> list[dict]:
        path = folder / f"{' '.join(arguments)}.json"
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                done = subprocess.run([sys.executable, "-W", "ignore", TESTS / arguments[0], *arguments[1:]],
                                      capture_output=True, text=True)
                assert not done.returncode, done.stderr
                path.with_suffix(".err").write_text(done.stderr)
                path.write_text(done.stdout)
        return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]
    return run


@pytest.fixture(scope="session", params=RUNS, ids="-".join)
def steps(request, said) -> dict:
    """What make_believe_steps.py measured of a script and a preset."""
    script, preset = request.param
    measured = said("make_believe_steps.py", "H100", script, ",".join(PRESETS[script]))
    found, = (steps for steps in measured if steps["preset"] == preset)
    return found | {"script": script}


def test_everything_is_compiled_in_the_warm_up_and_nothing_after_it(steps):
    """Whatever the window, the micro-batch and the step, and for validation, too."""
    assert steps["attention"] == "FlexAttention"
    assert steps["breaks"] == {}
    assert [step["progress"] for step in steps["steps"]] == [0.0, 0.5, 1.0]
    assert {step["graphs"] for step in steps["steps"]} | {steps["graphs_after"]} == {steps["graphs"]}


def test_a_step_never_waits_for_the_gpu(steps):
    """Python would stand still until all that is queued is done, and then the GPU until Python goes on."""
    assert [wait for wait in waits_of(steps) if "pinned" not in wait[1]] == []


def test_what_a_step_sends_to_the_gpu_is_pinned(steps):
    """Other memory is copied once more first, and for that the driver may wait for all that is queued."""
    assert [wait for wait in waits_of(steps) if "pinned" in wait[1]] == []


def waits_of(steps: dict) -> list:
    return [wait for wait in steps["waits"] if wait[0] != "validation"]


def peak(steps: dict) -> int:
    """The most that is alive in a training step, in MiB."""
    return max(mib for step in steps["steps"] for mib in step["peaks"].values())


def test_the_estimate_of_memory_is_within_a_tenth(steps):
    assert 0.9 * peak(steps) <= steps["estimate"] <= 1.1 * peak(steps)


def test_the_warm_up_needs_as_much_memory_as_training(steps):
    """Else a micro-batch that just fits ends the run in its first steps."""
    assert steps["warm-up"] >= peak(steps) - 1      # each is rounded


def test_steps_leave_no_memory_behind(steps):
    """Without Python's garbage collector, which rests during training."""
    first, _, last = (step["live"] for step in steps["steps"])      # two steps of one shape
    assert abs(last - first) <= 1       # each is rounded


def test_a_step_launches_few_kernels(steps):
    assert len(steps["steps"]) == 3, "it ended early; see what it waits for"
    one, more = (sum(step["launches"].values()) + sum(step["ops"].values()) for step in steps["steps"][1:])
    extra = more - one      # of a further micro-batch
    total = one + (steps["micro_batches"] - 1) * extra
    bound = LAUNCHES[steps["script"]].get(steps["preset"])
    if bound is None:
        pytest.skip(f"no bound is stated; it launches {total:,}")
    assert total <= bound


# ------------------------------------------------------------------------------------------------
# FlexAttention
# ------------------------------------------------------------------------------------------------

def test_attention_is_compiled_for_each_kind_of_card_and_fits_its_registers(said):
    """Capabilities 8.0, 8.6, 8.9, 9.0 and 12.0; heads as wide as those of the presets."""
    cards = [f"{card}={','.join(map(str, widths))}" for card, widths in STACK.items()]
    found = {(kernels["card"], kernels["width"]): kernels
             for kernels in said("make_believe_attention.py", *cards)}
    assert {kernels["attention"] for kernels in found.values()} == {"FlexAttention"}
    for card, widths in STACK.items():
        for width, bounds in widths.items():
            # one kernel goes forward, one backward
            kernels = found[card, width]["kernels"].values()
            stacks = [max(made["STACK"] + made["LOCAL"] for made in kernel) for kernel in kernels]
            assert len(stacks) == 2, (card, width, stacks)
            assert stacks[0] <= bounds[0] and stacks[1] <= bounds[1], (card, width, stacks)
