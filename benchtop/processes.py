"""The processes that torchrun started, and the communication between them."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator

from benchtop.errors import SharedError, UserError, first_line
from benchtop.host import available_cores

TORCHRUNS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_first_process() -> bool:
    """Whether this is the first process (rank 0), which does what must be done only once."""
    return places_by_torchrun()[0] == 0


def places_by_torchrun() -> tuple[int, int, int, int]:
    """Rank, world size, and the same within this machine; 0, 1, 0, 1 without torchrun.

    raises  UserError if some of torchrun's variables are missing or have values that torchrun never sets
    """
    said = {name: os.environ[name] for name in TORCHRUNS if name in os.environ}
    if not said:
        return 0, 1, 0, 1
    numbers = [int(said[name]) if re.fullmatch("[0-9]{1,9}", said.get(name, "")) else -1
               for name in TORCHRUNS if name != "MASTER_ADDR"]
    rank, size, local_rank, local_size, port = numbers
    if not (0 <= local_rank < local_size <= size and local_rank <= rank < size and said.get("MASTER_ADDR")
            and 0 <= port < 2**16):
        shown = " ".join(f"{name}={value}" for name, value in said.items())
        missing = ", ".join(name for name in TORCHRUNS if name not in said)
        raise UserError(f"the environment has {shown}{f' without {missing}' if missing else ''}, which never "
                        f"happens under torchrun; start with torchrun, or unset them: unset {' '.join(said)}")
    return rank, size, local_rank, local_size


def own_cores() -> int:
    """The cores of each of the processes that torchrun started on this machine."""
    return max(1, available_cores() // places_by_torchrun()[3])


class Processes:
    """This process alone, or all that torchrun started; a single process communicates with nobody.

    torch.distributed is imported only if there are several processes.
    """

    def __init__(self):
        self.rank, self.size, self.local_rank, self.local_size = places_by_torchrun()
        self.is_main = self.rank == 0
        self.timeout_seconds = 0.0      # of silence, after which a process counts as lost; 0: torch's default
        self._lost = False

    def connect(self, **options) -> None:
        """Join the other processes; the options are those of torch.distributed.init_process_group."""
        if self.size > 1:
            import torch.distributed
            with self.contact():
                torch.distributed.init_process_group(**options)

    def close(self) -> None:
        """Leave the process group; do nothing if a process was lost, since leaving could wait for it."""
        if self.size > 1 and not self._lost:
            import torch.distributed
            torch.distributed.destroy_process_group()

    def barrier(self) -> None:
        """Wait until all processes get here."""
        self.gather(None)

    def gather(self, thing: object) -> list:
        """The things of all processes, in rank order."""
        if self.size == 1:
            return [thing]
        import torch.distributed
        things = [None] * self.size
        with self.contact():
            torch.distributed.all_gather_object(things, thing)
        return things

    def gather_on_main(self, thing: object) -> list:
        """On rank 0, the things of all processes in rank order; on other ranks, only their own."""
        if self.size == 1:
            return [thing]
        import torch.distributed
        things = [None] * self.size if self.is_main else None
        with self.contact():
            torch.distributed.gather_object(thing, things)
        return things or [thing]

    def same(self, thing: object) -> object:
        """The thing of rank 0, on every process."""
        if self.size == 1:
            return thing
        import torch.distributed
        things = [thing]
        with self.contact():
            torch.distributed.broadcast_object_list(things, src=0)
        return things[0]

    def raise_on_all_ranks(self, work: Callable) -> object:
        """The result of `work`; if it raises a UserError on any process, all raise it as a SharedError."""
        problem = result = None
        try:
            result = work()
        except UserError as error:
            problem = str(error)
        problem = next(filter(None, self.gather(problem)), None)
        if problem:
            raise SharedError(problem)
        return result

    @contextlib.contextmanager
    def contact(self) -> Iterator[None]:
        """Turn the loss of another process into a one-line UserError."""
        try:
            yield
        except RuntimeError as error:
            self._lost = True
            if type(error).__name__ in ("OutOfMemoryError", "AcceleratorError"):    # on this process's GPU
                raise
            silent = (f"was silent for {self.timeout_seconds:g} s (--timeout_seconds)"
                      if self.timeout_seconds else "was silent for too long")
            raise UserError(f"process {self.rank} of {self.size} lost another process, which died or "
                            f"{silent}; see its output, then {self.advice} ({first_line(error)})") from error

    advice = "start again"      # what to do after a process was lost
