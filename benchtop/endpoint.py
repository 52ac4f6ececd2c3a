"""A client for servers with OpenAI's POST /chat/completions; it asks for one of three answers: A, B or tie.

Failed requests are retried a bounded number of times. The API key goes into the header and nowhere else.
"""

import contextlib
import dataclasses
import ipaddress
import json
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from tqdm import tqdm

from benchtop import hub
from benchtop.command_line import counted
from benchtop.errors import UserError

KEY_VARIABLE = "OPENAI_API_KEY"
JSON = {"Content-Type": "application/json"}
LARGEST_ANSWER = 1_000_000      # bytes
VERDICT = re.compile(r"[\W_]*(?:(?:the|final|answer|verdict|winner|continuation|is|it)[\W_]+)*"
                     r"(A|B|(?:a )?tie)[\W_]*", re.IGNORECASE)


@dataclass(frozen=True)
class Asked:
    """A pair in one order; `first` is the run (A or B) whose text is shown first, as continuation A."""
    number: int
    first: str
    body: bytes


@dataclass(frozen=True)
class Answer:
    """The judge's answer to a question, as stored in a line of the judgement's file.

    said        A, B or tie; None if no reply was one of these, and `nonsense` then quotes the last reply
    requests    number of requests that got a reply
    with_usage  number of those whose reply reported token counts
    model       name of the model that answered, according to the server
    """
    number: int
    first: str
    said: str | None
    nonsense: str
    requests: int
    with_usage: int
    tokens_in: int
    tokens_out: int
    model: str

    @property
    def preferred(self) -> str | None:
        """The run whose text is preferred (A or B), or tie; None without a verdict."""
        if self.said in ("A", "B"):
            return self.first if self.said == "A" else "AB".replace(self.first, "")
        return self.said

    def after(self, earlier: "Answer | None") -> "Answer":
        """This answer, with the cost of an earlier one to the same question added."""
        costs = ("requests", "with_usage", "tokens_in", "tokens_out")
        return self if earlier is None else dataclasses.replace(
            self, **{cost: getattr(self, cost) + getattr(earlier, cost) for cost in costs})


class Again(Exception):
    """An error that a retry may fix; `seconds` is the delay that the server asks for."""

    def __init__(self, complaint: str, seconds: float = 0.0):
        super().__init__(complaint)
        self.seconds = seconds


class Endpoint:
    """A server that answers chat completions.

    key_variable  environment variable that holds the API key, if it is set; '' sends no key
    timeout       seconds for a complete answer
    raises        UserError if the address is invalid, or the key would be sent unencrypted
    """

    def __init__(self, base_url: str, key_variable: str, timeout: int, attempts: int, at_once: int):
        import httpx2  # imported late, since that takes a while
        self.timeout, self.attempts, self.at_once = timeout, attempts, at_once
        self.stop = threading.Event()
        self.key_variable, self.key = key_variable, key_of(key_variable)
        try:
            url = httpx2.URL(base_url)
            is_address = url.scheme in ("http", "https") and url.host and (url.port or 1) < 2**16
        except (httpx2.InvalidURL, ValueError):
            is_address = False
        # a key of less than 8 characters, as for a local server, is no secret: see without_secrets()
        holds_key = len(self.key) >= 8 and self.key in base_url
        if not is_address or url.userinfo or url.query or url.fragment or holds_key:
            # the message does not repeat the address, which may hold a password
            raise UserError("--base_url must be http://HOST:PORT/PATH or https://HOST/PATH without password, "
                            "key or query, as in http://127.0.0.1:8000/v1")
        is_here = is_this_machine(url.host)
        if self.key and url.scheme == "http" and not is_here:
            raise UserError(f"the key in {key_variable} would go to {url.host} in the clear; use https://, "
                            "or --key_variable '' to send none")
        self.url = base_url.rstrip("/") + "/chat/completions"
        authorization = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        # a server on this machine is reached without the environment's proxies; redirects, which could take
        # the key elsewhere, are not followed
        self.client = httpx2.Client(headers=JSON | authorization, timeout=timeout, trust_env=not is_here,
                                    follow_redirects=False, limits=httpx2.Limits(max_connections=at_once))

    def answers(self, questions: list[Asked]) -> Iterator[Answer]:
        """Answers as they arrive, `at_once` requests at a time; the first is asked alone, to fail early.

        raises  UserError if a retry cannot help, or all attempts are used up
        """
        waiting, done = queue.SimpleQueue(), queue.SimpleQueue()
        for question in questions:
            waiting.put(question)

        def work() -> None:
            with contextlib.suppress(queue.Empty):
                while not self.stop.is_set():
                    question = waiting.get_nowait()
                    try:
                        done.put(self.ask(question))
                    except Exception as error:      # raised below; nothing more is asked
                        self.stop.set()
                        done.put(error)
        for number in range(len(questions)):
            for _ in range(1 if number == 0 else self.at_once - 1 if number == 1 else 0):
                # a daemon, so that Ctrl-C does not wait for a slow server
                threading.Thread(target=work, daemon=True).start()
            answer = done.get()
            if isinstance(answer, Exception):
                raise answer
            yield answer

    def ask(self, question: Asked) -> Answer:
        """Ask one question; retries nonsense and temporary errors, up to `attempts` requests in all."""
        said, nonsense, model = None, "", ""
        requests = with_usage = tokens_in = tokens_out = 0
        for attempt in range(1, self.attempts + 1):
            try:
                reply = self._post(question.body)
                content = content_of(reply)
            except Again as error:
                self._wait(attempt, error)
                continue
            requests += 1
            usage = usage_of(reply)
            if usage:
                with_usage += 1
                tokens_in, tokens_out = tokens_in + usage[0], tokens_out + usage[1]
            model = self._quoted(str(reply.get("model", "")))
            said = verdict_of(content)
            if said:
                break
            nonsense = self._quoted(content)
        return Answer(question.number, question.first, said, "" if said else nonsense, requests,
                      with_usage, tokens_in, tokens_out, model)

    def _wait(self, attempt: int, error: Again) -> None:
        """Wait before the next attempt; raises UserError after the last one."""
        complaint = self._quoted(str(error))
        if attempt == self.attempts:
            raise UserError(f"{self.url}: {complaint}, {counted(attempt, 'time')}; try later, or check "
                            "--base_url") from error
        seconds = hub.pause(attempt, error.seconds)
        if not self.stop.is_set():
            tqdm.write(f"{self.url}: {complaint}; trying again in {seconds:.0f} s ({attempt} of "
                       f"{self.attempts - 1})", file=sys.stderr)
        if self.stop.wait(seconds):
            raise error

    def _post(self, body: bytes) -> dict:
        """Send a request; returns the JSON object that the server replies with.

        raises  Again, or UserError if a retry cannot help
        """
        import httpx2
        begun, content = time.monotonic(), b""
        try:
            with self.client.stream("POST", self.url, content=body) as response:
                for piece in response.iter_bytes():
                    content += piece
                    if time.monotonic() - begun > self.timeout or len(content) > LARGEST_ANSWER:
                        raise Again(f"the answer exceeded {self.timeout} s or {LARGEST_ANSWER:,} bytes")
        except httpx2.TimeoutException as error:
            raise Again(f"no answer in {self.timeout} s") from error
        except (httpx2.HTTPError, ValueError) as error:     # ValueError: an invalid host name
            raise Again(self._quoted(str(error) or type(error).__name__)) from error
        try:
            reply = json.loads(content)
        except (ValueError, RecursionError):
            reply = None
        if response.is_success and isinstance(reply, dict):
            return reply
        if response.is_success:
            raise Again("the answer is not a JSON object")
        complaint = self._quoted(f"{response.status_code} {response.reason_phrase}{message_in(reply)}")
        if response.status_code in (408, 409, 425, 429) or response.status_code >= 500:
            raise Again(complaint, hub.seconds_asked(response))
        raise UserError(f"{self.url}: {complaint}; {self._advice(response.status_code)}")

    def _advice(self, status: int) -> str:
        if status in (401, 403):
            return (f"check the key in {self.key_variable} and its permissions" if self.key else
                    f"set {self.key_variable or KEY_VARIABLE} to an API key")
        return ("check --base_url, which often ends in /v1, and --model, which must accept max_tokens and "
                "temperature 0")

    def _quoted(self, text: str) -> str:
        """The server's text as one short line; the key, which it may repeat, is replaced."""
        if self.key:
            text = text.replace(self.key, f"[{self.key_variable}]")
        return " ".join("".join(char if char.isprintable() else " " for char in text).split())[:200]


def key_of(variable: str) -> str:
    """The key in an environment variable; empty if `variable` is, or if OPENAI_API_KEY is not set."""
    if variable and not re.fullmatch(r"[A-Za-z_]\w*", variable):
        raise UserError(f"--key_variable must be the name of a variable, such as {KEY_VARIABLE}")
    key = os.environ.get(variable, "").strip()
    if variable not in ("", KEY_VARIABLE) and not key:
        raise UserError("the environment variable that --key_variable names is unset or empty")
    if not re.fullmatch(r"[!-~]*", key) or set(key) & set("\"'\\"):
        raise UserError(f"{variable} is not a valid API key: it has spaces, quotes or non-ASCII characters")
    return key


def is_this_machine(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def message_in(reply: object) -> str:
    """The server's error message after a colon; empty if it has none of the common forms."""
    error = reply.get("error", reply) if isinstance(reply, dict) else ""
    message = (error.get("message") or error.get("detail")) if isinstance(error, dict) else error
    return f": {message}" if message and isinstance(message, str) else ""


def content_of(reply: dict) -> str:
    """The model's text, from one string or from parts, or its refusal; empty if it has neither, as when it
    thinks until max_tokens are used up, or calls a tool.

    raises  Again if the reply is not a chat completion
    """
    try:
        message = reply["choices"][0]["message"]
        content = message.get("content") or message.get("refusal") or ""
        parts = [content] if isinstance(content, str) else [
            part["text"] if part["type"] in ("text", "output_text") else part.get("refusal") or ""
            for part in content]
        return "".join(parts)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise Again(f"an answer without choices[0].message.content{message_in(reply)}") from error


def usage_of(reply: dict) -> tuple[int, int] | None:
    """Input and output tokens, if the server reports them."""
    usage = reply.get("usage")
    if not isinstance(usage, dict):
        return None
    told = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return told if all(isinstance(tokens, int) and tokens >= 0 for tokens in told) else None


def verdict_of(content: str) -> str | None:
    """A, B or tie, if the answer is just that, up to case, punctuation and words such as "the answer is".

    Everything up to the last </think> is ignored.
    """
    match = VERDICT.fullmatch(content.rpartition("</think>")[2])
    return None if not match else match[1].upper() if len(match[1]) == 1 else "tie"
