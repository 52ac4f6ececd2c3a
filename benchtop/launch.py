"""torchrun without its error report: python -m benchtop.launch --standalone --nproc_per_node=8 train_gpt.py

It is torchrun, with the same flags, but prints less when a process fails. The failed process has already
printed the reason, as one line or a traceback; torchrun would bury it under a page of its own.
"""

import logging
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> None:
    """Exit with the status of the first process that failed; 128 + signal number if a signal ended it."""
    logging.disable(logging.ERROR)      # hides messages about ending processes and thread counts
    try:
        run.run(run.parse_args(sys.argv[1:]))
    except SignalException as told:
        sys.exit(128 + told.sigval)
    except ChildFailedError as error:
        rank, failure = min(error.failures.items(), key=lambda item: cause_first(item[1].exitcode))
        if failure.exitcode > 0:
            sys.exit(failure.exitcode)
        reason = "; the machine may have run out of memory" if failure.exitcode == -signal.SIGKILL else ""
        print(f"{error.name}: error: {failure.signal_name()} ended process {rank}{reason}", file=sys.stderr)
        sys.exit(128 - failure.exitcode)


def cause_first(exitcode: int) -> int:
    """Sorts what ended processes: a signal first, then an error, which may follow from the signal; SIGTERM
    last, by which torchrun ends the others."""
    return 2 if exitcode == -signal.SIGTERM else 0 if exitcode < 0 else 1


if __name__ == "__main__":
    main()
