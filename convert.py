"""A run's weights as a folder that the library transformers reads, and GPT-2's weights from there as a run.

    python convert.py to_transformers experiments/RUN                   leaves experiments/RUN/transformers
    python convert.py from_transformers FOLDER --tokenizer gpt2         leaves experiments/DATE_TIME_gpt2

The first needs a run of train_nanogpt.py or train_llama3.py with --save_model; train_gpt.py's model is not
one that transformers knows. After it, with transformers installed,

    model = AutoModelForCausalLM.from_pretrained("experiments/RUN/transformers")

gives the same logits. The second makes a run folder of any GPT-2 in model.safetensors (such as the one that
OpenAI published), to be sampled from (train_nanogpt.py --sample) and scored (download_hellaswag.py --score).
"""

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from benchtop import places
from benchtop.command_line import Parser, command
from benchtop.errors import UserError
from benchtop.files import whole_file, whole_path, write_text
from benchtop.folder import load_script, new_folder, read_object, read_weights
from benchtop.identity import facts_about_code, tokenizer_meta
from benchtop.redaction import without_secrets
from benchtop.tokenizer import END_OF_TEXT, load_tokenizer, tokenizer_sha256

if TYPE_CHECKING:
    from torch import Tensor

# what train_nanogpt.py has no knob for
BUILT_IN = ("activation_function", "layer_norm_epsilon", "tie_word_embeddings", "scale_attn_weights",
            "scale_attn_by_inverse_layer_idx", "add_cross_attention")


def to_transformers(run: Path) -> Path:
    """Write RUN/transformers: config.json, model.safetensors and the tokenizer.

    raises  UserError if transformers has no such model, or the run left no weights
    """
    script = load_script(run)
    if not hasattr(script, "transformers_names"):
        raise UserError(f"transformers has no model like that of {Path(script.__file__).name}; runs of "
                        "train_nanogpt.py and train_llama3.py can be converted")
    from safetensors.torch import save_file

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
            weight = weight[:cfg.vocab_size]        # columns behind are no tokens
        tensors[theirs] = (weight.T if transposed else weight).contiguous()
    with whole_path(folder / "model.safetensors") as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    ends = {"bos_token_id": tokenizer.eot_token, "eos_token_id": tokenizer.eot_token, "dtype": "float32"}
    write(folder / "config.json", script.transformers_config(cfg) | ends)
    own = places.TOKENIZERS / tokenizer.name / "tokenizer.json"
    if own.is_file():       # tiktoken's gpt2 has none; transformers has that one itself
        with whole_file(folder / "tokenizer.json") as file:
            file.write(own.read_bytes())
        facts = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT,
                 "eos_token": END_OF_TEXT, "model_max_length": cfg.seq_len}
        write(folder / "tokenizer_config.json", facts)
    return folder


def write(path: Path, facts: dict) -> None:
    write_text(path, without_secrets(json.dumps(facts, indent=2) + "\n"))


def from_transformers(source: Path, name: str, tokenizer_name: str) -> Path:
    """Make a run folder of a GPT-2 in the layout of transformers, in one model.safetensors.

    raises  UserError if it is no GPT-2, or not complete, or not of this tokenizer
    """
    if not (source / "config.json").is_file():
        raise UserError(f"{source} has no config.json; name a folder in the layout of transformers")
    theirs = read_object(source / "config.json")
    if theirs.get("model_type") != "gpt2":
        raise UserError(f"{source} holds a model of type {theirs.get('model_type')}; only gpt2 can be read")
    if not (source / "model.safetensors").is_file():
        raise UserError(f"{source} has no model.safetensors; fetch the weights in that format, in one file")
    import train_nanogpt as script
    tokenizer = load_tokenizer(tokenizer_name)
    try:
        knobs = script.knobs_of_transformers(theirs)
    except KeyError as error:
        raise UserError(f"{source / 'config.json'} has no {error.args[0]}") from error
    cfg = script.Config(model_name=name, tokenizer=tokenizer.name, **knobs)
    for setting, value in script.transformers_config(cfg).items():
        # where it is silent, transformers means GPT-2 as it was published, and so do we
        if setting in BUILT_IN and theirs.get(setting, value) != value:
            raise UserError(f"{source} has {setting} {theirs[setting]}; train_nanogpt.py has {value}")
    if tokenizer.n_vocab != cfg.vocab_size:
        raise UserError(f"{source} has {cfg.vocab_size:,} tokens, the tokenizer {tokenizer.name} "
                        f"{tokenizer.n_vocab:,}; name its own with --tokenizer")
    weights = our_weights(script, cfg, read_weights(source), source)
    from safetensors.torch import save_file
    folder = new_folder(name)
    with whole_path(folder / "model.safetensors") as partial:
        save_file(weights, partial)
    summary = {"status": f"converted from {source}", "model_name": name,
               **facts_about_code("train_nanogpt.py"), "tokenizer": tokenizer.name,
               "tokenizer_sha256": tokenizer_sha256(tokenizer),
               "parameters": sum(weight.numel() for weight in weights.values())}
    write(folder / "config.json", dataclasses.asdict(cfg))
    write_text(folder / "meta.json", without_secrets(tokenizer_meta(tokenizer)))
    write(folder / "summary.json", summary)
    return folder


def our_weights(script: ModuleType, cfg, theirs: "dict[str, Tensor]", source: Path) -> "dict[str, Tensor]":
    """The parameters of our model, by name and of its shapes.

    raises  UserError that names a weight that is missing or of another shape
    """
    import torch
    with torch.device("meta"):
        model = script.EXPERIMENT.Model(cfg, 0, torch.float32)
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    ours = {}
    for name, (their_name, transposed) in script.transformers_names(cfg).items():
        # OpenAI's own file lacks the first part of the names
        weight = theirs.get(their_name, theirs.get(their_name.removeprefix("transformer.")))
        if weight is None:
            raise UserError(f"{source / 'model.safetensors'} has no {their_name}; weights in several files "
                            "must be joined first")
        weight = (weight.T if transposed else weight).float()
        missing = shapes[name][0] - len(weight) if name == "embed" else 0
        weight = torch.cat([weight, weight.new_zeros(missing, *weight.shape[1:])]) if missing > 0 else weight
        if weight.shape != shapes[name]:
            raise UserError(f"{their_name} has shape {tuple(weight.shape)}; its config.json makes it "
                            f"{tuple(shapes[name])}")
        ours[name] = weight.contiguous()
    return ours


@command
def main() -> None:
    parser = Parser("Convert runs to the layout of transformers, and GPT-2 from it.")
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
