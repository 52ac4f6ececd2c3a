"""A baseline for models: the size of the held-out text when `xz -9e` compresses it after the training text.

Like a model, a compressor that has read the training text may make use of it. So its score is the compressed
size of both texts together minus that of the training text alone, in bits per byte of the held-out text:

    8 * (xz(training + held-out) - xz(training)) / len(held-out)

with a window that spans both. It is computed once, when the data are made, and stored in the manifest.
"""

import importlib.util
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

MIB = 2**20
TRAINING_BYTES = 12 * MIB       # from the end of the training text
HELD_OUT_BYTES = 2 * MIB        # from the start of the held-out text; both take about 20 seconds on one core
TOKENS_AT_ONCE = 2**18


def xz_bar(train: list[np.ndarray], val: list[np.ndarray], table: list[bytes]) -> dict:
    """The manifest's facts about xz; empty if this Python has no lzma or a text is empty.

    train, val  tokens of each shard
    table       the bytes of each token
    """
    training = text_from_end(train, table, TRAINING_BYTES)
    held_out = text_from_start(val, table, HELD_OUT_BYTES)
    if not training or not held_out or not importlib.util.find_spec("_lzma"):
        return {}
    return {"xz_bpb": xz_bits_per_byte(held_out, after=training), "xz_training_bytes": len(training),
            "xz_held_out_bytes": len(held_out)}


def bar_in_words(facts: dict) -> str:
    """A description of the baseline; the facts are those of a manifest or a summary."""
    whole = (facts.get("xz_training_bytes") or 0) < TRAINING_BYTES
    return f"xz -9e after the {'' if whole else f'last {TRAINING_BYTES // MIB} MiB of the '}training text"


def xz_bits_per_byte(text: bytes, after: bytes) -> float:
    """Bits that xz -9e needs for each byte of a text that follows another one."""
    with ThreadPoolExecutor(2) as pool:         # lzma releases the GIL
        both, alone = pool.map(_packed_size, (after + text, after))
    return 8 * (both - alone) / len(text)


def _packed_size(text: bytes) -> int:
    import lzma
    window = max(4096, len(text))       # xz's default, 64 MiB, takes 674 MiB of memory and finds no more
    how = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window}
    return len(lzma.compress(text, format=lzma.FORMAT_RAW, filters=[how]))


def text_from_start(shards: list[np.ndarray], table: list[bytes], most: int) -> bytes:
    """The first `most` bytes of the text in these shards."""
    pieces = (tokens[start:start + TOKENS_AT_ONCE] for tokens in shards
              for start in range(0, len(tokens), TOKENS_AT_ONCE))
    return b"".join(_up_to(most, pieces, table))[:most]


def text_from_end(shards: list[np.ndarray], table: list[bytes], most: int) -> bytes:
    """The last `most` bytes of the text in these shards."""
    pieces = (tokens[max(0, end - TOKENS_AT_ONCE):end] for tokens in reversed(shards)
              for end in range(len(tokens), 0, -TOKENS_AT_ONCE))
    return b"".join([*_up_to(most, pieces, table)][::-1])[-most:]


def _up_to(most: int, pieces: Iterable[np.ndarray], table: list[bytes]) -> Iterator[bytes]:
    """The bytes of each piece of tokens, until there are at least `most` in total."""
    size = 0
    for piece in pieces:
        text = b"".join([table[token] for token in piece.tolist()])
        size += len(text)
        yield text
        if size >= most:
            return
