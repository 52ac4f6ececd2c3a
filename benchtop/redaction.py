"""Secrets of the environment never reach a file or a log."""

import os
import re


def without_secrets(text: str) -> str:
    """The text, with values of the environment's tokens, keys and passwords replaced by their names.

    BATCH_TOKENS and TOKENIZER are no secrets, nor is a number, which could stand anywhere.
    """
    secret = r"(?:^|_)(?:TOKEN|\w*KEY|SECRETS?|PASSW\w*|PASSPHRASE|CREDENTIALS?|PAT)(?:_|$)"
    for name, value in os.environ.items():
        if len(value) >= 8 and not value.isdigit() and re.search(secret, name, re.IGNORECASE):
            text = text.replace(value, f"[{name}]")
    return re.sub(r"\bhf_[A-Za-z0-9]{20,}", "[a Hugging Face token]", text)

