"""Export a run to the Hugging Face library transformers, or import GPT-2 weights from it as a run.

    python convert.py to_transformers experiments/RUN                   writes experiments/RUN/transformers
    python convert.py from_transformers FOLDER --tokenizer gpt2         writes experiments/DATE_TIME_gpt2

Export needs a run of train_nanogpt.py or train_llama3.py with --save_model; transformers has no model like
that of train_gpt.py. With transformers installed, this loads an exported run:

    model = AutoModelForCausalLM.from_pretrained("experiments/RUN/transformers")

The logits are the same for text without <|endoftext|> inside, which starts a new document in Benchtop. Import
takes any GPT-2 in one model.safetensors, such as OpenAI's, and makes a run folder that can be sampled from
(train_nanogpt.py --sample) and scored (download_hellaswag.py --score). If transformers is installed, both
directions compare the logits and refuse a model whose logits differ.
"""

import dataclasses
import importlib.util
import json
import re
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from benchtop import places
from benchtop.command_line import Parser, command
from benchtop.errors import UserError, first_line
from benchtop.files import save_tensors, whole_file, write_text
from benchtop.folder import load_script, new_folder, read_object, read_weights
from benchtop.identity import facts_about_code, name_some, tokenizer_meta
from benchtop.redaction import without_secrets
from benchtop.tokenizer import END_OF_TEXT, load_tokenizer, tokenizer_sha256

if TYPE_CHECKING:
    from tiktoken import Encoding
    from torch import Tensor, nn

# settings of GPT-2 that train_nanogpt.py fixes in code
BUILT_IN = ("activation_function", "layer_norm_epsilon", "tie_word_embeddings", "scale_attn_weights",
            "scale_attn_by_inverse_layer_idx", "add_cross_attention")
GELU_BY_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate")      # names of one function
ELSEWHERE = ("auto_map", "quantization_config")     # in config.json: not a plain GPT-2
NO_WEIGHT = re.compile(r".*\.attn\.(masked_)?bias")    # a causal mask, saved by old versions
PADDING = 8, 128    # a vocabulary is padded to a multiple of the first, by less than the second


def to_transformers(run: Path) -> Path:
    """Write RUN/transformers: config.json, model.safetensors, the tokenizer and a model card.

    raises  UserError if transformers has no such model, if the run has no weights, or if the logits differ
    """
    script = load_script(run)
    if not hasattr(script, "transformers_names"):
        raise UserError(f"transformers has no model like that of {Path(script.__file__).name}; runs of "
                        "train_nanogpt.py and train_llama3.py can be converted")
    from benchtop.machine import World
    from benchtop.saved import load_trained, saved_config
    cfg = saved_config(script.EXPERIMENT, run, device="cpu", dtype="float32")
    model, tokenizer = load_trained(script.EXPERIMENT, run, cfg, World(cfg))
    weights, folder = model.state_dict(), run / "transformers"
    folder.mkdir(exist_ok=True)
    tensors = {}
    for ours, (theirs, transposed) in script.transformers_names(cfg).items():
        weight = weights[ours]
        if ours in ("embed", "head"):
            weight = weight[:cfg.vocab_size]        # the rest is padding
        tensors[theirs] = (weight.T if transposed else weight).contiguous()
    save_tensors(folder / "model.safetensors", tensors, metadata={"format": "pt"})
    ends = {"bos_token_id": tokenizer.eot_token, "eos_token_id": tokenizer.eot_token, "dtype": "float32"}
    write(folder / "config.json", script.transformers_config(cfg) | ends)
    own = places.TOKENIZERS / tokenizer.name / "tokenizer.json"
    if own.is_file():       # tiktoken's gpt2 has none; transformers knows that one itself
        with whole_file(folder / "tokenizer.json") as file:
            file.write(own.read_bytes())
        facts = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT,
                 "eos_token": END_OF_TEXT, "model_max_length": cfg.seq_len}
        write(folder / "tokenizer_config.json", facts)
    try:
        compare_logits(folder, model, cfg, tokenizer)
    except UserError:
        (folder / "model.safetensors").unlink()
        raise
    write_text(folder / "README.md", without_secrets(model_card(run)))
    return folder


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- benchtop
---

# {model_name}

A language model from an experiment. It continues text. It was not trained to answer questions or to be safe,
and it repeats what is in its data, whose license this card does not know.

| | |
|---|---|
| parameters | {parameters} |
| trained on | {tokens} tokens of the data set {data} (SHA-256 {data_sha256}) |
| tokenizer | {tokenizer} (SHA-256 {tokenizer_sha256}) |
| held-out loss | {val_loss} nats per token, {val_bpb} bits per byte, {held_out_documents} documents |
| made by | Benchtop's {script}, commit {git_commit}, seed {seed} |
| on | {processes} x {device}, {dtype}, torch {torch}, {train_seconds} seconds of training |
| command | `{command}` |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
```
"""


def model_card(run: Path) -> str:
    """README.md of an exported model, with facts from the run's summary; also for the Hugging Face Hub."""
    facts = defaultdict(lambda: "not known", read_object(run / "summary.json"))
    facts |= {name: f"{value:,}" for name, value in facts.items() if isinstance(value, int)}
    facts |= {name: f"{value:,.5g}" for name, value in facts.items() if isinstance(value, float)}
    facts |= {name: facts[name][:12] for name in ("data_sha256", "tokenizer_sha256")}
    return CARD.format_map(facts)


def write(path: Path, facts: dict) -> None:
    write_text(path, without_secrets(json.dumps(facts, indent=2) + "\n"))


def compare_logits(folder: Path, model: "nn.Module", cfg, tokenizer: "Encoding") -> None:
    """Check that transformers, if installed, computes the model's logits from a folder in its layout.

    raises  UserError if the logits differ
    """
    if not importlib.util.find_spec("transformers"):
        return print("logits not compared: transformers is not installed")
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    draw, vocabulary = torch.Generator().manual_seed(0), cfg.vocab_size
    others = torch.randint(1, vocabulary, (1, min(cfg.seq_len, 64)), generator=draw)
    tokens = (tokenizer.eot_token + others) % vocabulary        # (1, T), none of them <|endoftext|>
    try:
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).float()(tokens)
            wanted = theirs.logits[..., :vocabulary]                                            # (1, T, V)
    except Exception as error:      # depends on the installed version of transformers
        if re.search("size mismatch|mismatched sizes", str(error)):     # of config.json and weights
            raise UserError(f"transformers cannot load {folder}: {first_line(error)}") from error
        return print(f"logits not compared: transformers cannot load {folder} ({first_line(error)})")
    with torch.no_grad():
        found = model.logits(model.hidden(tokens))[..., :vocabulary]                            # (1, T, V)
    error = (found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)
    if not error < 1e-3:        # float32 rounds at 1e-7, over some hundred products in a row
        raise UserError(f"transformers computes different logits for {folder} (they differ by {error:.1%} of "
                        "the largest); it has no such model")
    print(f"logits compared with those of transformers: equal up to {error:.0e} of the largest")


def from_transformers(source: Path, name: str, tokenizer_name: str) -> Path:
    """Make a run folder from a GPT-2 in the layout of transformers, with one model.safetensors.

    raises  UserError if it is not a GPT-2, is incomplete, has another tokenizer or computes other logits
    """
    import torch

    import train_nanogpt as script
    theirs, tokenizer = gpt2_settings(source), load_tokenizer(tokenizer_name)
    cfg = our_config(script, theirs, source / "config.json", model_name=name, tokenizer=tokenizer.name)
    padding = cfg.vocab_size - tokenizer.n_vocab
    if padding and not (0 < padding < PADDING[1] and cfg.vocab_size % PADDING[0] == 0):
        raise UserError(f"{source} has {cfg.vocab_size:,} tokens, but the tokenizer {tokenizer.name} "
                        f"has {tokenizer.n_vocab:,}; give the model's own with --tokenizer")
    weights = our_weights(script, cfg, read_weights(source), source)
    if padding:
        print(f"left out: the last {padding} rows of the embedding, which pad the vocabulary")
        weights["embed"] = weights["embed"][:tokenizer.n_vocab]
    cfg = dataclasses.replace(cfg, vocab_size=tokenizer.n_vocab)
    embed = weights["embed"]
    behind = embed.new_zeros(cfg.padded_vocab_size - len(embed), embed.size(1))
    weights["embed"] = torch.cat([embed, behind])
    model = script.EXPERIMENT.Model(cfg, tokenizer.eot_token, torch.float32)
    model.load_state_dict(weights)
    compare_logits(source, model, cfg, tokenizer)
    folder = new_folder(name)
    sha256 = save_tensors(folder / "model.safetensors", weights)
    summary = {"status": f"converted from {source}", "model_name": name, "weights_sha256": sha256,
               **facts_about_code("train_nanogpt.py"), "tokenizer": tokenizer.name,
               "tokenizer_sha256": tokenizer_sha256(tokenizer),
               "parameters": sum(weight.numel() for weight in weights.values())}
    write(folder / "config.json", dataclasses.asdict(cfg))
    write_text(folder / "meta.json", without_secrets(tokenizer_meta(tokenizer)))
    write(folder / "summary.json", summary)
    return folder


def gpt2_settings(source: Path) -> dict:
    """The contents of a GPT-2's config.json.

    raises  UserError if it is another model, or its weights are not in one file
    """
    if not (source / "config.json").is_file():
        raise UserError(f"{source} has no config.json; name a folder in the layout of transformers")
    theirs = read_object(source / "config.json")
    if theirs.get("model_type") != "gpt2":
        raise UserError(f"{source} holds a model of type {theirs.get('model_type')}; only gpt2 is supported")
    other = next((setting for setting in ELSEWHERE if theirs.get(setting)), None)
    if other:
        raise UserError(f"{source / 'config.json'} has {other}, so it is not a plain GPT-2; no other model "
                        "is supported")
    if not (source / "model.safetensors").is_file():
        raise UserError(f"{source} has no model.safetensors; get the weights in that format, in one file")
    return theirs


def our_config(script: ModuleType, theirs: dict, path: Path, **names: str):
    """Our Config for the same model.

    raises  UserError that names a setting that is missing or that our model does not support
    """
    try:
        knobs = script.knobs_of_transformers(theirs)
    except KeyError as error:
        raise UserError(f"{path} has no {error.args[0]}") from error
    except (TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path} has invalid sizes ({error})") from error
    for knob, value in knobs.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{path} gives {knob} {value!r}; it must be a whole number above 0")
    cfg = script.Config(**names, **knobs)
    for setting, value in script.transformers_config(cfg).items():
        # a missing setting has the value of the published GPT-2, here as in transformers
        same = GELU_BY_TANH if value in GELU_BY_TANH else (value,)
        if setting in BUILT_IN and theirs.get(setting, value) not in same:
            raise UserError(f"{path.parent} has {setting} {theirs[setting]}; train_nanogpt.py has {value}")
    return cfg


def our_weights(script: ModuleType, cfg, theirs: "dict[str, Tensor]", source: Path) -> "dict[str, Tensor]":
    """Our model's parameters by name, in our shapes except that the embedding is not padded.

    raises  UserError that names a weight that is missing, has the wrong shape or dtype, or is not used
    """
    import torch
    with torch.device("meta"):
        model = script.EXPERIMENT.Model(cfg, 0, torch.float32)
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    shapes["embed"] = torch.Size([cfg.vocab_size, cfg.model_dim])
    ours, path = {}, source / "model.safetensors"
    left = dict(theirs)
    for name, (their_name, transposed) in script.transformers_names(cfg).items():
        # names in OpenAI's own file lack the prefix
        weight = left.pop(their_name, None)
        weight = left.pop(their_name.removeprefix("transformer."), None) if weight is None else weight
        if weight is None:
            raise UserError(f"{path} has no {their_name}; weights in several files must be joined first")
        if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise UserError(f"{their_name} in {path} is {weight.dtype}; only float32, float16 and bfloat16 "
                            "are supported")
        weight = (weight.T if transposed else weight).float()
        if weight.shape != shapes[name]:
            raise UserError(f"{their_name} has shape {tuple(weight.shape)}; by config.json it must be "
                            f"{tuple(shapes[name])}")
        ours[name] = weight.contiguous()
    head = left.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head.float(), ours["embed"]):
        raise UserError(f"{path} has an lm_head.weight of its own; train_nanogpt.py uses the embedding "
                        "as its head")
    unused = [name for name in left if not NO_WEIGHT.fullmatch(name)]
    if unused:
        raise UserError(f"{path} has weights that its config.json does not account for: {name_some(unused)}")
    return ours


@command
def main() -> None:
    parser = Parser("Export a run to the format of transformers, or import GPT-2 from it.")
    parser.add_argument("direction", choices=("to_transformers", "from_transformers"), metavar="DIRECTION",
                        help="to_transformers: write RUN/transformers; from_transformers: make a run")
    parser.add_argument("folder", type=Path, help="a run of train_nanogpt.py or train_llama3.py; or a GPT-2 "
                        "in config.json and model.safetensors")
    parser.add_argument("--tokenizer", default="gpt2",
                        help="from_transformers: folder in tokenizers/, or gpt2")
    parser.add_argument("--name", default="gpt2",
                        help="from_transformers: last part of the run folder's name")
    args = parser.parse_args()
    if args.direction == "to_transformers":
        print(f"wrote {to_transformers(args.folder)}")
        return
    folder = from_transformers(args.folder, args.name, args.tokenizer)
    print(f"wrote {folder}\ntry: python train_nanogpt.py --sample {folder} --prompt \"It was\"")


if __name__ == "__main__":
    main()
