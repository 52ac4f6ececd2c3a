"""HellaSwag, ARC-easy, PIQA and LAMBADA: fetched whole or not at all, scored as a plain loop would.

Run: ./run.sh test tests/test_hellaswag.py
"""

import copy
import dataclasses
import io
import json
import math
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from fake_hub import FakeHub
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import copy_scripts, run, torchrun
from tiny_runs import TINY, flags, newest, summary_of, train_here

import download_hellaswag
from benchtop import places, saved
from benchtop.errors import UserError
from benchtop.evaluation import TokenLosses
from benchtop.knobs import comments_of
from benchtop.machine import World
from benchtop.run import tasks_of
from benchtop.saved import score
from benchtop.scoring import METRICS, hellaswag_accuracy, packed_rows
from benchtop.significance import wilson_interval
from benchtop.tasks import (
    BENCHMARKS,
    Question,
    check_rows,
    fetch_from_authors,
    open_task,
    question_of,
    read_questions,
    write_rows,
)
from benchtop.tokenizer import load_tokenizer
from train_gpt import GPT, Config

VAL, PARQUET = "data/hellaswag_val.jsonl", "data/validation-00000-of-00001.parquet"
TOKENIZER = "tiny_v300_n1073741824"


def rows_of_split(count: int = 10_042, split: str = "val") -> list[dict]:
    """Rows in the fields of the authors' files."""
    return [{"ind": 3 * number, "activity_label": "Ironing", "ctx_a": "A cat sat.",
             "ctx_b": "the dog" if number % 3 else "",
             "ctx": f"A cat sat on mat {number}. the dog", "split": split, "split_type": "indomain",
             **({"label": number % 4} if split != "test" else {}),
             "endings": [f"ran {word} {number}." for word in ("under", "on", "and then", "größer")],
             "source_id": f"activitynet~v_{number}"} for number in range(count)]


def parquet(rows: list[dict]) -> bytes:
    """The rows as the Hub has them: in another order of columns, and labels are texts."""
    raw = io.BytesIO()
    columns = {field: [row.get(field, "") for row in rows] for field in sorted(rows[0], reverse=True)}
    columns["label"] = [str(row.get("label", "")) for row in rows]
    pyarrow.parquet.write_table(pyarrow.table(columns), raw)
    return raw.getvalue()


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """A Hub that is the authors' repository, too, and a Benchtop that asks it."""
    folder = tmp_path_factory.mktemp("kit")
    copy_scripts(folder)
    fake = FakeHub()
    for script, line in (("benchtop/hub.py", "FIRST_WAIT = 0.02"),
                         ("benchtop/tasks.py", f'AUTHORS = "{fake.url}"')):
        text, count = re.subn(rf"(?m)^{line.split()[0]} = .*$", line, (folder / script).read_text())
        assert count == 1
        (folder / script).write_text(text)
    yield folder, fake
    fake.close()


@pytest.fixture
def fetch(kit, tmp_path):
    """Runs the script against the Hub, in a Benchtop without data; gives what it says."""
    folder, fake = kit
    fake.files.clear()
    fake.behave()
    shutil.rmtree(folder / "data", ignore_errors=True)
    env = fake.environment(tmp_path / "home")

    def fetch(*arguments: str, expect: int = 0, **more: str) -> str:
        done = run(folder, "download_hellaswag.py", *arguments, expect=expect, env=env | more)
        assert "Traceback" not in done.stderr
        left = {path.name for path in folder.glob("data/*")}
        assert left <= {"hellaswag_val.jsonl", "hellaswag_test.jsonl", "hellaswag_train.jsonl",
                        "arc_easy_test.jsonl", "piqa_val.jsonl", "lambada_test.jsonl"}, left
        assert not list((tmp_path / "home").rglob("*.parquet"))
        return done.stdout + done.stderr
    return fetch


@pytest.fixture
def hub_of_authors(kit):
    """The authors' repository, for code that runs in this process."""
    _, fake = kit
    fake.behave()
    return fake


def refused_from_authors(fake: FakeHub, folder: Path) -> str:
    """The one line that refuses what the authors' repository has; nothing of that is kept."""
    benchmark = dataclasses.replace(BENCHMARKS["hellaswag"], authors=fake.url)
    with pytest.raises(UserError) as refused:
        fetch_from_authors(benchmark, "hellaswag_val.jsonl", benchmark.scored, folder / "hellaswag_val.jsonl")
    assert "\n" not in str(refused.value) and not list(folder.iterdir())
    return str(refused.value)


def test_the_hub_and_the_authors_give_the_same_file(kit, fetch):
    folder, fake = kit
    rows = rows_of_split()
    fake.files["Rowan/hellaswag"] = {PARQUET: parquet(rows), "data/test-00000-of-00001.parquet": b"other"}
    assert "10,042 rows from Rowan/hellaswag at 0123" in fetch()
    from_hub = (folder / VAL).read_bytes()
    assert [json.loads(line) for line in from_hub.splitlines()] == rows
    assert "is there" in fetch()

    (folder / VAL).unlink()
    fake.files.clear()
    fake.pages["/hellaswag_val.jsonl"] = jsonl(rows)
    said = fetch()
    assert "Rowan/hellaswag (404)" in said and "trying the authors' repository" in said
    assert (folder / VAL).read_bytes() == from_hub


@pytest.mark.parametrize("faults", [["500", "rubbish", "cut"], ["html", "429"]], ids="-".join)
def test_faults_on_the_way_are_waited_out(kit, fetch, faults):
    folder, fake = kit
    rows = rows_of_split()
    fake.files["Rowan/hellaswag"][PARQUET] = parquet(rows)
    fake.pages["/hellaswag_val.jsonl"] = jsonl(rows)
    fake.faults[f"GET {PARQUET}"] = [*faults]
    said = fetch()
    assert "from Rowan/hellaswag" in said and not fake.faults[f"GET {PARQUET}"]
    assert len(re.findall("trying again|retry", said)) >= 2     # a cut download goes on without a word
    assert [json.loads(line) for line in (folder / VAL).read_text().splitlines()] == rows


@pytest.mark.parametrize(("change", "complaint"), [
    (lambda rows: rows[:-1], "has 10,041 rows instead of 10,042"),
    (lambda rows: [*rows, rows[0]], "has 10,043 rows instead of 10,042"),
    (lambda rows: [{**rows[0], "label": 4}, *rows[1:]], "line 1 .*label must be .* from 0 to 3"),
    (lambda rows: [*rows[:-1], {**rows[0], "endings": ["1", "2", "3"]}], "has 3 endings instead of 4"),
    (lambda rows: [{"text": "something else"}, *rows[1:]], "line 1 .*ctx must be a string"),
    (lambda rows: [["a list"], *rows[1:]], "line 1 .*must be an object")])
def test_what_is_not_the_split_is_not_kept(hub_of_authors, tmp_path, change, complaint):
    hub_of_authors.pages["/hellaswag_val.jsonl"] = jsonl(change(rows_of_split()))
    assert re.search(complaint, refused_from_authors(hub_of_authors, tmp_path))


def test_what_the_command_refuses_ends_in_one_line_and_is_not_kept(kit, fetch):
    folder, fake = kit
    for page, complaint in ((jsonl(rows_of_split(10_041)), "hellaswag_val.jsonl has 10,041 rows instead of "),
                            (b"<html>busy</html>", "is not JSON lines")):
        fake.pages["/hellaswag_val.jsonl"] = page
        assert re.search(rf"\ndownload_hellaswag.py: error: .*{complaint}[^\n]*\n$", fetch(expect=1))
        assert not (folder / VAL).exists()


@pytest.mark.parametrize(("page", "complaint"), [
    (b"<html>busy</html>", "is not JSON lines"), (b"\xff\xfe", "is not JSON lines"),
    (b"[" * 10**5, "is not JSON lines"), (None, "does not have .*404")])
def test_a_page_of_something_else_ends_in_one_line(hub_of_authors, tmp_path, page, complaint):
    if page:
        hub_of_authors.pages["/hellaswag_val.jsonl"] = page
    assert re.search(complaint, refused_from_authors(hub_of_authors, tmp_path))


def test_parquet_that_cannot_be_read_gives_way_to_the_authors(kit, fetch):
    folder, fake = kit
    whole = parquet(rows_of_split())
    fake.files["Rowan/hellaswag"][PARQUET] = whole[:200] + b"\xff" * 400 + whole[600:]
    fake.pages["/hellaswag_val.jsonl"] = jsonl(rows_of_split()) + b"\n"
    assert "is not a readable parquet file" in fetch()
    assert len((folder / VAL).read_text().splitlines()) == 10_042


def test_a_damaged_file_is_fetched_again(kit, fetch):
    folder, fake = kit
    fake.pages["/hellaswag_val.jsonl"] = jsonl(rows_of_split())
    fetch()
    whole = (folder / VAL).read_bytes()
    (folder / VAL).write_bytes(whole[:len(whole) // 2])
    assert "downloading it again" in fetch()
    assert (folder / VAL).read_bytes() == whole


def test_test_has_no_labels_and_offline_says_so(kit, fetch):
    folder, fake = kit
    fake.files["Rowan/hellaswag"]["data/test-00000-of-00001.parquet"] = parquet(rows_of_split(10_003, "test"))
    assert "hellaswag_test.jsonl: 10,003 rows" in fetch("--split", "test")
    assert "label" not in json.loads((folder / "data/hellaswag_test.jsonl").read_text().splitlines()[0])
    assert re.search("error: HF_HUB_OFFLINE is set; unset it", fetch(expect=1, HF_HUB_OFFLINE="1"))


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the script in this process, command("--score", ...): what it says; a refusal must be one line."""
    def command(*arguments: object, expect: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["download_hellaswag.py", *map(str, arguments)])
        capsys.readouterr()
        if not expect:
            download_hellaswag.main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as end:
            download_hellaswag.main()
        said = f"{end.value.code}\n" if isinstance(end.value.code, str) else capsys.readouterr().err
        assert said.startswith("download_hellaswag.py: error: ") and said.count("\n") == 1, said
        assert end.value.code == expect or (isinstance(end.value.code, str) and expect == 1)
        return said
    return command


@pytest.mark.parametrize(("flags", "complaint", "code"), [
    ("--splitt train", "did you mean --split", 2),
    ("--hellaswag_rows 5", "need a model to score: --score", 1),
    ("--score run --split test", "--split selects what to fetch", 1),
    ("--benchmark piqa --split test", "--split of PIQA must be validation; it is 'test'", 1),
    ("--score run --task a.jsonl --benchmark piqa", "leave out --benchmark", 1),
    ("--benchmark arc", "argument --benchmark: invalid choice: 'arc'", 2)])
def test_a_wrong_flag_ends_in_one_line(command, flags, complaint, code):
    assert complaint in command(*flags.split(), expect=code)


# ------------------------------------------------------------------------------------------------
# The other benchmarks, in their own columns
# ------------------------------------------------------------------------------------------------

WORDS = ("the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "saw", "größer", "東京", "42")


def sentence(rng: random.Random, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def arc_rows(count: int = 2_376) -> list[dict]:
    """Mostly four choices, some three or five; answers are letters or, in older exams, digits."""
    rng, rows = random.Random(0), []
    for number in range(count):
        choices = {0: 3, 1: 5}.get(number % 50, 4)
        labels = list("12345" if number % 7 == 0 else "ABCDE")[:choices]
        rows.append({"id": f"Mercury_{number}", "question": f"{sentence(rng, 12)}?",
                     "choices": {"text": [sentence(rng, 5) for _ in labels], "label": labels},
                     "answerKey": rng.choice(labels)})
    return rows


def piqa_rows(count: int = 1_838) -> list[dict]:
    rng = random.Random(1)
    return [{"goal": sentence(rng, 8), "sol1": sentence(rng, 9), "sol2": sentence(rng, 9),
             "label": number % 3 % 2} for number in range(count)]


def lambada_rows(count: int = 5_153) -> list[dict]:
    rng = random.Random(2)
    return [{"text": f'{sentence(rng, 20)}.  "{sentence(rng, 3)}" {rng.choice(WORDS)}'} for _ in range(count)]


# whose rows, where the Hub has them, what lies beside them there, and the file that they become here
OTHERS = {
    "arc_easy": (arc_rows, "allenai/ai2_arc", "ARC-Easy/test-00000-of-00001.parquet",
                 ("ARC-Easy/train-00000-of-00001.parquet", "ARC-Challenge/test-00000-of-00001.parquet"),
                 "arc_easy_test.jsonl"),
    "piqa": (piqa_rows, "ybisk/piqa@refs/convert/parquet", "plain_text/validation/0000.parquet",
             ("plain_text/train/0000.parquet", "plain_text/test/0000.parquet"), "piqa_val.jsonl"),
    "lambada": (lambada_rows, "EleutherAI/lambada_openai", "default/test/0000.parquet",
                ("de/test/0000.parquet", "en/test/0000.parquet"), "lambada_test.jsonl")}
EACH_OTHER = pytest.mark.parametrize("name", OTHERS)


def serve(fake: FakeHub, name: str, rows: list[dict]) -> None:
    _, repo, path, neighbours, _ = OTHERS[name]
    raw = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), raw)
    fake.files["ybisk/piqa"] = {"piqa.py": b"a script"}     # all that its main branch has
    fake.files[repo] = {path: raw.getvalue(), **dict.fromkeys(neighbours, b"another split or language")}


def as_questions(name: str, rows: list[dict]) -> list[Question]:
    """What is scored of rows in their own columns."""
    return [question_of(json.dumps(BENCHMARKS[name].row_here(row)), name, number, True, 1)
            for number, row in enumerate(rows, start=1)]


@EACH_OTHER
def test_each_benchmark_comes_from_its_home_on_the_hub(kit, fetch, name):
    folder, fake = kit
    rows_of, repo, _, _, file = OTHERS[name]
    serve(fake, name, rows_of())
    expected = f"data/{file}: {len(rows_of()):,} rows"
    said = fetch("--benchmark", name)
    assert f"wrote {expected} from {repo.split('@')[0]} at " in said and "SHA-256" in said
    lines, benchmark = (folder / "data" / file).read_text().splitlines(), BENCHMARKS[name]
    assert len(check_rows(lines, file, benchmark, benchmark.scored)) == len(lines) == len(rows_of())
    if name != "lambada":       # the rest is the same for each
        return
    asked = sum(fake.asked.values())
    assert expected.replace(": ", " is there already: ") in fetch("--benchmark", name)
    assert sum(fake.asked.values()) == asked

    whole = (folder / "data" / file).read_bytes()
    (folder / "data" / file).write_bytes(whole[:len(whole) // 2])
    assert "downloading it again" in fetch("--benchmark", name)
    assert (folder / "data" / file).read_bytes() == whole


def test_rows_become_what_lm_evaluation_harness_asks():
    arc = {"id": "Mercury_7", "question": "Which is hot?", "answerKey": "2",
           "choices": {"text": ["ice", "the sun", "a pond"], "label": ["1", "2", "3"]}}
    assert as_questions("arc_easy", [arc]) == [
        Question("Mercury_7", "Question: Which is hot?\nAnswer:", ("ice", "the sun", "a pond"), 1)]
    piqa = {"goal": "To boil an egg,", "sol1": "use sand.", "sol2": "use water.", "label": 1}
    assert as_questions("piqa", [piqa]) == [
        Question(1, "Question: To boil an egg,\nAnswer:", ("use sand.", "use water."), 1)]
    lambada = {"text": "He fed the cat.  The cat\nthanked the man"}
    assert as_questions("lambada", [lambada]) == [
        Question(1, "He fed the cat.  The cat\nthanked the", ("man",), 0)]


def test_the_page_has_the_rows_of_each_benchmark():
    readme = (places.ROOT / "docs/benchmarks.md").read_text()
    table = dict(re.findall(r"(?m)^\| `(\w+)` \| ([\d,]+) \|", readme))
    assert table == {name: f"{benchmark.splits[benchmark.scored].rows:,}"
                     for name, benchmark in BENCHMARKS.items()}


DAMAGE = {
    "arc_easy": [({"answerKey": "F"}, "row 5 of ARC-easy is damaged .*'F' is not in list"),
                 ({"question": None}, "row 5 of ARC-easy is damaged"),
                 ({"choices": None}, "row 5 of ARC-easy is damaged"),
                 ({"choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
                  "has 2 endings instead of 3 or 4 or 5 in row Mercury_4"),
                 ({"choices": {"text": ["a", "b", "c"], "label": list("ABCD")}, "answerKey": "D"},
                  "line 5 .*label must be the number of an ending, from 0 to 2")],
    "piqa": [({"label": 2}, "line 5 .*label must be the number of an ending, from 0 to 1"),
             ({"label": -1}, "line 5 .*from 0 to 1"),
             ({"goal": None}, "row 5 of PIQA is damaged"),
             ({"sol2": None}, "line 5 .*endings must be a list of two or more strings")],
    "lambada": [({"text": "word"}, "row 5 of LAMBADA is damaged .*no last word"),
                ({"text": "ends in a space "}, "row 5 of LAMBADA is damaged .*no last word"),
                ({"text": None}, "row 5 of LAMBADA is damaged")]}


@pytest.mark.parametrize(("name", "change", "complaint"), [
    (name, change, complaint) for name, cases in DAMAGE.items() for change, complaint in cases])
def test_a_damaged_row_is_named_in_one_line_and_nothing_kept(tmp_path, name, change, complaint):
    rows = OTHERS[name][0]()
    rows[4] |= change
    path = tmp_path / "rows.jsonl"
    with pytest.raises(UserError, match=complaint) as error:
        write_rows(rows, BENCHMARKS[name], BENCHMARKS[name].scored, path)
    assert "\n" not in str(error.value) and not path.exists()


@EACH_OTHER
def test_fewer_rows_or_another_table_are_refused(tmp_path, name):
    rows, benchmark = OTHERS[name][0](), BENCHMARKS[name]
    assert not benchmark.authors
    for refused, complaint in ((rows[:-1], f"has {len(rows) - 1:,} rows instead of {len(rows):,}"),
                               ([{"something": "else"}] * len(rows),
                                rf"row 1 of {benchmark.title} is damaged \(KeyError\(")):
        with pytest.raises(UserError, match=complaint):
            write_rows(refused, benchmark, benchmark.scored, tmp_path / OTHERS[name][-1])
        assert not list(tmp_path.iterdir())


def test_fewer_rows_another_table_or_no_home_end_in_one_line(kit, fetch):
    folder, fake = kit
    rows = arc_rows()

    def refusal() -> str:
        said = fetch("--benchmark", "arc_easy", expect=1)
        assert len(re.findall(r"(?m)^download_hellaswag.py: error: ", said)) == 1 and "authors" not in said
        assert not list((folder / "data").glob("*"))
        return said.splitlines()[-1]
    serve(fake, "arc_easy", rows[:-1])
    assert "has 2,375 rows instead of 2,376" in refusal()
    serve(fake, "arc_easy", [{"something": "else"}] * len(rows))
    assert "row 1 of ARC-easy is damaged (KeyError(" in refusal()
    serve(fake, "arc_easy", rows)
    del fake.files[OTHERS["arc_easy"][1]][OTHERS["arc_easy"][2]]
    assert "has no parquet file for the split" in refusal()
    fake.files.clear()
    assert "(404)" in refusal()


# ------------------------------------------------------------------------------------------------
# Scores
# ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def model_and_tokenizer(lab):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "TOKENIZERS", lab / "tokenizers")
        tokenizer = load_tokenizer(TOKENIZER)
    torch.manual_seed(1)
    cfg = Config(num_layers=2, num_heads=2, model_dim=16, seq_len=48, batch_tokens=48, vocab_size=301)
    model = GPT(cfg, tokenizer.eot_token)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model, tokenizer


def log_probabilities_of(model):
    def log_probabilities(inputs: np.ndarray, targets: np.ndarray, likeliest: bool = False) -> np.ndarray:
        losses_of = TokenLosses(model, World(model.cfg))
        found = losses_of(torch.from_numpy(inputs), torch.from_numpy(targets), likeliest)
        return np.stack([-found[0], found[1]]) if likeliest else -found.numpy()
    return log_probabilities


def logits_of(model, tokens: list[int]) -> torch.Tensor:
    """(T, V) logits behind each of the tokens."""
    return model.logits(model.hidden(torch.tensor([tokens]))[0]).detach()


def alone(model, tokenizer, ctx: str, ending: str) -> float:
    """An ending's log-probability by the whole logits of its own row."""
    context, tokens = tokenizer.encode_ordinary(ctx), tokenizer.encode_ordinary(" " + ending)
    logits = logits_of(model, [tokenizer.eot_token, *context, *tokens[:-1]])
    by_token = torch.log_softmax(logits.double(), -1)[-len(tokens):]
    return sum(row[token].item() for row, token in zip(by_token, tokens, strict=True))


def written_alone(model, tokenizer, ctx: str, ending: str) -> bool:
    """Whether greedy decoding goes on with the ending, found one token at a time."""
    tokens = [tokenizer.eot_token, *tokenizer.encode_ordinary(ctx)]
    for wanted in tokenizer.encode_ordinary(" " + ending):
        if logits_of(model, tokens)[-1].argmax().item() != wanted:
            return False
        tokens.append(wanted)
    return True


TEXTS = st.text(st.sampled_from("the cat sat. ünder 東 mat?  "), max_size=30)
QUESTIONS = st.lists(st.builds(Question, st.just(0), TEXTS,
                               st.lists(TEXTS, min_size=2, max_size=5).map(tuple), st.integers(0, 1)),
                     min_size=1, max_size=12)


@settings(max_examples=40)
@given(questions=QUESTIONS, rows=st.integers(1, 5))
def test_packed_candidates_score_as_they_do_alone(model_and_tokenizer, questions, rows):
    model, tokenizer = model_and_tokenizer
    scores = hellaswag_accuracy(log_probabilities_of(model), tokenizer, questions, (rows, 200))
    for question, item in zip(questions, scores.items, strict=True):
        sums = [alone(model, tokenizer, question.ctx, ending) for ending in question.endings]
        assert item["log_probabilities"] == pytest.approx(sums, abs=2e-4)
        gap = sorted(sums)[-1] - sorted(sums)[-2]
        if gap > 1e-3:
            assert item["acc"] == {"choice": int(np.argmax(sums)), "tie": False}
    assert scores.cut_contexts == 0


@pytest.mark.parametrize(("name", "shape"), [("arc_easy", (3, 128)), ("piqa", (2, 150))])
def test_each_choice_of_a_benchmark_is_that_of_a_plain_loop(model_and_tokenizer, name, shape):
    model, tokenizer = model_and_tokenizer
    rows = OTHERS[name][0](60)
    scores = hellaswag_accuracy(log_probabilities_of(model), tokenizer, as_questions(name, rows), shape)
    correct, by_characters, chance = 0, 0, 0.0
    for row, item in zip(rows, scores.items, strict=True):
        if name == "arc_easy":
            asked, answers = row["question"], row["choices"]["text"]
            right = row["choices"]["label"].index(row["answerKey"])
        else:
            asked, answers, right = row["goal"], [row["sol1"], row["sol2"]], row["label"]
        sums = np.array([alone(model, tokenizer, f"Question: {asked}\nAnswer:", answer)
                         for answer in answers])
        assert item["log_probabilities"] == pytest.approx(sums.tolist(), abs=2e-4)
        assert item["label"] == right
        correct += int(sums.argmax()) == right
        by_characters += int((sums / [len(answer) for answer in answers]).argmax()) == right
        chance += 1 / len(answers) / len(rows)
    assert scores.chance == pytest.approx(chance) and scores.perplexity is None
    for metric, number in (("acc", correct), ("acc_norm_characters", by_characters)):
        found = scores.accuracies[metric]
        assert (found.correct, found.value) == (number, number / 60)
        assert (found.low, found.high) == wilson_interval(number, 60)


@torch.no_grad()
def lover_of_words(model, tokenizer):
    """A copy of the model that prefers tokens which begin with a space."""
    model = copy.deepcopy(model)
    spaced = [token for token in range(tokenizer.eot_token)
              if re.fullmatch(rb" \w+", tokenizer.decode_single_token_bytes(token))]
    assert len(spaced) > 10
    model.head[spaced] *= 5
    return model


@pytest.mark.parametrize("shape", [(3, 160), (1, 199)])
def test_last_words_are_those_of_a_plain_greedy_loop(model_and_tokenizer, shape):
    model, tokenizer = lover_of_words(*model_and_tokenizer), model_and_tokenizer[1]
    rows = lambada_rows(120)
    for row in rows[::2]:       # half of them end in what the model writes
        context = row["text"].rsplit(" ", 1)[0]
        tokens = [tokenizer.eot_token, *tokenizer.encode_ordinary(context)]
        row["text"] = context + tokenizer.decode([logits_of(model, tokens)[-1].argmax().item()])
    questions = as_questions("lambada", rows)
    scores = hellaswag_accuracy(log_probabilities_of(model), tokenizer, questions, shape)
    nats, written = [], []
    for row, item in zip(rows, scores.items, strict=True):
        context, word = row["text"].rsplit(" ", 1)
        nats.append(-alone(model, tokenizer, context, word))
        written.append(written_alone(model, tokenizer, context, word))
        assert item["log_probabilities"] == pytest.approx([-nats[-1]], abs=2e-4)
        assert item["acc"] == {"choice": 0 if written[-1] else -1, "tie": False} and item["label"] == 0
    assert 5 < sum(written) < 115
    accuracy = scores.accuracies["acc"]
    assert list(scores.accuracies) == ["acc"] and accuracy.correct == sum(written)
    assert (accuracy.low, accuracy.high) == wilson_interval(sum(written), 120)
    assert scores.perplexity == pytest.approx(math.exp(np.mean(nats)), rel=1e-3)
    tokens = [len(tokenizer.encode_ordinary(" " + row["text"].rsplit(" ", 1)[1])) for row in rows]
    assert max(tokens) > min(tokens) == 1
    assert scores.chance == pytest.approx(np.mean([301.0 ** -number for number in tokens]))
    assert f"perplexity             {scores.perplexity:.2f}" in scores.lines()[1]
    assert scores.summary()["perplexity"] == scores.perplexity


@pytest.mark.parametrize("name", ["piqa", "lambada"])
def test_training_asks_the_model_what_this_file_does(model_and_tokenizer, name):
    model, tokenizer = lover_of_words(*model_and_tokenizer), model_and_tokenizer[1]
    questions = as_questions(name, OTHERS[name][0](100))
    with torch.no_grad():
        found = score(TokenLosses(model, World(model.cfg)), tokenizer, questions, 2, World(Config(**TINY)))
    wanted = hellaswag_accuracy(log_probabilities_of(model), tokenizer, questions, (2, 48))
    assert found.items == wanted.items and found.accuracies["acc"].correct > 0


def test_a_word_is_right_only_if_each_of_its_tokens_is_the_likeliest(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    question = Question(1, "the cat", ("größer",), 0)
    length = len(tokenizer.encode_ordinary(" größer"))
    assert length > 2
    for likeliest in (range(length), range(1, length), range(length - 1), [0, length - 1]):
        def answer(_: np.ndarray, targets: np.ndarray, asked: bool, likeliest=likeliest) -> np.ndarray:
            assert asked is True
            found = np.full((2, *targets.shape), 7.0)       # of what is not to be predicted nothing counts
            places = np.argwhere(targets >= 0)
            for number, place in enumerate(places):
                found[:, place[0], place[1]] = -0.5, number in likeliest
            return found
        scores = hellaswag_accuracy(answer, tokenizer, [question], (1, 40))
        assert scores.items[0]["acc"]["choice"] == (0 if len(likeliest) == length else -1)
        assert scores.perplexity == pytest.approx(math.exp(0.5 * length))


def test_a_hopeless_model_has_a_perplexity_all_the_same(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    scores = hellaswag_accuracy(lambda inputs, targets, asked: np.full((2, *targets.shape), -1e6), tokenizer,
                                [Question(1, "the cat", ("sat",), 0)], (1, 40))
    assert math.isfinite(scores.perplexity) and scores.accuracies["acc"].correct == 0


@settings(max_examples=40)
@given(questions=QUESTIONS, size=st.integers(2, 5))
def test_processes_add_up_to_what_one_finds(model_and_tokenizer, questions, size):
    model, tokenizer = model_and_tokenizer
    score = log_probabilities_of(model)
    whole = hellaswag_accuracy(score, tokenizer, questions, (1, 48))
    parts = []

    def keep(sums: np.ndarray) -> np.ndarray:
        parts.append(sums.copy())
        return sum(parts)
    for rank in range(size):
        last = hellaswag_accuracy(score, tokenizer, questions, (1, 48), rank, size, keep)
    assert last.items == whole.items and last.accuracies == whole.accuracies
    assert ((np.array(parts) != 0).sum(0) <= 1).all()


@given(widths=st.lists(st.integers(1, 40), max_size=200))
def test_rows_hold_each_candidate_once_and_no_more_than_they_can(widths):
    rows = packed_rows(widths, 40)
    assert sorted(number for row in rows for number in row) == list(range(len(widths)))
    assert all(sum(widths[number] for number in row) <= 40 for row in rows)
    assert len(rows) <= 11 / 9 * math.ceil(sum(widths) / 40) + 1 + sum(width > 20 for width in widths)


def fixed_scores(sums_of: dict[str, float]):
    """A model that gives each ending a sum of its own, whatever its context: sums_of[ending]."""
    def build(tokenizer, questions):
        by_tokens = {tuple(tokenizer.encode_ordinary(" " + ending)): sums_of[ending]
                     for question in questions for ending in question.endings}

        def log_probabilities(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
            scores = np.full(targets.shape, 1e9)        # where nothing is to be predicted, it must not count
            for row in range(len(targets)):
                places = np.flatnonzero(targets[row] >= 0)
                for span in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
                    if len(span):
                        scores[row, span] = by_tokens[tuple(targets[row, span].tolist())] / len(span)
            return scores
        return log_probabilities
    return build


def test_each_accuracy_divides_by_its_own_length(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    # sums divided by 1; characters 4, 12, 2; UTF-8 bytes 4, 12, 6; tokens as the tokenizer has them
    endings = ("then", "the cat sat.", "東東")
    question = Question("row", "a cat", endings, 1)
    tokens = [len(tokenizer.encode_ordinary(" " + ending)) for ending in endings]
    sums = dict(zip(endings, (-8.0, -18.0, -6.5), strict=True))
    scores = hellaswag_accuracy(fixed_scores(sums)(tokenizer, [question]), tokenizer, [question], (2, 60))
    item = scores.items[0]
    assert item["characters"] == [4, 12, 2] and item["bytes"] == [4, 12, 6] and item["tokens"] == tokens
    by_tokens = int(np.argmax(np.array([-8.0, -18.0, -6.5]) / tokens))
    assert [item[metric]["choice"] for metric in METRICS] == [2, 1, 2, by_tokens]
    assert scores.accuracies["acc"].correct == 0 and scores.accuracies["acc_norm_characters"].correct == 1


def test_ties_are_counted_and_the_first_is_the_choice(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    questions = [Question(1, "a cat", ("sat", "ran", "saw"), 0), Question(2, "a dog", ("sat", "the big"), 1)]
    sums = {"sat": -4.0, "ran": -4.0, "saw": -4.0, "the big": -3.0}
    scores = hellaswag_accuracy(fixed_scores(sums)(tokenizer, questions), tokenizer, questions, (1, 60))
    assert (scores.accuracies["acc"].ties, scores.accuracies["acc"].correct) == (1, 2)
    assert scores.chance == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert "1 ties" in scores.lines()[0]


def test_equal_endings_tie_wherever_they_are(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    questions = [Question(number, f"the cat {number} saw", ("a dog", "a dog", "sat under", "a dog"), 3)
                 for number in range(40)]
    scores = hellaswag_accuracy(log_probabilities_of(model), tokenizer, questions, (2, 32))
    for item in scores.items:
        dog, other = item["log_probabilities"][0], item["log_probabilities"][2]
        assert item["log_probabilities"] == [dog, dog, other, dog]
        assert item["acc"] == ({"choice": 0, "tie": True} if dog > other else {"choice": 2, "tie": False})
    assert scores.accuracies["acc"].ties > 0


def test_a_context_that_is_too_long_loses_its_beginning_and_is_counted(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    seen = []

    def spy(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        seen.append((inputs, targets))
        return log_probabilities_of(model)(inputs, targets)
    ctx = "the cat saw the big dog " * 20
    question = Question(0, ctx, ("sat", "ran under the mat"), 0)
    scores = hellaswag_accuracy(spy, tokenizer, [question], (1, 16))
    assert scores.cut_contexts == 2 and "2 endings had a context too long" in scores.lines()[-1]
    for inputs, targets in seen:
        ending = targets[0][targets[0] >= 0].tolist()
        full = tokenizer.encode_ordinary(ctx) + ending
        assert inputs[0].tolist() == [tokenizer.eot_token, *full[-16:-1]]


def test_an_ending_longer_than_the_model_reads_keeps_its_end(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    scores = hellaswag_accuracy(log_probabilities_of(model), tokenizer,
                                [Question(0, "", ("the cat " * 30, ""), 0)], (1, 16))
    assert scores.items[0]["tokens"][0] == 16 and (scores.cut_contexts, scores.cut_endings) == (1, 1)
    assert "1 endings are longer than the model can read" in scores.lines()[-1]


@given(trials=st.integers(1, 20_000), share=st.floats(0, 1))
def test_the_interval_holds_the_shares_that_are_within_196_deviations(trials, share):
    """Wilson's interval: the proportions p for which |x/n - p| <= z sqrt(p (1 - p) / n)."""
    successes = round(share * trials)
    low, high = wilson_interval(successes, trials)

    def deviations(p: float) -> float:
        return abs(successes / trials - p) / math.sqrt(p * (1 - p) / trials)
    assert low - 1e-12 <= successes / trials <= high + 1e-12
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            assert deviations(end) == pytest.approx(1.959964, rel=1e-4)


def test_the_interval_is_that_of_a_published_example():
    # Newcombe 1998, Statistics in Medicine 17, 857, table I: 81 of 263 and 15 of 148
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)


def test_a_sample_is_always_the_same(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_bytes(jsonl(rows_of_split(300)))
    names = [question.name for question in open_task(path, "task", 40).questions]
    assert names == [question.name for question in open_task(path, "task", 40).questions]
    # lists, so that another way of drawing them would be noticed: results of old runs must stay comparable
    assert names[:5] == [3 * number for number in sorted(random.Random(0).sample(range(300), 40))[:5]]
    assert len(set(names)) == 40 and names == sorted(names) and names != list(range(0, 120, 3))
    assert len(open_task(path, "task", 0).questions) == 300


@pytest.mark.parametrize(("line", "complaint"), [
    ('{"ctx": "a", "endings": ["b"], "label": 0}', "a list of two or more strings"),
    ('{"ctx": "a", "endings": ["b", 1], "label": 0}', "a list of two or more strings"),
    ('{"ctx": "a", "endings": ["b", "c"], "label": true}', "from 0 to 1"),
    ('{"ctx": "a", "endings": ["b", "c"], "label": -1}', "from 0 to 1"),
    ('{"ctx": "a", "endings": ["b", "c"]}', "from 0 to 1"),
    ('{"ctx": 7, "endings": ["b", "c"], "label": 1}', "ctx must be a string"),
    ('{"ctx": "a", "endings": ["b", "c"], "label": 2}', "from 0 to 1; it is 2"),
    ('{"ctx": "a", "endings": ["b", "c"], "label": "1"}', "from 0 to 1; it is '1'"),
    ('{"ctx": "a", "endings": ["b", "c"], "label": "B"}', "from 0 to 1; it is 'B'"),
    ('{"ctx": "a", "endings": ["b", "c"], "label": 1.0}', "from 0 to 1; it is 1.0"),
    ('{"ctx": "a", "endings": [], "label": 0}', "a list of two or more strings"),
    ('{"ctx": "a", "endings": "bc", "label": 0}', "a list of two or more strings"),
    ('{"question": "a", "choices": ["b", "c"], "answer": 0}', "ctx must be a string"),
    ('[{"ctx": "a", "endings": ["b", "c"], "label": 0}]', "must be an object"),
    ("ctx,endings,label", "is not JSON"), ("{", "is not JSON")])
def test_a_row_of_something_else_is_named(tmp_path, line, complaint):
    path = tmp_path / "task.jsonl"
    path.write_text('{"ctx": "a", "endings": ["b", "c"], "label": 1}\n\n' + line + "\n")
    with pytest.raises(UserError, match=rf"task.jsonl line 3 .*{complaint}"):
        read_questions(path)


ROW = '{"ctx": "a", "endings": ["b", "c"], "label": 1}'


@pytest.mark.parametrize("content", [
    ROW.encode() + b"\n", b"\xef\xbb\xbf" + ROW.encode(), ROW.encode() + b"\r\n\r\n",
    b"\n" + ROW.encode(), ROW.encode()])
def test_a_file_of_any_system_has_its_rows(tmp_path, content):
    (tmp_path / "task.jsonl").write_bytes(content)
    question, = read_questions(tmp_path / "task.jsonl")
    assert (question.ctx, question.endings, question.right) == ("a", ("b", "c"), "c")


@pytest.mark.parametrize(("content", "complaint"), [
    (ROW.encode("utf-16"), "is not UTF-8 text"), (b"", "has no rows"), (b"\n \n", "has no rows"),
    (ROW.encode()[:-9], "line 1 is not JSON"), (ROW.encode() + b"\0", "line 1 is not JSON")])
def test_a_file_of_something_else_is_named(tmp_path, content, complaint):
    (tmp_path / "task.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"task.jsonl {complaint}"):
        read_questions(tmp_path / "task.jsonl")


@pytest.mark.parametrize(("endings", "label", "is_told"), [
    (["b", "b"], 0, True), (["b", "c", "c"], 2, True), (["b", "c", "c"], 0, False), (["", "b"], 0, False)])
def test_a_right_ending_that_stands_there_twice_is_told(tmp_path, endings, label, is_told):
    row = {"ctx": "a", "endings": endings, "label": label}
    (tmp_path / "task.jsonl").write_text(f"{ROW}\n{json.dumps(row)}\n")
    note = open_task(tmp_path / "task.jsonl", "task", 0).note
    assert note == ("; in 1 the right ending is listed twice, so no model can tell which is meant" if is_told
                    else "")


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------

FEW = {"arc_easy": 150, "piqa": 100, "lambada": 200}      # rows of each, which is as good as all


@pytest.fixture
def with_others(lab, monkeypatch):
    """The lab with ARC-easy, PIQA and LAMBADA, which have only FEW rows there and in this process."""
    tasks = lab / "benchtop/tasks.py"
    real = text = tasks.read_text()
    for name, (rows_of, *_, file) in OTHERS.items():
        benchmark = BENCHMARKS[name]
        split = benchmark.splits[benchmark.scored]
        few = dataclasses.replace(split, rows=FEW[name])
        monkeypatch.setitem(BENCHMARKS, name, dataclasses.replace(benchmark, splits={benchmark.scored: few}))
        written = f'Split("{split.name}", {split.rows:_})'
        assert text.count(written) == 1
        text = text.replace(written, f'Split("{split.name}", {few.rows})')
        write_rows(rows_of(few.rows), BENCHMARKS[name], benchmark.scored, lab / "data" / file)
    tasks.write_text(text)
    yield
    tasks.write_text(real)
    for *_, file in OTHERS.values():
        (lab / "data" / file).unlink()


@pytest.fixture
def with_hellaswag(lab):
    """The lab with 10,042 rows of the right form."""
    path = lab / "data/hellaswag_val.jsonl"
    path.write_bytes(jsonl(rows_of_split()))
    yield path
    path.unlink()


def test_a_run_ends_with_hellaswag_where_it_is_here(here, with_hellaswag, capsys):
    folder = train_here(here, hellaswag_rows=20, save_model=True, model_name="scored")
    result = summary_of(folder)["benchmarks"]["hellaswag"]
    items = [json.loads(line) for line in (folder / "hellaswag.jsonl").read_text().splitlines()]
    assert len(items) == result["rows"] == 20 and result["rows_in_file"] == 10_042
    for metric in METRICS:
        correct = sum(item[metric]["choice"] == item["label"] for item in items)
        low, high = wilson_interval(correct, 20)
        assert result[metric] == {"value": correct / 20, "low": low, "high": high, "correct": correct,
                                  "ties": sum(item[metric]["tie"] for item in items)}
    said = capsys.readouterr().out
    assert "hellaswag   20 rows at the end, a fixed subset of 10,042" in said
    assert re.search(r"hellaswag   0\.\d{4} right \(0\.\d{4} to 0\.\d{4}\), .*chance 0.2500; 20 rows", said)


def items_of(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_a_run_ends_with_the_benchmarks_that_it_names(here, with_hellaswag, with_others, capsys):
    folder = train_here(here, benchmarks="all", hellaswag_rows=20, save_model=True, model_name="all")
    results = summary_of(folder)["benchmarks"]
    assert {name: result["rows"] for name, result in results.items()} == {
        "hellaswag": 20, **FEW}
    chances = {name: round(result["chance"], 3) for name, result in results.items()}
    assert chances["hellaswag"] == 0.25 and chances["piqa"] == 0.5 and chances["lambada"] < 0.004
    assert chances["arc_easy"] == pytest.approx((3 / 3 + 3 / 5 + 144 / 4) / 150, abs=1e-3)
    said = capsys.readouterr().out
    for name, result in results.items():
        items = items_of(folder, name)
        assert len(items) == result["rows"] and len(result["sha256"]) == 64
        for metric in METRICS if name != "lambada" else ["acc"]:
            correct = sum(item[metric]["choice"] == item["label"] for item in items)
            low, high = wilson_interval(correct, len(items))
            assert result[metric] == {"value": correct / len(items), "low": low, "high": high,
                                      "correct": correct, "ties": sum(item[metric]["tie"] for item in items)}
        assert f"scoring {len(items):,} rows of {BENCHMARKS[name].title}" in said
        assert re.search(rf"(?m)^{name} +0\.\d{{4}} right .*; {len(items):,} rows$", said)
    nats = [-item["log_probabilities"][0] for item in items_of(folder, "lambada")]
    assert results["lambada"]["perplexity"] == pytest.approx(math.exp(np.mean(nats)))
    assert re.search(r"(?m)^lambada +0\.\d{4} right \(.*\), perplexity \d+\.\d\d; chance 0\.0", said)


def test_only_what_is_named_is_scored_and_what_is_not_here_is_said(here, with_others, capsys):
    folder = train_here(here, benchmarks="hellaswag, piqa", num_samples=0)
    assert list(summary_of(folder)["benchmarks"]) == ["piqa"]
    assert not {path.name for path in folder.glob("*.jsonl")} & {"arc_easy.jsonl", "lambada.jsonl"}
    assert "hellaswag   not downloaded; run: python download_hellaswag.py" in capsys.readouterr().out
    (places.DATA / "arc_easy_test.jsonl").rename(places.DATA / "away")
    try:
        train_here(here, benchmarks="arc_easy", num_samples=0)
    finally:
        (places.DATA / "away").rename(places.DATA / "arc_easy_test.jsonl")
    said = capsys.readouterr().out
    assert "arc_easy    not downloaded; run: python download_hellaswag.py --benchmark arc_easy" in said
    assert "benchmarks" not in summary_of(train_here(here, benchmarks="", num_samples=0))
    assert not re.search("(?m)^(hellaswag|piqa) ", capsys.readouterr().out)
    with pytest.raises(UserError, match=r"--benchmarks must be all, or some of hella.*; it is 'piqa,ark'"):
        tasks_of(Config(benchmarks="piqa,ark"))
    names = re.findall(r"\w+", comments_of(Config)[1]["benchmarks"])
    assert {*BENCHMARKS, "all"} <= set(names)


def test_a_damaged_benchmark_stops_a_run_before_it_trains(here, with_others):
    path = places.DATA / "lambada_test.jsonl"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"lambada_test.jsonl line .* --benchmark lambada"):
        train_here(here, benchmarks="lambada")
    assert not (here / "experiments").exists()


def test_a_run_without_hellaswag_says_how_to_get_it(here, capsys):
    folder = train_here(here)
    assert "hellaswag   not downloaded; run: python download_hellaswag.py" in capsys.readouterr().out
    assert "benchmarks" not in summary_of(folder) and not (folder / "hellaswag.jsonl").exists()


def test_a_damaged_hellaswag_stops_a_run_before_it_trains(here, with_hellaswag):
    with_hellaswag.write_bytes(with_hellaswag.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"hellaswag_val.jsonl"):
        train_here(here)
    assert not (here / "experiments").exists()


@pytest.mark.slow
def test_two_processes_score_as_one_and_a_saved_run_as_at_its_end(lab, with_hellaswag):
    knobs = [*flags(hellaswag_rows=60, seed=3), "--save_model"]
    run(lab, "train_gpt.py", *knobs, "--model_name=one")
    one = newest(lab, "one")
    run(lab, *torchrun(2)[1:], "train_gpt.py", *knobs, "--model_name=two")
    two = newest(lab, "two")
    for first, second in zip(items_of(one, "hellaswag"), items_of(two, "hellaswag"), strict=True):
        assert first["log_probabilities"] == pytest.approx(second["log_probabilities"], abs=1e-3)

    at_the_end, summary = items_of(one, "hellaswag"), summary_of(one)
    (one / "hellaswag.jsonl").unlink()
    said = run(lab, *torchrun(2)[1:], "download_hellaswag.py", "--score", str(one), "--hellaswag_rows",
               "60").stdout
    assert said.count("60 rows, a fixed subset of 10,042") == 1 and "acc_norm by bytes" in said
    for first, second in zip(at_the_end, items_of(one, "hellaswag"), strict=True):
        assert first["log_probabilities"] == pytest.approx(second["log_probabilities"], abs=1e-3)
    again = summary_of(one)
    before, now = summary.pop("benchmarks")["hellaswag"], again.pop("benchmarks")["hellaswag"]
    assert now["acc"] == before["acc"] and (before["processes"], now["processes"]) == (1, 2)
    assert again == summary
    done = run(lab, *torchrun(2)[1:], "download_hellaswag.py", "--score", str(one), "--hellaswag_rows", "5",
               expect=1)
    assert done.stderr.count("would replace") == 1


@pytest.fixture
def in_lab(lab, here, monkeypatch):
    """The lab for code that runs in this process; run folders land there, too."""
    monkeypatch.setattr(places, "ROOT", lab)
    monkeypatch.setattr(places, "EXPERIMENTS", lab / "experiments")
    monkeypatch.chdir(lab)


@pytest.mark.slow
def test_another_benchmark_is_scored_by_a_saved_run_as_at_its_end(lab, with_others, in_lab, command,
                                                                    monkeypatch):
    run(lab, "train_gpt.py", *flags(benchmarks="lambada"), "--save_model", "--model_name=later")
    folder = newest(lab, "later")
    at_the_end, before = items_of(folder, "lambada"), summary_of(folder)["benchmarks"]["lambada"]
    (folder / "lambada.jsonl").unlink()
    said = run(lab, *torchrun(2)[1:], "download_hellaswag.py", "--score", str(folder), "--benchmark",
               "lambada").stdout
    assert said.count("lambada: 200 rows\nacc   ") == said.count("\nperplexity   ") == 1
    for first, second in zip(at_the_end, items_of(folder, "lambada"), strict=True):
        assert first["log_probabilities"] == pytest.approx(second["log_probabilities"], abs=1e-3)
    now = summary_of(folder)["benchmarks"]["lambada"]
    assert (before["processes"], now["processes"], now["sha256"]) == (1, 2, before["sha256"])
    assert now["acc"]["correct"] == pytest.approx(before["acc"]["correct"], abs=2)

    for name in ("piqa", "arc_easy"):
        said = command("--score", folder, "--benchmark", name, "--hellaswag_rows", "40")
        assert f"{name}: 40 rows, a fixed subset of" in said and "perplexity" not in said
        assert len(items_of(folder, name)) == summary_of(folder)["benchmarks"][name]["rows"] == 40
    table = run(lab, "compare.py", str(folder)).stdout
    assert re.search(r"lambada +lambada perplexity +piqa +arc_easy", table)

    path, away = lab / "data/piqa_val.jsonl", lab / "piqa.jsonl"
    path.rename(away)
    said = command("--score", folder, "--benchmark", "piqa", expect=1)
    taken = command("--score", folder, "--task", away, expect=1)
    away.rename(path)
    assert said.endswith("PIQA is not downloaded; fetch it with: "
                         "python download_hellaswag.py --benchmark piqa\n")
    assert "but not samples or prompts or hellaswag or arc_easy" in taken

    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    monkeypatch.setattr(saved, "WORTH_COMPILING", FEW["lambada"])
    command("--score", folder, "--benchmark", "lambada")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs + 1, "it was not compiled"
    for first, second in zip(at_the_end, items_of(folder, "lambada"), strict=True):
        assert first["log_probabilities"] == pytest.approx(second["log_probabilities"], abs=1e-3)


def test_questions_of_ones_own_are_scored_by_a_saved_run(lab, in_lab, command):
    run(lab, "train_gpt.py", *flags(model_name="own"), "--save_model")
    folder = newest(lab, "own")
    (lab / "mine.jsonl").write_text('{"ctx": "the cat", "endings": ["sat", "ran", "dog"], "label": 0}\n' * 3)
    said = command("--score", folder, "--task", "mine.jsonl")
    assert "mine: 3 rows" in said and "chance                 0.3333" in said
    assert summary_of(folder)["benchmarks"]["mine"]["rows"] == 3
    assert len((folder / "mine.jsonl").read_text().splitlines()) == 3

    def refusal(*arguments: str) -> str:
        return command(*arguments, expect=1)
    assert "fetch it with: python download_hellaswag.py" in refusal("--score", str(folder))
    assert "need a model to score" in refusal("--task", "mine.jsonl")
    assert "no summary.json" in refusal("--score", str(lab / "data"), "--task", "mine.jsonl")
    shutil.copy(lab / "mine.jsonl", lab / "samples.jsonl")
    assert "rename samples.jsonl" in refusal("--score", str(folder), "--task", "samples.jsonl")
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    assert "model.safetensors is damaged" in refusal("--score", str(folder), "--task", "mine.jsonl")
    (folder / "model.safetensors").unlink()
    assert "train it with --save_model" in refusal("--score", str(folder), "--task", "mine.jsonl")
    summary = folder / "summary.json"
    written = summary.read_text()
    (lab.parent / "evil.py").write_text("raise SystemExit('must not run')")
    for name in ("../evil.py", str(lab.parent / "evil.py"), "nothing.py"):
        summary.write_text(written.replace('"script": "train_gpt.py"', f'"script": "{name}"'))
        assert f"was trained by {name}; put that script into" in refusal("--score", str(folder), "--task",
                                                                         "mine.jsonl")


def test_a_copied_script_scores_its_own_model(lab, in_lab, command):
    script = (lab / "train_gpt.py").read_text()
    own = script.replace("hidden = F.relu(linear(rms_norm(x), self.up)).square()",
                         "hidden = F.gelu(linear(rms_norm(x), self.up))")
    assert own != script
    (lab / "my-experiment.py").write_text(own)
    (lab / "two.jsonl").write_text('{"ctx": "the cat", "endings": ["sat", "ran, dog"], "label": 0}\n' * 2)
    run(lab, "my-experiment.py", *flags(model_name="copied", num_steps=8), "--save_model")
    folder = newest(lab, "copied")

    def scores() -> list[float]:
        command("--score", folder, "--task", "two.jsonl")
        return json.loads((folder / "two.jsonl").read_text().splitlines()[0])["log_probabilities"]
    with_its_own = scores()
    summary = folder / "summary.json"
    summary.write_text(summary.read_text().replace("my-experiment.py", "train_gpt.py"))
    assert scores() != with_its_own
