"""The bar that xz sets for a model. Run: ./run.sh test tests/test_xz.py"""

import argparse
import heapq
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchtop import xz

TABLE = [bytes([byte]) for byte in range(256)] + [b"two", b""]      # the last one stands for <|endoftext|>


def shards_of(*texts: bytes) -> list[np.ndarray]:
    return [np.frombuffer(text, dtype=np.uint8).astype(np.uint16) for text in texts]


def test_the_bar_is_what_the_command_needs_for_both_texts_less_one():
    if not shutil.which("xz"):
        pytest.skip("xz is not installed")
    training, held_out = (Path(module.__file__).read_bytes() for module in (argparse, heapq))

    def size(text: bytes) -> int:
        packed = subprocess.run(["xz", "-9e", "--stdout"], input=text, capture_output=True, check=True)
        return len(packed.stdout)
    by_command = 8 * (size(training + held_out) - size(training)) / len(held_out)
    bar = xz.xz_bar(shards_of(training), shards_of(held_out), TABLE)
    assert bar["xz_bpb"] == pytest.approx(by_command, rel=0.005)        # its files grow by 4 bytes at a time
    assert (bar["xz_training_bytes"], bar["xz_held_out_bytes"]) == (len(training), len(held_out))


def test_text_that_was_seen_costs_next_to_nothing_however_far_back_it_was():
    rng = np.random.default_rng(0)
    seen = rng.bytes(100_000)
    assert xz.xz_bits_per_byte(seen, after=seen + rng.bytes(1_000_000)) < 0.05
    assert xz.xz_bits_per_byte(seen, after=rng.bytes(1_000_000)) > 7.9


@given(st.lists(st.binary(max_size=9), max_size=5), st.integers(1, 30), st.integers(1, 5))
def test_texts_are_the_beginning_or_the_end_of_all_shards(texts, most, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xz, "TOKENS_AT_ONCE", at_once)
        shards = [np.array([token for byte in text for token in (257, byte, 256)], dtype=np.uint16)
                  for text in texts]
        whole = b"".join(bytes([byte]) + b"two" for text in texts for byte in text)
        assert xz.text_from_start(shards, TABLE, most) == whole[:most]
        assert xz.text_from_end(shards, TABLE, most) == whole[-most:]


def test_long_texts_are_measured_in_part(monkeypatch):
    monkeypatch.setattr(xz, "TRAINING_BYTES", 50)
    monkeypatch.setattr(xz, "HELD_OUT_BYTES", 20)
    training, held_out = bytes(range(200)), bytes(range(100, 200))
    bar = xz.xz_bar(shards_of(training[:70], training[70:]), shards_of(held_out), TABLE)
    assert bar == {"xz_bpb": xz.xz_bits_per_byte(held_out[:20], after=training[-50:]),
                   "xz_training_bytes": 50, "xz_held_out_bytes": 20}


@pytest.mark.parametrize(("size", "words"), [
    ({}, "xz -9e after the training text"),
    ({"xz_training_bytes": None}, "xz -9e after the training text"),
    ({"xz_training_bytes": 12 * 2**20 - 1}, "xz -9e after the training text"),
    ({"xz_training_bytes": 12 * 2**20}, "xz -9e after the last 12 MiB of the training text")])
def test_the_bar_is_named_by_what_xz_has_read(size, words):
    assert xz.bar_in_words(size) == words


@pytest.mark.parametrize("training, held_out", [(b"", b"text"), (b"text", b"")])
def test_without_text_there_is_no_bar(training, held_out):
    assert xz.xz_bar(shards_of(training), shards_of(held_out), TABLE) == {}


def test_a_python_without_lzma_has_no_bar(monkeypatch):
    monkeypatch.setattr(xz.importlib.util, "find_spec", lambda name: None)
    assert xz.xz_bar(shards_of(b"text"), shards_of(b"text"), TABLE) == {}
