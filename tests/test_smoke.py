"""--smoke: each unsound change is found, and sound ones are not. Run: ./run.sh test tests/test_smoke.py"""

import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from launch import ROOT, copy_scripts, run

from benchtop import smoke
from benchtop.errors import UserError
from train_gpt import EXPERIMENT, GPT, Config, Context, Layer

CFG = Config(vocab_size=257, num_layers=4, num_heads=2, model_dim=32, seq_len=64, batch_tokens=128)


def model_of(kind: type[GPT] = GPT) -> GPT:
    """A model whose weights all matter."""
    model = smoke.fresh_model(SimpleNamespace(Model=kind), CFG)
    smoke.stir(model)
    return model.eval()


@pytest.fixture
def changed(monkeypatch):
    """A model whose layers are changed by a function of x, Layer's own forward, and the layer."""
    def changed(layer) -> GPT:
        def forward(self, x, *others, plain=Layer.forward):
            return layer(x, lambda x: plain(self, x, *others), self)
        monkeypatch.setattr(Layer, "forward", forward)
        return model_of()
    return changed


def test_the_original_passes_each_check():
    for check in (smoke.require_gradients, smoke.require_slope, smoke.require_causal, smoke.require_apart):
        check(model_of(), CFG)


LEAKS = {
    "a mean over the row": lambda x, forward, layer: forward(x - 0.1 * x.mean(1, keepdim=True)),
    "the next token": lambda x, forward, layer: forward(x) + 0.1 * F.pad(x, (0, 0, 0, 1))[:, 1:],
    "the last token alone": lambda x, forward, layer: forward(x) + 0.1 * x[:, -1:]}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_look_into_the_future_is_found(leak, changed):
    with pytest.raises(UserError, match="positions before it"):
        smoke.require_causal(changed(LEAKS[leak]), CFG)


@pytest.mark.parametrize(("words", "layer"), [
    ("a row of the batch", lambda x, forward, layer: forward(x - 0.1 * x.mean(0, keepdim=True))),
    ("first document of a row", lambda x, forward, layer: forward(x) + 0.1 * F.pad(x, (0, 0, 1, 0))[:, :-1]),
    ("first document of a row", lambda x, forward, layer: forward(x) + 0.1 * x.cumsum(1))])
def test_a_leak_between_documents_or_rows_is_found(words, layer, changed):
    with pytest.raises(UserError, match=words):
        smoke.require_apart(changed(layer), CFG)


def test_attention_without_the_mask_of_documents_is_found(monkeypatch):
    def attend(self, q, k, v, scale):
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
    monkeypatch.setattr(Context, "attend", attend)
    smoke.require_causal(model_of(), CFG)
    with pytest.raises(UserError, match="first document of a row"):
        smoke.require_apart(model_of(), CFG)


class WithOneMore(GPT):
    """A parameter that the loss does not depend on."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.forgotten = torch.nn.Parameter(torch.ones(3))


def test_an_unused_parameter_is_found():
    with pytest.raises(UserError, match="forgotten has no gradient"):
        smoke.require_gradients(model_of(WithOneMore), CFG)


class WrongSlope(torch.autograd.Function):
    """The identity with a gradient that is too small by a tenth."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 0.9 * grad


def test_a_wrong_gradient_is_found(changed):
    with pytest.raises(UserError, match="backward pass written by hand"):
        smoke.require_slope(changed(lambda x, forward, layer: WrongSlope.apply(forward(x))), CFG)


def test_dropout_is_sound(changed):
    smoke.require_slope(changed(lambda x, forward, layer: forward(F.dropout(x, 0.2, layer.training))), CFG)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("desk")
    copy_scripts(folder)
    return folder


EDITS = {   # what is replaced, by what, and what --smoke says of it
    "state that is not saved": (
        "[piece.state[\"momentum\"] for piece in pieces]\n",
        "[self.__dict__.setdefault(piece.name, torch.zeros_like(piece.grad)) for piece in pieces]\n",
        r"same weights, bit for bit\): .* differs by up to"),
    "a term beside the loss that autograd knows": (
        "        total.add_(losses.sum())\n",
        "        total.add_(losses.sum() + 1e-3 * logits.float().logsumexp(-1).square().sum())\n",
        "edit token_losses alone"),
    "a name that does not exist": (
        "        return x + linear(hidden, self.down) ", "        return x + linear(hiden, self.down) ",
        r"NameError: name 'hiden' is not defined \(mine\.py:\d+\)")}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_script_is_refused_in_one_line(edit, desk):
    old, new, said = EDITS[edit]
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    assert source.count(old) == 1
    (desk / "mine.py").write_text(source.replace(old, new), encoding="utf-8")
    done = run(desk, "mine.py", "--smoke", expect=1)
    assert re.search(said, done.stderr.splitlines()[-1]) and "Traceback" not in done.stderr
    assert "FAILED" in done.stdout and "is sound" not in done.stdout


def test_the_script_itself_is_sound_and_leaves_nothing(desk):
    before = {path for path in desk.iterdir() if path.is_dir()}
    for script, *flags in ((EXPERIMENT.script.name,), ("train_llama3.py", "--preset", "gpt2-xl")):
        said = run(desk, script, "--smoke", *flags).stdout
        assert f"{script} is sound: 9 checks passed" in said and "FAILED" not in said
    assert {path for path in desk.iterdir() if path.is_dir()} - before <= {desk / "__pycache__"}
