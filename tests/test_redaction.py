"""Values of the environment's secrets are replaced in whatever form a file has them."""

import json
import shlex

import pytest

from benchtop.redaction import without_secrets


@pytest.mark.parametrize("name", ["HF_TOKEN", "GHTOKEN", "OPENAI_API_KEY", "APIKEY", "DB_PASSWORD", "DB_PASS",
                                  "DB_PWD", "AWS_SECRET_ACCESS_KEY", "GITHUB_PAT", "my_credentials"])
def test_names_of_secrets_are_known(monkeypatch, name):
    monkeypatch.setenv(name, "swordfish-1")
    assert without_secrets("say swordfish-1 twice") == f"say [{name}] twice"


@pytest.mark.parametrize("name", ["BATCH_TOKENS", "TOKENIZER", "PWD", "OLDPWD", "KEYBOARD", "MONKEYS"])
def test_names_of_no_secrets_are_known(monkeypatch, name):
    monkeypatch.setenv(name, "/somewhere/here")
    assert without_secrets("in /somewhere/here") == "in /somewhere/here"


@pytest.mark.parametrize("value", ['two"quotes"here', "back\\slash\\here", "пароль-мой", "two\nlines of it",
                                   "it's one word", "tab\tand é"])
def test_secrets_are_found_in_json_and_in_a_shells_quotes(monkeypatch, value):
    monkeypatch.setenv("MY_PASSWORD", value)
    forms = [value, json.dumps({"prompt": f"a {value} b"}), json.dumps([value], ensure_ascii=False, indent=2),
             shlex.join(["train_gpt.py", "--prompt", f"a {value} b"])]
    for form in forms:
        assert "[MY_PASSWORD]" in without_secrets(form), form
    assert json.loads(without_secrets(forms[1])) == {"prompt": "a [MY_PASSWORD] b"}
    assert shlex.split(without_secrets(forms[3]))[2] == "a [MY_PASSWORD] b"


def test_of_two_secrets_the_one_that_holds_the_other_goes_first(monkeypatch):
    monkeypatch.setenv("A_KEY", "swordfish")
    monkeypatch.setenv("B_KEY", "swordfish-and-more")
    assert without_secrets("swordfish-and-more swordfish") == "[B_KEY] [A_KEY]"
