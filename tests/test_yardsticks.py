"""train_nanogpt.py and train_llama3.py: other models and another optimizer on the loop of train_gpt.py.

Run: ./run.sh test tests/test_yardsticks.py
"""

import dataclasses
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from shapes import wrong_shapes
from test_resume import KEEP, assert_same_run
from tiny_runs import EAGER, ROOT, TINY, drive, newest, redirect, rows_of, run, summary_of, train_here
from torch import nn

import convert
import train_gpt
import train_llama3
import train_nanogpt
from benchtop import memory, places
from benchtop.folder import read_weights
from benchtop.knobs import known_knobs, parse_config
from benchtop.machine import World
from benchtop.run import Run, start
from benchtop.sampling import generate
from benchtop.tokenizer import load_tokenizer
from train_gpt import PRESETS

pytestmark = pytest.mark.usefixtures("no_picture")

SCRIPTS = pytest.mark.parametrize("script", [train_nanogpt, train_llama3],
                                  ids=lambda script: script.__name__)
# what makes drive.py run another script
AS = "import {script}\ntrain_gpt.main = {script}.main\n"


def small(script, **knobs) -> train_gpt.CommonConfig:
    sizes = dict(vocab_size=301, num_layers=3, num_heads=4, model_dim=32, seq_len=40, batch_tokens=80)
    return script.Config(**{**sizes, **knobs})


def model_of(script, cfg: train_gpt.CommonConfig) -> train_gpt.Model:
    return script.EXPERIMENT.Model(cfg, 300, torch.float32)


@torch.no_grad()
def logits_of(model: train_gpt.Model, tokens: torch.Tensor) -> torch.Tensor:
    """(B, T, V) for token ids (B, T), only columns of real tokens."""
    return model.logits(model.hidden(tokens))[..., :model.cfg.vocab_size]


def talkative(script, **knobs) -> train_gpt.Model:
    """A model with an eot_id of 300 whose every part matters: no weight is small, no norm or bias plain."""
    torch.manual_seed(0)
    model = model_of(script, small(script, **knobs))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    return model


def tiny_knobs(script, **knobs) -> dict:
    names = {field.name for field in dataclasses.fields(script.Config)}
    return {knob: value for knob, value in {**TINY, **knobs}.items() if knob in names}


def trained(folder: Path, script, **knobs) -> Path:
    """Train in this process, where runs go to this folder; the run's folder."""
    cfg = script.Config(**tiny_knobs(script, **knobs))
    start(script.EXPERIMENT, cfg, World(cfg))
    return Path(cfg.resume) if cfg.resume else newest(folder, cfg.model_name)


WHOLE = dict(num_heads=4, num_steps=8, micro_batch_tokens=64, save_model=True)


@pytest.fixture(scope="module")
def whole(lab) -> Callable:
    """whole(script) is its run in the lab that left weights and a checkpoint; several tests look at it."""
    runs = {}

    def whole(script) -> Path:
        if script not in runs:
            with pytest.MonkeyPatch.context() as patch:
                redirect(patch, lab, lab)
                patch.setattr("benchtop.run.remove_checkpoints", lambda *_, **__: None)
                runs[script] = trained(lab, script, **WHOLE, model_name=script.__name__)
        return runs[script]
    return whole


@pytest.fixture
def refusal_of(here, monkeypatch) -> Callable:
    """refusal_of(train_nanogpt.EXPERIMENT.main, "--sample", ...) is the one line that it ends with."""
    def refusal_of(main: Callable, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        assert isinstance(end.value.code, str) and "\n" not in end.value.code
        return end.value.code
    return refusal_of


@SCRIPTS
def test_a_run_is_like_every_other(lab, script, whole):
    name, folder = script.__name__, whole(script)
    summary, rows = summary_of(folder), rows_of(folder)
    assert summary["status"] == "finished" and summary["script"] == f"{name}.py"
    assert (folder / f"{name}.txt").read_text() == (ROOT / f"{name}.py").read_text()
    assert float(rows[-1]["val_loss"]) < math.log(301)
    spoken = run(lab, f"{name}.py", "--sample", str(folder), "--prompt", "the cat", "--sample_tokens", "9")
    assert spoken.stdout.startswith("the cat") and spoken.stderr == ""
    (lab / "quiz.jsonl").write_text(json.dumps({"ctx": "the cat", "endings": ["sat", "tree"], "label": 0}))
    scored = run(lab, "download_hellaswag.py", "--score", str(folder), "--task", "quiz.jsonl")
    assert "quiz: 1 row\n" in scored.stdout
    run(lab, "compare.py", str(folder), "--plot", "curves.png")


@SCRIPTS
def test_a_run_keeps_the_scripts_that_it_is_made_of_and_no_others(lab, script):
    """In a process of its own, since that of the tests has imported all scripts."""
    name = script.__name__
    run(lab, f"{name}.py", *[f"--{knob}={value}" for knob, value in tiny_knobs(
        script, num_heads=4, num_steps=1, num_samples=0, model_name=f"code-of-{name}").items()])
    folder = newest(lab, f"code-of-{name}")
    kept = {path.name for path in (folder / "code").glob("*.py")}
    assert set(summary_of(folder)["sources"]) == kept == {"train_gpt.py", "train_nanogpt.py", f"{name}.py"}


@SCRIPTS
def test_a_knob_of_the_other_model_is_refused(script, capsys):
    with pytest.raises(SystemExit):
        parse_config(["--muon_lr", "0.1"], script.Config)
    assert "there is no flag --muon_lr" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_config(["--help", "all"], script.Config)
    helped = capsys.readouterr().out
    assert "--learning_rate" in helped and "--num_layers" in helped
    assert not re.search("muon|embed_lr|value_embeddings|window|cooldown|logit_cap", helped)
    assert ("--num_kv_heads" in helped) == (script is train_llama3)


@SCRIPTS
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_those_of_train_gpt(script, preset):
    theirs, ours = (parse_config(["--preset", preset, "--measured_tflops", "65"], each.Config).with_size()
                    for each in (train_gpt, script))
    assert ours.model_name == f"{script.__name__.removeprefix('train_')}-{preset}"
    for knob in ("num_layers", "model_dim", "seq_len", "num_steps", "batch_tokens", "train_minutes"):
        assert getattr(ours, knob) == getattr(theirs, knob)
    assert ours.head_dim in ((64,) if script is train_nanogpt else (96, 128))


@torch.no_grad()
@SCRIPTS
def test_no_token_sees_the_future_or_another_document(script):
    model = talkative(script)
    tokens = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(0))
    tokens[0, 0] = tokens[0, 17] = 300
    logits = logits_of(model, tokens)
    for place in (5, 17, 30):
        changed = tokens.clone()
        changed[0, place] = (tokens[0, place] + 1) % 300 if place != 17 else 300
        changed[0, place + 1:] = 7
        assert logits_of(model, changed)[0, :place].equal(logits[0, :place])
    alone = logits_of(model, tokens[:, 17:])
    torch.testing.assert_close(logits[:, 17:], alone, rtol=1e-4, atol=1e-4)


@SCRIPTS
def test_texts_grow_beyond_a_row(script):
    model = talkative(script, temperature=0, sample_tokens=64)
    text = [300, 5, 6]
    for token in generate(model, [text], model.cfg)[0]:
        # GPT-2 has 40 positions, and reads the nearest 40 tokens
        read = text[-40:] if script is train_nanogpt else text
        assert token == int(logits_of(model, torch.tensor([read]))[0, -1].argmax())
        text.append(token)
    assert len(text) > 60
    if script is train_nanogpt:
        with pytest.raises(ValueError, match="40 positions; the text has 41"):
            model.hidden(torch.tensor([text[:41]]))


@SCRIPTS
def test_losses_and_gradients_are_those_of_plain_logits(script):
    model = talkative(script)
    tokens = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -1
    model(tokens, targets).backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits = model.hidden(tokens) @ model.head[:301].T
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
    plain.backward()
    torch.testing.assert_close(model(tokens, targets), plain, rtol=1e-5, atol=1e-3)
    assert set(got) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-3,
                                   msg=f"{name}: {{}}".format)


@SCRIPTS
def test_steps_are_those_of_torch_with_its_clipping(script):
    """AdamW of torch, decaying what has two dimensions, at the learning rates of the schedule."""
    cfg = small(script, num_steps=6, learning_rate=0.02, grad_clip=0.7)
    torch.manual_seed(0)
    ours, theirs = (model_of(script, cfg) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizer = script.EXPERIMENT.Optimizer(ours, cfg, World(dataclasses.replace(cfg, device="cpu")))
    flat = [parameter for parameter in theirs.parameters() if parameter.ndim < 2]
    rest = [parameter for parameter in theirs.parameters() if parameter.ndim > 1]
    rate = optimizer.lrs["decayed"]
    groups = [{"params": rest, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0}]
    # an eps above the noise in gradients that are 0 but for rounding, such as that of the bias of keys
    optimizer.eps = 1e-4
    reference = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-4)
    cut = []
    for step in range(6):
        tokens = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(step))
        for model in (ours, theirs):
            (model(tokens, tokens.roll(-1, 1)) / 80).backward()
        cut.append(float(nn.utils.clip_grad_norm_(theirs.parameters(), 0.7)) > 0.7)
        scale = optimizer.lr_scale(cfg, step, step / 6)
        for group in reference.param_groups:
            group["lr"] = rate * scale
        reference.step()
        reference.zero_grad()
        norms = optimizer.sum_gradients()
        optimizer.divide_gradients((torch.linalg.vector_norm(norms) / cfg.grad_clip).clamp(min=1))
        optimizer.step(scale)
    assert any(cut)
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-4, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize("clip", [0, 1e-5])
def test_the_loop_clips_what_is_too_long(here, clip, monkeypatch):
    """With gradients cut to almost nothing, and a sizable eps, the weights hardly move."""
    monkeypatch.setattr(train_nanogpt.AdamW, "eps", 1.0)
    rows = rows_of(trained(here, train_nanogpt, model_name="clip", grad_clip=clip, weight_decay=0,
                           learning_rate=0.1, num_steps=6))
    moved = abs(float(rows[0]["val_loss"] or rows[1]["val_loss"]) - float(rows[-1]["val_loss"]))
    assert (moved < 0.001) if clip else (moved > 0.01)
    assert float(rows[0]["grad_norm"]) > 0.1    # as it was before


@SCRIPTS
def test_the_learning_rate_climbs_in_a_line_and_falls_in_a_cosine(script):
    cfg = small(script, num_steps=1000, warmup_frac=0.1)
    optimizer = script.EXPERIMENT.Optimizer(model_of(script, cfg), cfg,
                                            World(dataclasses.replace(cfg, device="cpu")))
    scales = [optimizer.lr_scale(cfg, step, step / 1000) for step in range(1001)]
    assert 0 < scales[0] < scales[1] < scales[50] == pytest.approx(0.51)
    assert max(scales) == pytest.approx(scales[100]) == pytest.approx(1)
    assert scales[100:] == sorted(scales[100:], reverse=True)
    assert scales[550] == pytest.approx((1 + cfg.final_lr_frac) / 2)
    assert scales[1000] == pytest.approx(cfg.final_lr_frac)


def test_what_is_moved_out_of_the_decay_does_not_decay(monkeypatch):
    def group_of(name, parameter):
        return "kept" if name == "embed" or parameter.ndim < 2 else "decayed"
    monkeypatch.setattr(train_nanogpt.AdamW, "group_of", staticmethod(group_of))
    cfg = small(train_nanogpt, device="cpu")
    model = model_of(train_nanogpt, cfg)
    optimizer = train_nanogpt.AdamW(model, cfg, World(cfg))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1.0)
    shrunk = {name for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
    assert "embed" not in shrunk and {"positions", "layers.0.up.weight"} <= shrunk


@pytest.mark.parametrize("heads", range(1, 33))
def test_llama_has_heads_of_keys_for_any_number_of_heads(heads):
    cfg = small(train_llama3, num_heads=heads, model_dim=4 * heads)
    assert heads % cfg.num_kv_heads == 0 and cfg.num_kv_heads <= max(1, heads // 4)


@SCRIPTS
def test_where_memory_is_short_the_advice_is_of_knobs_that_there_are(script):
    cfg = small(script, device="cpu")
    advice = memory.memory_advice(script.EXPERIMENT, cfg, World(cfg), EAGER)
    flags = re.findall(r"--(\w+)", advice)
    assert len(flags) == 3 and set(flags) <= {field.name for field in dataclasses.fields(cfg)}


@SCRIPTS
def test_memory_counts_two_moments_of_every_weight(script, monkeypatch):
    cfg = small(script, device="cpu", micro_batch_tokens=40)
    deep = dataclasses.replace(cfg, num_layers=30)
    sizes = [sum(map(torch.Tensor.numel, model_of(script, each).parameters())) for each in (cfg, deep)]
    monkeypatch.setattr(memory, "kept_mib", lambda *_: (0, 0))
    needs = [memory.memory_estimate_mib(script.EXPERIMENT, each, World(cfg), EAGER) for each in (cfg, deep)]
    assert needs[1] - needs[0] == pytest.approx(16 * (sizes[1] - sizes[0]) / 2**20)


@SCRIPTS
def test_memory_counts_what_each_layer_keeps(script):
    """Against what autograd saves in a real pass over a row, weights and their copies left out."""
    cfg = small(script, device="cpu")

    def kept(layers: int) -> float:
        model, storages = model_of(script, dataclasses.replace(cfg, num_layers=layers)), {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor
        tokens = torch.full((1, 40), 300)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(tokens, tokens)
        for weight in (*model.parameters(), *model.buffers()):
            storages.pop(weight.untyped_storage().data_ptr(), None)
        del loss
        return sum(storage.nbytes() for storage in storages.values()) / 2**20
    counted = [memory.kept_mib(script.EXPERIMENT.Model, dataclasses.replace(cfg, num_layers=layers),
                               torch.float32, EAGER)[0] for layers in (3, 13)]
    assert counted[1] - counted[0] == pytest.approx(kept(13) - kept(3), rel=0.01)


@SCRIPTS
def test_another_script_is_named_when_it_is_to_be_sampled(script, whole, refusal_of):
    for other in {train_gpt, train_nanogpt, train_llama3} - {script}:
        said = refusal_of(other.EXPERIMENT.main, "--sample", whole(script), "--prompt", "a")
        assert f"was trained by {script.__name__}.py; use that script" in said


@pytest.mark.slow
@SCRIPTS
def test_two_processes_end_where_one_does(lab, script, whole):
    knobs = tiny_knobs(script, **WHOLE, model_name=f"two-of-{script.__name__}")
    knobs.pop("save_model")
    done = drive(lab, AS.format(script=script.__name__) + KEEP,
                 *[f"--{knob}={value}" for knob, value in knobs.items()], processes=2)
    assert not done.returncode, done.stderr
    assert_same_run(whole(script), newest(lab, knobs["model_name"]), exact=False)


class Cut(Exception):
    """The end of a run between two of its steps."""


@pytest.mark.slow
@SCRIPTS
def test_a_run_that_is_cut_off_goes_on_to_the_bit(here, script, whole, monkeypatch):
    def cut_off(run: Run, between_steps=Run.between_steps) -> None:
        between_steps(run)
        if run.step == 5:
            raise Cut
    monkeypatch.setattr("benchtop.run.remove_checkpoints", lambda *_, **__: None)
    knobs = dict(**WHOLE, model_name="cut", save_every_steps=4)
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(Run, "between_steps", cut_off)
        trained(here, script, **knobs)
    cut = newest(here, "cut")
    assert len(rows_of(cut)) == 5 and not (cut / "summary.json").exists()
    assert_same_run(whole(script), trained(here, script, **knobs, resume=str(cut)))


# ------------------------------------------------------------------------------------------------
# Their weights in transformers, and GPT-2's weights from there
# ------------------------------------------------------------------------------------------------

@SCRIPTS
def test_transformers_has_the_same_logits(lab, script, whole, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = whole(script)
    run(lab, "convert.py", "to_transformers", str(folder))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "transformers")
    ours = model_of(script, script.Config(**known_knobs(folder, script.Config)))
    ours.load_state_dict(read_weights(folder))
    tokens = torch.randint(0, 300, (3, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, logits_of(ours, tokens), rtol=1e-4, atol=1e-4)
    assert logits_of(ours, tokens).std() > 0.01
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "transformers")
    text = "the big cat sat, 42 times."
    monkeypatch.setattr(places, "TOKENIZERS", lab / "tokenizers")
    own = load_tokenizer("tiny_v300_n1073741824")
    assert tokenizer(text)["input_ids"] == own.encode_ordinary(text)
    card, facts = (folder / "transformers/README.md").read_text(), summary_of(folder)
    assert card.startswith("---\nlibrary_name: transformers\n") and f"# {facts['model_name']}\n" in card
    assert f"| parameters | {facts['parameters']:,} |" in card
    assert f"{facts['val_bpb']:.5g} bits per byte" in card
    assert facts["data_sha256"][:12] in card and "{" not in card and facts["command"] in card


def test_gpt2_comes_back_from_transformers(lab):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=301, n_positions=24, n_embd=32, n_layer=2, n_head=4, bos_token_id=300, eos_token_id=300))
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    theirs.save_pretrained(lab / "hub" / "some-gpt2")
    done = run(lab, "convert.py", "from_transformers", "hub/some-gpt2", "--name", "back",
               "--tokenizer", "tiny_v300_n1073741824")
    folder = newest(lab, "back")
    assert str(folder) in done.stdout
    ours = model_of(train_nanogpt, train_nanogpt.Config(**known_knobs(folder, train_nanogpt.Config)))
    ours.load_state_dict(read_weights(folder))
    tokens = torch.randint(0, 300, (3, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = theirs.eval()(tokens).logits
        torch.testing.assert_close(logits, logits_of(ours, tokens), rtol=1e-4, atol=1e-4)
    assert run(lab, "train_nanogpt.py", "--sample", str(folder), "--prompt", "a dog").stdout
    run(lab, "convert.py", "to_transformers", str(folder))
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "transformers")
    for name, weight in theirs.state_dict().items():
        assert weight.equal(again.state_dict()[name]), name


@pytest.mark.parametrize(("setting", "word"), [
    ({"activation_function": "relu"}, "has activation_function relu; train_nanogpt.py has gelu_new"),
    ({"layer_norm_epsilon": 0.1}, "has layer_norm_epsilon 0.1"),
    ({"tie_word_embeddings": False}, "has tie_word_embeddings False"),
    ({"scale_attn_by_inverse_layer_idx": True}, "has scale_attn_by_inverse_layer_idx True"),
    ({"n_embd": None}, "has no n_embd"), ({}, "has no transformer.ln_f.weight")])
def test_a_gpt2_that_is_built_otherwise_is_refused(here, refusal_of, setting, word):
    folder = here / "odd"
    folder.mkdir()
    config = {"model_type": "gpt2", "vocab_size": 301, "n_positions": 8, "n_embd": 8, "n_layer": 1,
              "n_head": 2, **setting}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items()
                                                    if value is not None}))
    save_file({"wte.weight": torch.zeros(301, 8), "wpe.weight": torch.zeros(8, 8)},
              folder / "model.safetensors")
    assert word in refusal_of(convert.main, "from_transformers", folder, "--tokenizer",
                              "tiny_v300_n1073741824")


def test_a_run_without_its_knobs_is_not_converted(here, whole, refusal_of):
    folder = here / "without_knobs"
    without = shutil.ignore_patterns("transformers", "config.json")
    shutil.copytree(whole(train_nanogpt), folder, ignore=without)
    said = refusal_of(convert.main, "to_transformers", folder)
    assert "config.json is missing or not what the run wrote" in said
    assert not (folder / "transformers").exists()


def test_what_cannot_be_converted_is_said_in_one_line(here, refusal_of):
    llama = here / "llama"
    llama.mkdir()
    (llama / "config.json").write_text(json.dumps({"model_type": "llama"}))
    own = train_here(here, save_model=True, num_steps=1, val_every=1)
    for direction, folder, word in [("from_transformers", llama, "of type llama; only gpt2"),
                                    ("from_transformers", "nowhere", "nowhere has no config.json"),
                                    ("to_transformers", "nowhere", "nowhere has no summary.json"),
                                    ("to_transformers", own, "no model like that of train_gpt.py")]:
        assert word in refusal_of(convert.main, direction, folder)


@SCRIPTS
def test_shape_comments_are_true(script):
    """Train and evaluate with pairwise different sizes; each tensor has the shape that its line says."""
    sizes = {"B": 2, "T": 10, "D": 96, "H": 6, "K": 16, "F": 384, "V": 192, "L": 5, "G": 3}
    cfg = script.Config(vocab_size=192, num_layers=5, num_heads=6, model_dim=96, seq_len=10, batch_tokens=20,
                        **({"num_kv_heads": 3} if script is train_llama3 else {}))
    model, tokens = script.EXPERIMENT.Model(cfg, 191), torch.randint(0, 191, (2, 10))
    assert len({*sizes.values()}) == len(sizes)
    assert wrong_shapes([script], sizes, lambda: model(tokens, tokens).backward()) == []


def test_each_holds_only_what_differs():
    lines = {path: len((ROOT / path).read_text().splitlines()) for path in ("train_nanogpt.py",
                                                                          "train_llama3.py")}
    assert all(count < 220 for count in lines.values()), lines
