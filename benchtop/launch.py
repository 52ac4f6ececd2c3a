"""torchrun without its own report: python -m benchtop.launch --standalone --nproc_per_node=8 train_gpt.py

It takes torchrun's flags and is torchrun, but for what it says when a process fails. The process itself has
said why, in one line or with its traceback; torchrun would add a page in which that line is lost.
"""

import logging
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> None:
    """Exit status: of the process that failed first; 128 and the signal's number if one ended it."""
    logging.disable(logging.ERROR)      # which process ends and how many threads each has
    try:
        run.run(run.parse_args(sys.argv[1:]))
    except SignalException as told:
        sys.exit(128 + told.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            sys.exit(failure.exitcode)
        reason = "; the machine ran out of memory, perhaps" if failure.exitcode == -signal.SIGKILL else ""
        print(f"{error.name}: error: {failure.signal_name()} ended process {rank}{reason}", file=sys.stderr)
        sys.exit(128 - failure.exitcode)


if __name__ == "__main__":
    main()
