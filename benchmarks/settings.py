"""The settings in which recipes are compared: one list, for trial.py and for the race.

    python benchmarks/settings.py                                      list them
    python benchmarks/settings.py minute --text books/ IDEA [IDEA ...] [flags of trial.py] [-- flags of a run]

It makes the setting's tokenizer and shards from the text unless they are there, and calls trial.py with its
flags and budget. The text is a source as download_fineweb.py takes it. The figures in experiments/ are of
100 MB of English books in four parquet files; `own1` and `own5` take documents from it until they have 1 and
5 MB.
"""

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchtop import places
from benchtop.command_line import Parser, command
from benchtop.errors import UserError
from benchtop.files import write_text
from benchtop.sources import open_source

# nothing but training and one validation at the end counts
QUIET = "--num_samples 0 --val_every 1000000 --log_every 20 --hellaswag_rows 1"


@dataclass(frozen=True)
class Setting:
    """What is trained on, by what model, for how long.

    megabytes   of the text, 0: all of it
    budget      of trial.py: how long each run takes
    """
    about: str
    flags: str
    budget: str
    vocabsize: int = 8192
    megabytes: int = 0

    @property
    def data(self) -> str:
        return f"settings_{self.megabytes or 'all'}_{self.vocabsize}"

    @property
    def words(self) -> list[str]:
        return shlex.split(f"{self.flags} {QUIET} --data {self.data}")


SETTINGS = {
    "minute": Setting("60 seconds, 6 layers of width 256",
                      "--num_layers 6 --model_dim 256 --batch_tokens 8192", "--minutes 1"),
    "long": Setting("20 minutes, 6 layers of width 256",
                    "--num_layers 6 --model_dim 256 --batch_tokens 8192", "--minutes 20"),
    "wide": Setting("20 minutes, 6 layers of width 512",
                    "--num_layers 6 --model_dim 512 --batch_tokens 8192", "--minutes 20"),
    "deep": Setting("20 minutes, 12 layers of width 192",
                    "--num_layers 12 --model_dim 192 --batch_tokens 8192", "--minutes 20"),
    "own1": Setting("1 MB of text, 4.6 epochs, 2 layers of width 128",
                    "--num_layers 2 --model_dim 128 --batch_tokens 4096", "--steps 300", 2000, 1),
    "own5": Setting("5 MB of text, four epochs, 4 layers of width 192",
                    "--num_layers 4 --model_dim 192 --batch_tokens 8192", "--steps 600", 4096, 5),
}


def prepare(setting: Setting, text: str) -> None:
    """Make the setting's tokenizer and shards, unless they are there.

    raises  UserError if there is no text to make them from
    """
    if (places.DATA / setting.data / "manifest.json").is_file():
        return
    if not text:
        raise UserError(f"{setting.data} does not exist yet; name its text with --text, as in --text books/")
    if setting.megabytes:
        text = str(cut(text, setting))
    val_tokens = [] if setting.megabytes else ["--val_tokens", "400000"]
    for words in (["train_tokenizer.py", "--source", text, "--vocabsize", str(setting.vocabsize),
                   "--samples", "134217728", "--name", setting.data],
                  ["download_fineweb.py", "--source", text, "--tokenizer", setting.data,
                   "--name", setting.data, *val_tokens]):
        if subprocess.run([sys.executable, *words], cwd=places.ROOT).returncode:
            raise UserError(f"{words[0]} could not prepare {text}; its last line says why")


def cut(text: str, setting: Setting) -> Path:
    """A folder with the first documents of a text, one file each."""
    folder = places.DATA / f"{setting.data}_text"
    folder.mkdir(parents=True, exist_ok=True)
    taken = 0
    for number, (_, document) in enumerate(open_source(text)):
        if taken >= setting.megabytes * 10**6:
            break
        write_text(folder / f"{number:06d}.txt", document)
        taken += len(document.encode())
    return folder


@command
def main() -> None:
    parser = Parser("Run trial.py in one of the settings.", epilog="All other arguments go to trial.py.")
    parser.add_argument("setting", nargs="?", choices=list(SETTINGS), help="its name; without one, list all")
    parser.add_argument("--text", default="", help="source of the text, unless it is prepared already")
    args, words = parser.parse_known_args()
    if not args.setting:
        for name, setting in SETTINGS.items():
            print(f"{name:7} {setting.about}\n        trial.py IDEA {setting.budget} -- {setting.flags}")
        return
    setting = SETTINGS[args.setting]
    prepare(setting, args.text)
    place = words.index("--") if "--" in words else len(words)
    given = {word.split("=")[0] for word in words[:place]} & {"--minutes", "--steps", "--tokens"}
    budget = [] if given else shlex.split(setting.budget)
    line = [*words[:place], *budget, "--", *setting.words, *words[place + 1:]]
    os.chdir(places.ROOT)
    os.execv(sys.executable, [sys.executable, "trial.py", *line])


if __name__ == "__main__":
    main()
