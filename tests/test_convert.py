"""convert.py: a converted model has the logits of its source, or is refused by name.

Run: ./run.sh test tests/test_convert.py
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import convert
import train_nanogpt
from benchtop import places
from benchtop.errors import UserError
from benchtop.folder import module_of, read_weights
from benchtop.knobs import known_knobs

TOKENIZER = "tiny_v300_n1073741824"     # of 301 tokens
CONFIG = {"model_type": "gpt2", "vocab_size": 301, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4}


def drawn_weights(**config) -> dict[str, torch.Tensor]:
    """The file of a GPT-2 in transformers, in which every weight matters."""
    torch.manual_seed(0)
    cfg = train_nanogpt.Config(**train_nanogpt.knobs_of_transformers(CONFIG | config))
    model = train_nanogpt.GPT2(cfg, 300)
    weights = {name: weight + 0.2 * torch.randn_like(weight) for name, weight in model.state_dict().items()}
    weights["embed"] = weights["embed"][:cfg.vocab_size]
    names = train_nanogpt.transformers_names(cfg).items()
    return {theirs: (weights[ours].T if turned else weights[ours]).contiguous()
            for ours, (theirs, turned) in names}


def saved(folder: Path, weights: dict[str, torch.Tensor], **config) -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return folder


def logits_of_run(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """(B, T, V) of the converted model, for token ids (B, T)."""
    cfg = train_nanogpt.Config(**known_knobs(folder, train_nanogpt.Config))
    model = train_nanogpt.GPT2(cfg, 300)
    model.load_state_dict(read_weights(folder))
    with torch.no_grad():
        return model.logits(model.hidden(tokens))[..., :cfg.vocab_size]


def logits_of_transformers(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float()
    with torch.no_grad():
        return model(tokens).logits


@pytest.fixture
def without_transformers(monkeypatch):
    """What names of weights and settings forbid is forbidden also where no logits can be compared."""
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda name: None)


TOKENS = torch.randint(0, 300, (3, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", [
    {"activation_function": "gelu_pytorch_tanh"}, {"activation_function": "gelu_fast"},
    {"activation_function": "gelu_accurate"}, {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
    {"n_inner": 64}, {"n_head": 8}, {"reorder_and_upcast_attn": True}], ids=str)
def test_settings_that_can_be_converted_leave_the_logits(here, config):
    source = saved(here / "theirs", drawn_weights(**config), **config)
    run = convert.from_transformers(source, "back", TOKENIZER)
    wanted = logits_of_transformers(source, TOKENS)
    torch.testing.assert_close(logits_of_run(run, TOKENS), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_read_as_it_is(here, dtype):
    weights = {name: weight.to(dtype) for name, weight in drawn_weights().items()}
    source = saved(here / "theirs", weights, dtype=str(dtype).removeprefix("torch."))
    run = convert.from_transformers(source, "back", TOKENIZER)
    wanted = logits_of_transformers(source, TOKENS)
    torch.testing.assert_close(logits_of_run(run, TOKENS), wanted, rtol=1e-4, atol=1e-4)


def test_a_head_that_is_the_embedding_and_saved_masks_are_no_obstacle(here, without_transformers):
    weights = drawn_weights()
    more = {"lm_head.weight": weights["transformer.wte.weight"].clone(),
            "transformer.h.0.attn.bias": torch.ones(1, 1, 24, 24),
            "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)}
    convert.from_transformers(saved(here / "theirs", weights | more), "back", TOKENIZER)


def test_rows_that_pad_the_vocabulary_are_cut(here, capsys):
    source = saved(here / "theirs", drawn_weights(vocab_size=320), vocab_size=320)
    run = convert.from_transformers(source, "back", TOKENIZER)
    assert "left out: the last 19 rows of the embedding" in capsys.readouterr().out
    assert json.loads((run / "config.json").read_text())["vocab_size"] == 301
    wanted = logits_of_transformers(source, TOKENS)[..., :301]
    torch.testing.assert_close(logits_of_run(run, TOKENS), wanted, rtol=1e-4, atol=1e-4)


def own_head(weights):
    weights["lm_head.weight"] = weights["transformer.wte.weight"].flip(0)


def whole_numbers(weights):
    weights["transformer.h.0.mlp.c_fc.weight"] = weights["transformer.h.0.mlp.c_fc.weight"].to(torch.int8)


def more_layers(weights):
    weights["transformer.h.2.ln_1.weight"] = torch.ones(32)


def adapter(weights):
    weights["transformer.h.0.attn.c_attn.lora_A"] = torch.ones(4, 32)


def more_tokens(weights):
    embed = weights["transformer.wte.weight"]
    weights["transformer.wte.weight"] = torch.cat([embed, torch.ones(10, 32)])


def nothing(weights):
    pass


@pytest.mark.parametrize(("spoil", "config", "word"), [
    (own_head, {}, "has an lm_head.weight of its own"), (own_head, {"tie_word_embeddings": True}, "lm_head"),
    (more_layers, {}, "does not account for: transformer.h.2.ln_1.weight"),
    (nothing, {"n_layer": 1}, r"does not account for: transformer.h.1.*and 7 more"),
    (nothing, {"n_layer": 3}, "has no transformer.h.2.ln_1.weight"),
    (adapter, {}, "does not account for: .*lora_A"), (whole_numbers, {}, "c_fc.weight .* is torch.int8"),
    (more_tokens, {}, r"wte.weight has shape \(311, 32\)"),
    (nothing, {"quantization_config": {"bits": 8}}, "has quantization_config"),
    (nothing, {"auto_map": {"AutoModel": "my.Model"}}, "has auto_map"),
    (nothing, {"activation_function": "gelu"}, "has activation_function gelu; "),
    (nothing, {"n_head": 0}, "gives num_heads 0; it must be a whole number above 0"),
    (nothing, {"n_layer": "2"}, "gives num_layers '2'"), (nothing, {"n_embd": 0}, "invalid sizes"),
    (nothing, {"n_embd": None}, "invalid sizes"), (nothing, {"n_inner": 100}, r"c_fc.weight has shape"),
    (nothing, {"vocab_size": 309}, "has 309 tokens, but the tokenizer .* has 301; give")],
    ids=lambda part: getattr(part, "__name__", str(part)))
def test_what_would_change_the_logits_is_refused_by_name(here, without_transformers, spoil, config, word):
    weights = drawn_weights()
    spoil(weights)
    with pytest.raises(UserError, match=word):
        convert.from_transformers(saved(here / "theirs", weights, **config), "back", TOKENIZER)
    assert not places.EXPERIMENTS.exists()


def test_weights_in_several_files_are_refused(here):
    source = saved(here / "theirs", drawn_weights())
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
    (source / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no model.safetensors; .* in one file"):
        convert.from_transformers(source, "back", TOKENIZER)


MY_SCRIPT = """
from train_nanogpt import *
class Mine(GPT2):
    def hidden(self, inputs):
        return super().hidden(inputs) * 1.01
EXPERIMENT = Experiment(Config, Mine, AdamW, train_gpt.train)
"""


def test_a_script_that_borrows_its_config_is_recorded_under_its_own_name(tmp_path):
    (tmp_path / "mine.py").write_text(MY_SCRIPT)
    mine = module_of(tmp_path / "mine.py").EXPERIMENT
    assert dataclasses.replace(mine, train=None).script == mine.script == tmp_path / "mine.py"


def test_a_copy_with_another_model_is_not_converted_as_if_it_were_gpt2(here, monkeypatch, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed")
    run = convert.from_transformers(saved(here / "theirs", drawn_weights()), "back", TOKENIZER)
    capsys.readouterr()
    folder = convert.to_transformers(run)
    assert "equal up to" in capsys.readouterr().out
    before = load_file(folder / "model.safetensors")
    assert all(weight.equal(before[name]) for name, weight in drawn_weights().items())
    (here / "mine.py").write_text(MY_SCRIPT)
    monkeypatch.setattr(places, "ROOT", here)
    summary = json.loads((run / "summary.json").read_text()) | {"script": "mine.py"}
    (run / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match=r"transformers computes different logits .* differ by 1.0%"):
        convert.to_transformers(run)
    assert not (folder / "model.safetensors").exists()
