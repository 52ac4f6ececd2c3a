"""A small server of chat completions on 127.0.0.1, which judges as it is told and misbehaves when told to."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def likes(word: str) -> Callable[[str, str], str]:
    """An honest judge: it prefers the text that has a word more often."""
    def prefer(a: str, b: str) -> str:
        counts = a.count(word), b.count(word)
        return "tie" if counts[0] == counts[1] else "A" if counts[0] > counts[1] else "B"
    return prefer


class FakeJudge:
    """Says of every pair what `prefer(text A, text B)` returns.

    faults   what to do to the next requests, one a request: see Handler.misbehave
    always   the fault of all requests behind those
    seconds  that an answer takes
    asked    bodies of all requests, in order of arrival; keys: their Authorization, where they had one
    at_once  most requests that were under way together
    """

    def __init__(self):
        self.behave()
        self.lock = threading.Lock()
        handler = type("ThisJudge", (Handler,), {"judge": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def behave(self) -> None:
        """Forget what a test told it."""
        self.prefer: Callable[[str, str], str] = likes("good")
        self.faults: list[str] = []
        self.always = ""
        self.seconds = 0.0
        self.asked: list[dict] = []
        self.keys: list[str] = []
        self.times: list[float] = []
        self.under_way = self.at_once = 0

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    judge: FakeJudge
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True      # or each answer takes 40 ms

    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        judge = self.judge
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with judge.lock:
            judge.asked.append(body)
            judge.times.append(time.monotonic())
            judge.keys += [self.headers["Authorization"]] if "Authorization" in self.headers else []
            fault = judge.faults.pop(0) if judge.faults else judge.always
            judge.under_way += 1
            judge.at_once = max(judge.at_once, judge.under_way)
        try:
            time.sleep(judge.seconds)
            if self.path != "/v1/chat/completions":
                self.answer(404, b'{"detail": "Not Found"}')
            elif not fault or not self.misbehave(fault, body):
                self.answer(200, self.completion(body))
        except (BrokenPipeError, ConnectionResetError):     # who asked has gone
            self.close_connection = True
        finally:
            with judge.lock:
                judge.under_way -= 1

    def completion(self, body: dict, said: object = "") -> bytes:
        """The body of an answer; what it says is the judge's verdict, unless something else is told."""
        shown = json.loads(body["messages"][-1]["content"])
        said = self.judge.prefer(shown["A"], shown["B"]) if said == "" else said
        return json.dumps({"id": "1", "object": "chat.completion", "model": "fake-1.0",
                           "choices": [{"index": 0, "finish_reason": "stop",
                                        "message": {"role": "assistant", "content": said}}],
                           "usage": {"prompt_tokens": 100, "completion_tokens": 2}}).encode()

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None,
               length: int | None = None, reason: str | None = None) -> None:
        self.send_response(status, reason)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()

    def misbehave(self, fault: str, body: dict) -> bool:
        """Do something wrong; False if a right answer may follow."""
        whole, key = self.completion(body), self.headers.get("Authorization", "")
        if fault == "slow":
            time.sleep(0.8)
            return False
        if fault == "hanging":
            time.sleep(20)
            self.hang_up()
        elif fault == "dribbling":        # something comes all the time, but it does not end
            self.answer(200, b"", length=len(whole))
            for place in range(10):
                self.wfile.write(whole[place:place + 1])
                time.sleep(0.1)
            self.hang_up()
        elif fault == "endless":
            self.answer(200, b" " * 3_000_000, length=10**9)
            self.hang_up()
        elif fault == "cut":
            self.answer(200, whole[:len(whole) // 2], length=len(whole))
            self.hang_up()
        elif fault == "silent":
            self.hang_up()
        elif fault == "babble":         # what is no HTTP, with the key in it
            self.wfile.write(f"your {key} is welcome\r\n\r\n".encode())
            self.hang_up()
        elif fault == "truncated":
            self.answer(200, whole[:len(whole) // 2])
        elif fault == "html":
            self.answer(200, b"<html><body>Bad gateway</body></html>", {"Content-Type": "text/html"})
        elif fault == "no choices":
            self.answer(200, b'{"object": "list", "choices": []}')
        elif fault == "no usage":
            self.answer(200, json.dumps(json.loads(whole) | {"usage": None}).encode())
        elif fault == "odd usage":
            self.answer(200, json.dumps(json.loads(whole) | {"usage": {"prompt_tokens": "many"}}).encode())
        elif fault == "nonsense":
            self.answer(200, self.completion(body, "I like both of them!"))
        elif fault == "says nothing":
            self.answer(200, self.completion(body, None))
        elif fault == "nonsense with key":
            self.answer(200, self.completion(body, f"You sent {key}."))
        elif fault == "redirect":
            self.answer(302, b"", {"Location": f"{self.judge.url}/elsewhere"})
        else:       # a status, and then perhaps: after how many seconds to come again, or `key` to repeat it
            status, _, more = fault.partition(" ")
            message = 20 * f"{key}, " if more == "key" else "no, \x1b[31mnot\nnow" + 500 * "!"
            self.answer(int(status), json.dumps({"error": {"message": message}}).encode(),
                        {"Retry-After": more} if more and more != "key" else None,
                        reason=f"Because of {key}" if more == "key" else None)
        return True
