"""Secrets of the environment never reach a file or a log."""

import json
import os
import re

# of variables: MY_TOKEN, API_KEY, DB_PASSWORD; BATCH_TOKENS and TOKENIZER are none, nor is PWD, a folder
SECRET = re.compile(r"(?:^|_)(?:\w*TOKEN|\w*KEY|SECRETS?|PASS|PASSW\w*|(?<=_)PWD|PASSPHRASE|CREDENTIALS?|PAT)"
                    r"(?:_|$)", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """The text, with values of the environment's tokens, keys and passwords replaced by their names.

    They are found as they are, in JSON and in a shell's quotes. A number, which could stand anywhere, is no
    secret.
    """
    secrets = [(value, name) for name, value in os.environ.items()
               if len(value) >= 8 and not value.isdigit() and SECRET.search(name)]
    # the longest first, since one may hold another
    for value, name in sorted(secrets, reverse=True, key=lambda secret: len(secret[0])):
        for form in (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1],
                     value.replace("'", "'\"'\"'")):
            text = text.replace(form, f"[{name}]")
    return re.sub(r"\bhf_[A-Za-z0-9]{20,}", "[a Hugging Face token]", text)
