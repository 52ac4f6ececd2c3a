"""Tokenizers as folders: load, save, encode, and identify them.

    tokenizers/NAME/
        ranks.tiktoken       one token per line: base64 of its bytes, space, id
        meta.json            pattern, special tokens, sizes, training text, SHA-256 of the ranks
        tokenizer.json       the same tokenizer for Hugging Face tokenizers
        merges.txt           the merges in the order in which they were learned, for people
        train_tokenizer.txt  the source code that made it
"""

import base64
import contextlib
import hashlib
import json
import os
import pickle
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import tiktoken

from benchtop import files, hub, places
from benchtop.command_line import counted
from benchtop.errors import UserError
from benchtop.held_out import Rule
from benchtop.sources import is_text

FORMAT_VERSION = 1
END_OF_TEXT = "<|endoftext|>"
ENCODE_CHARACTERS = 500_000     # longer texts are counted and encoded in parts of at most this length
SMALLEST_PART = 1000        # characters; if tiktoken panics on a part this small, the text has no tokens

# the files from which tiktoken makes GPT-2's encoding, with their SHA-256
GPT2_FILES = {
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe":
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json":
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}

GPT4 = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+")
PATTERNS = {
    "gpt4": GPT4,
    # of nanochat and autoresearch: groups of three digits would use up a small vocabulary
    "nanochat": GPT4.replace("{1,3}", "{1,2}"),
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}

DEMO_TEXT = (
    "In the beginning every letter stands alone; "
    "then the most frequent neighbours become one, again and again.\n"
    'for i in range(1024): print(f"{i:>4} costs ${i * 0.03:.2f}")   # 3.14159, 2.71828\n'
    "Unbelievably, antidisestablishmentarianism and Donaudampfschifffahrtsgesellschaft are words; "
    "naïve café 東京 🙂 too.\n"
)


# ------------------------------------------------------------------------------------------------
# Load
# ------------------------------------------------------------------------------------------------

def load_tokenizer(name: str) -> tiktoken.Encoding:
    """The tokenizer with this name; `gpt2` is tiktoken's own GPT-2 encoding.

    returns  a tiktoken Encoding whose eot_token is the id of <|endoftext|>
    raises   UserError if there is no such tokenizer, or its files are inconsistent
    """
    name = find_tokenizer(name)
    if name == "gpt2":
        return load_gpt2()
    folder = places.TOKENIZERS / name
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        ranks_file = (folder / "ranks.tiktoken").read_bytes()
        if hashlib.sha256(ranks_file).hexdigest() != meta["ranks_sha256"]:
            raise UserError(f"{folder}/ranks.tiktoken is not the file that meta.json describes (its SHA-256 "
                            f"differs); {how_to_make_again(folder)}")
        if meta["format_version"] != FORMAT_VERSION:
            raise UserError(f"{folder} has format {meta['format_version']}, "
                            f"this program reads {FORMAT_VERSION}")
        ranks = {base64.b64decode(token): int(rank)
                 for token, rank in map(bytes.split, ranks_file.splitlines())}
        if (meta["special_tokens"], meta["vocab_size"]) != ({END_OF_TEXT: len(ranks)}, len(ranks) + 1):
            raise ValueError(f"special_tokens and vocab_size do not match {len(ranks)} ranks")
        return tiktoken.Encoding(name, pat_str=meta["pattern"], mergeable_ranks=ranks,
                                 special_tokens=meta["special_tokens"], explicit_n_vocab=meta["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"the tokenizer in {folder} is damaged ({type(error).__name__}: {error}); "
                        f"{how_to_make_again(folder)}") from error


def how_to_make_again(folder: Path) -> str:
    return f"train it again after removing it with: rm -r {shlex.quote(str(folder))}"


def load_gpt2() -> tiktoken.Encoding:
    import requests
    try:
        return tiktoken.get_encoding("gpt2")
    except (requests.RequestException, OSError) as error:
        raise UserError("tiktoken could not fetch its gpt2 encoding; go online once, "
                        "or train a tokenizer with: python train_tokenizer.py") from error


def find_tokenizer(typed: str) -> str:
    """The name of a tokenizer that may be typed as `mine`, `tokenizers/mine/` or `mine_v4096_n99999`.

    Earlier versions appended the sizes of the vocabulary and the sample to the name. A folder with sizes is
    found without them if it is the only match; one without sizes is found with them if they are right.
    raises  UserError that names the closest one, if there is no such tokenizer
    """
    name = clean_name(typed)
    if name == "gpt2" or (places.TOKENIZERS / name / "meta.json").is_file():
        return name
    first, sizes = without_sizes(name)
    if sizes and sizes == sizes_of(first):
        return first
    known = known_tokenizers()
    meant = [other for other in known if without_sizes(other)[0] == name]
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise UserError(f"{name} matches several tokenizers; type the full name of one: {', '.join(meant)}")
    there = places.did_you_mean(first, {without_sizes(other)[0]: other for other in known})
    text = typed if is_text(typed) else ""
    raise UserError(f"there is no tokenizer {name}{there} make {name}: {how_to_make(name, text)}")


def without_sizes(name: str) -> tuple[str, tuple[int, int] | None]:
    """(`mine`, (4096, 99999)) for `mine_v4096_n99999`; (name, None) for a name without sizes."""
    match = re.fullmatch(r"(.+)_v(\d{1,20})_n(\d{1,20})", name)
    return (match[1], (int(match[2]), int(match[3]))) if match else (name, None)


def sizes_of(name: str) -> tuple[int, int] | None:
    """--vocabsize and --samples of an existing tokenizer; None if they cannot be read."""
    try:
        meta = json.loads((places.TOKENIZERS / name / "meta.json").read_text(encoding="utf-8"))
        return meta["vocabsize"], meta["samples"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):      # none, or a damaged one
        return None


def only_tokenizer() -> str:
    """The name of the only tokenizer, for a command that names none.

    raises  UserError if there is none, or more than one
    """
    known = known_tokenizers()
    if len(known) > 1:
        raise UserError(f"choose a tokenizer with --tokenizer: {', '.join(known)}")
    if not known:
        raise UserError(f"there is no tokenizer yet; make one with: {how_to_make('mine')}, "
                        "or use --tokenizer gpt2")
    return known[0]


def how_to_make(name: str, text: str = "") -> str:
    """The command that trains a tokenizer, on a text or on Python's standard library."""
    source = f" --source {shlex.quote(text)}" if text else ""
    return f"python train_tokenizer.py --vocabsize 4096 --name {name}{source}"


def source_of(name: str) -> str:
    """The --source of the text that a tokenizer was trained on; a placeholder if it was trained on files."""
    try:
        source = json.loads((places.TOKENIZERS / name / "meta.json").read_text(encoding="utf-8"))["source"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):      # no meta.json, or no source in it
        return "stdlib"
    return source if source in ("stdlib", *hub.CORPORA) else "YOUR_TEXTS"


def may_have_seen(manifest: dict) -> str:
    """A warning if a dataset's tokenizer may have seen its held-out documents: it was trained on another
    version of the text, or with less of it held out, or none; empty if not, or if unknown."""
    for source in manifest.get("sources", ()):      # of a mixture
        if warning := may_have_seen({"tokenizer": manifest["tokenizer"]} | source):
            return warning
    name = manifest["tokenizer"]
    try:
        there = json.loads((places.TOKENIZERS / name / "meta.json").read_text(encoding="utf-8"))
        words = {source.rpartition("-")[0] for source in (there["source"], manifest["source"])}
        rule = None if there["held_out"] is None else Rule.of_facts(there["held_out"])
        covered = rule is not None and rule.covers(Rule.of_facts(manifest["held_out"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""       # gpt2 has no folder, and what earlier versions wrote lacks these facts
    if covered or len(words) > 1:
        return ""
    if there["source"] == manifest["source"]:
        return (f"the tokenizer {name} was trained when less of this text was held out, so it has seen "
                "documents that are held out now; train a new one")
    return (f"the tokenizer {name} was trained on another version of this text ({there['source']}) and may "
            "have seen documents that are held out now; to rule that out, train one on this text")


def clean_name(typed: str) -> str:
    """A tokenizer's name, without its folder and without the `.pkl` of gpt-lab's tokenizers.

    raises  UserError if it is not a valid name
    """
    name = places.name_in(places.TOKENIZERS, typed)
    if name.endswith(".pkl"):
        print(f"note: tokenizers are folders now; reading {name} as {name[:-4]}", file=sys.stderr)
        name = name[:-4]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", name):
        raise UserError("a tokenizer's name may have only letters, digits, '.', '_' and '-', at most "
                        f"200, the first a letter or digit; it is {name!r}")
    return name


def name_for_new(typed: str) -> str:
    """As clean_name, for a tokenizer that is to be made; raises UserError for gpt2, too."""
    name = clean_name(typed)
    if name == "gpt2":
        raise UserError("gpt2 is the name of GPT-2's own tokenizer; choose another --name")
    return name


def known_tokenizers() -> list[str]:
    return sorted(path.parent.name for path in places.TOKENIZERS.glob("[!.]*/meta.json"))


def token_bytes(tokenizer: tiktoken.Encoding) -> list[bytes]:
    """The bytes of each token id; empty for special tokens."""
    table = [b""] * tokenizer.n_vocab
    for token, rank in tokenizer._mergeable_ranks.items():
        table[rank] = token
    return table


def ranks_file_of(tokens: list[bytes]) -> bytes:
    """The content of ranks.tiktoken for tokens in id order."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def tokenizer_sha256(tokenizer: tiktoken.Encoding) -> str:
    """The identity of a tokenizer: the SHA-256 of its ranks file followed by its pattern."""
    tokens = sorted(tokenizer._mergeable_ranks, key=tokenizer._mergeable_ranks.get)
    return hashlib.sha256(ranks_file_of(tokens) + tokenizer._pat_str.encode()).hexdigest()


# ------------------------------------------------------------------------------------------------
# Encode
# ------------------------------------------------------------------------------------------------

class CannotEncode(Exception):
    """tiktoken panics even on a small part of a text."""


def encode(tokenizer: tiktoken.Encoding, text: str) -> tuple[list[int], bool]:
    """The tokens of a text of any length, and whether it was cut where a token might have spanned the cut.

    raises  CannotEncode
    """
    tokens, was_split = [], False
    for part, cut_blindly in parts_of(text, ENCODE_CHARACTERS):
        more, cut_again = _encode_part(tokenizer, part)
        tokens += more
        was_split |= cut_blindly or cut_again
    return tokens, was_split


def parts_of(text: str, longest: int) -> Iterator[tuple[str, bool]]:
    """The text in parts of at most `longest` characters, and whether the cut after a part may change tokens.

    A cut before a space that follows a non-whitespace character changes none (see bpe.segments).
    """
    start = 0
    while len(text) - start > longest:
        end = text.rfind(" ", start + 1, start + longest + 1)
        while end > 0 and text[end - 1].isspace():
            end = text.rfind(" ", start + 1, end)
        yield (text[start:end], False) if end > 0 else (text[start:start + longest], True)
        start = end if end > 0 else start + longest
    yield text[start:], False


def _encode_part(tokenizer: tiktoken.Encoding, text: str) -> tuple[list[int], bool]:
    """As encode; if tiktoken panics, each half is encoded separately.

    The panic is not an Exception; very long runs of whitespace cause it, in the regex engine.
    raises  CannotEncode
    """
    try:
        return tokenizer.encode_ordinary(text), False
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        if len(text) < 2 * SMALLEST_PART:
            raise CannotEncode from error
    middle = len(text) // 2
    return _encode_part(tokenizer, text[:middle])[0] + _encode_part(tokenizer, text[middle:])[0], True


# ------------------------------------------------------------------------------------------------
# Save
# ------------------------------------------------------------------------------------------------

def save_tokenizer(name: str, merges: list[tuple[int, int, int | None]], tokens: list[bytes], pattern: str,
                   facts: dict, source: str) -> Path:
    """Write the folder tokenizers/NAME, which gets that name only when it is complete.

    merges  (left id, right id, count if known) of the tokens from 256 on
    source  text of the script that made it
    """
    ranks_file = ranks_file_of(tokens)
    meta = {"format_version": FORMAT_VERSION, "name": name, "pattern": pattern,
            "special_tokens": {END_OF_TEXT: len(tokens)}, "vocab_size": len(tokens) + 1,
            "eot_id": len(tokens), "ranks_sha256": hashlib.sha256(ranks_file).hexdigest(), **facts}
    partial = places.TOKENIZERS / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with files.whole_file(partial / "ranks.tiktoken") as file:
            file.write(ranks_file)
        for_huggingface = json.dumps(huggingface_json(tokens, pattern), ensure_ascii=False)
        files.write_text(partial / "tokenizer.json", for_huggingface)
        files.write_text(partial / "merges.txt", merges_table(merges, tokens, meta))
        files.write_text(partial / "train_tokenizer.txt", source)
        files.write_json(partial / "meta.json", meta)
        os.replace(partial, places.TOKENIZERS / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return places.TOKENIZERS / name


def merges_table(merges: list[tuple[int, int, int | None]], tokens: list[bytes], facts: dict) -> str:
    """The merges in the order of learning, with a header about their source and with statistics."""
    lines = [f"{len(tokens):,} tokens: the 256 bytes, and {counted(len(merges), 'merge')} of two adjacent "
             "tokens, the most frequent first.", "␣ is a space."]
    if facts.get("documents"):
        documents = counted(facts["documents"], "document")
        lines.append(f"Learned from {facts['characters']:,} characters in {documents} of {facts['source']}.")
    statistics = facts.get("statistics", {})
    if "bytes_per_token" in statistics:
        gpt2 = statistics["gpt2_bytes_per_token"]
        lines.append(f"On {statistics['held_out_bytes']:,} bytes of held-out text: "
                     f"{statistics['bytes_per_token']:.3f} bytes per token"
                     + (f" (GPT-2's tokenizer: {gpt2:.3f})" if gpt2 else "")
                     + f", {statistics['share_of_tokens_used']:.1%} of the tokens used.")
    if "longest_tokens" in statistics:
        lines.append(f"The longest tokens: {'  '.join(statistics['longest_tokens'])}")
    lines += ["", f"{'id':>6}  {'left':<20} {'right':<20} {'result':<28} {'count':>12}"]
    for rank, (left, right, count) in enumerate(merges, 256):
        times = "" if count is None else f"{count:,}"
        lines.append(f"{rank:>6}  {visible(tokens[left]):<20} {visible(tokens[right]):<20} "
                     f"{visible(tokens[rank]):<28} {times:>12}".rstrip())
    return "\n".join(lines) + "\n"


def statistics_of(tokens: list[bytes], pattern: str, held_out: list[str]) -> dict:
    """The longest tokens and, if there is held-out text, its bytes per token, compared with GPT-2's."""
    of_several_bytes = [token for token in tokens if len(set(token)) > 1]       # no runs of spaces
    longest = sorted(of_several_bytes, key=lambda token: (-len(token), token))[:10]
    statistics = {"longest_tokens": [visible(token) for token in longest]}
    if held_out:
        ids = encoded_together(encoding_of("new", pattern, tokens), held_out)
        num_bytes = sum(len(text.encode()) for text in held_out)
        statistics |= {"held_out_bytes": num_bytes, "bytes_per_token": num_bytes / len(ids),
                       "share_of_tokens_used": len(set(ids)) / len(tokens), "gpt2_bytes_per_token": None}
        gpt2 = gpt2_if_at_hand()
        if gpt2:
            statistics["gpt2_bytes_per_token"] = num_bytes / len(encoded_together(gpt2, held_out))
    return statistics


def encoded_together(tokenizer: tiktoken.Encoding, texts: list[str]) -> list[int]:
    """The concatenated tokens of all texts that tiktoken can encode."""
    tokens = []
    for text in texts:
        with contextlib.suppress(CannotEncode):
            tokens += encode(tokenizer, text)[0]
    return tokens


def encoding_of(name: str, pattern: str, tokens: list[bytes]) -> tiktoken.Encoding:
    return tiktoken.Encoding(name, pat_str=pattern, special_tokens={END_OF_TEXT: len(tokens)},
                             mergeable_ranks={token: rank for rank, token in enumerate(tokens)})


def gpt2_if_at_hand() -> tiktoken.Encoding | None:
    """GPT-2's encoding, if its files are in tiktoken's cache; nothing is downloaded."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    for url, sha256 in GPT2_FILES.items():
        path = Path(cache, hashlib.sha1(url.encode()).hexdigest())
        if not cache or not path.is_file() or files.sha256_of(path) != sha256:  # tiktoken would download it
            return None
    return load_gpt2()


def visible(token: bytes) -> str:
    """A token in readable form: spaces as ␣; backslashes and unprintable characters escaped."""
    text = token.replace(b"\\", b"\\\\").decode(errors="backslashreplace").replace("␣", "\\u2423")
    return "".join("␣" if char == " " else char if char.isprintable()
                   else char.encode("unicode_escape").decode() for char in text)


def huggingface_json(tokens: list[bytes], pattern: str) -> dict:
    """The tokenizer in the format of Hugging Face tokenizers.

    tiktoken joins two tokens whenever their bytes form a token, however that token was learned. So every
    split of a token into two others is listed as a merge, ordered by the id of the result.
    """
    letters = byte_letters()
    written = ["".join(letters[byte] for byte in token) for token in tokens]
    ids = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for token in tokens[256:]:
        ways = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = sorted((ids[left], ids[right]) for left, right in ways if left in ids and right in ids)
        merges += [[written[left], written[right]] for left, right in known]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = {"id": len(tokens), "content": END_OF_TEXT, "single_word": False, "lstrip": False,
               "rstrip": False, "normalized": False, "special": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
             "vocab": {word: rank for rank, word in enumerate(written)}, "merges": merges}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [special],
            "normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None, "decoder": byte_level, "model": model}


def byte_letters() -> list[str]:
    """A printable character for each byte, as in GPT-2's vocabulary; printable bytes represent themselves."""
    themselves = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                  *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in themselves else chr(next(others)) for byte in range(256)]


# ------------------------------------------------------------------------------------------------
# Tokenizers made by gpt-lab
# ------------------------------------------------------------------------------------------------

class PlainUnpickler(pickle.Unpickler):
    """Reads plain data such as bytes, strings, numbers and dicts; refuses to import or call anything."""

    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"it would load {module}.{name}")


def convert(path: Path, name: str | None = None) -> Path:
    """Convert a tokenizer pickled as pat_str, mergeable_ranks and script_content to a folder.

    returns  the folder
    raises   UserError if the file contains anything else; nothing in it is ever executed
    """
    name = name_for_new(name or path.stem)
    if os.path.lexists(places.TOKENIZERS / name):
        raise UserError(f"tokenizers/{name} exists; choose another --name")
    try:
        with open(path, "rb") as file:
            content = PlainUnpickler(file).load()
        pattern, ranks = content["pat_str"], content["mergeable_ranks"]
        script = content.get("script_content", "")
        tokens = sorted(ranks, key=ranks.get)
        if not (isinstance(pattern, str) and isinstance(script, str) and set(map(type, tokens)) == {bytes}
                and set(map(type, ranks.values())) == {int}
                and [ranks[token] for token in tokens] == list(range(len(tokens)))
                and sorted(tokens[:256]) == [bytes([byte]) for byte in range(256)]):
            raise ValueError("it is not a pattern with the ranks of all bytes and of tokens made of them")
        merges = [(*halves_of(token, ranks), None) for token in tokens[256:]]
        script.encode()
        encoding = encoding_of(name, pattern, tokens)
        if encoding.decode(encode(encoding, DEMO_TEXT)[0]) != DEMO_TEXT:
            raise ValueError("decoding does not restore the encoded text")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:      # an invalid pickle can raise anything
        reason = f"{type(error).__name__}: {error}"[:150]
        raise UserError(f"{path} is not a tokenizer made by gpt-lab ({reason})") from error
    facts = {"converted_from": path.name, "converted_from_sha256": files.sha256_of(path),
             "statistics": statistics_of(tokens, pattern, [])}
    with files.locked(places.TOKENIZERS / f".{name}.lock"):
        return save_tokenizer(name, merges, tokens, pattern, facts, script)


def halves_of(token: bytes, ranks: dict[bytes, int]) -> tuple[int, int]:
    """The ids of the two tokens that BPE, which joins the oldest pairs first, merges into this one.

    raises  ValueError if it is not made of two older tokens
    """
    parts = [token[place:place + 1] for place in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        place = min(range(len(joined)), key=joined.__getitem__)
        if joined[place] >= ranks[token]:
            break
        parts[place:place + 2] = [parts[place] + parts[place + 1]]
    if len(parts) != 2:
        raise ValueError(f"{visible(token[:40])} is not made of two older tokens")
    return ranks[parts[0]], ranks[parts[1]]
