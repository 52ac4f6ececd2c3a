"""Remove the values of secret environment variables from text that goes to a file or a log."""

import json
import os
import re

# names of secret variables: MY_TOKEN, API_KEY, DB_PASSWORD; not BATCH_TOKENS, TOKENIZER or PWD (a folder)
SECRET = re.compile(r"(?:^|_)(?:\w*TOKEN|\w*KEY|SECRETS?|PASS|PASSW\w*|(?<=_)PWD|PASSPHRASE|CREDENTIALS?|PAT)"
                    r"(?:_|$)", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """The text, with the values of secret environment variables replaced by the variables' names.

    Values are found as they are, escaped in JSON and quoted for a shell. Values of fewer than 8 characters or
    of digits only are kept, since they could occur anywhere.
    """
    secrets = [(value, name) for name, value in os.environ.items()
               if len(value) >= 8 and not value.isdigit() and SECRET.search(name)]
    # the longest first, since one value may contain another
    for value, name in sorted(secrets, reverse=True, key=lambda secret: len(secret[0])):
        for form in (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1],
                     value.replace("'", "'\"'\"'")):
            text = text.replace(form, f"[{name}]")
    return re.sub(r"\bhf_[A-Za-z0-9]{20,}", "[a Hugging Face token]", text)
