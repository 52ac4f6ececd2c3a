"""Start a Benchtop's scripts by fork, so that a start costs no imports: python fork_server.py FOLDER

Reads a JSON list of script and flags per line, starts it as the head of a session of its own, says its
process id, and when it has ended its exit code (negative: the signal that killed it).
"""

import importlib
import json
import os
import sys

folder = sys.argv[1]
sys.path.insert(0, folder)
os.chdir(folder)
scripts = {name: importlib.import_module(name)
           for name in ("train_tokenizer", "download_fineweb", "train_gpt")}
import matplotlib.pyplot  # noqa: E402, F401  (a run draws with it)

for line in sys.stdin:
    script, *flags = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        log = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = [f"{script}.py", *flags]
        code = 1
        try:
            scripts[script].main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            print(end.code, flush=True)
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
