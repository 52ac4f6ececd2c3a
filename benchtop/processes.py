"""The processes that torchrun started, and what they tell each other."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator

from benchtop.errors import SharedError, UserError, first_line

TORCHRUNS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_first_process() -> bool:
    """Whether this process does the work; under torchrun the others leave it to the first."""
    return places_by_torchrun()[0] == 0


def places_by_torchrun() -> tuple[int, int, int, int]:
    """Rank and number of processes, in all and on this machine; 0, 1, 0, 1 without torchrun.

    raises  UserError unless all of torchrun's variables are set, to what torchrun may set them to, or none
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
        raise UserError(f"the environment has {shown}{f' without {missing}' if missing else ''}, as torchrun "
                        f"never sets it; start with torchrun, or unset them: unset {' '.join(said)}")
    return rank, size, local_rank, local_size


class Processes:
    """This process alone, or all that torchrun started; alone, every method leaves things as they are.

    torch.distributed is imported only where there are several.
    """

    def __init__(self):
        self.rank, self.size, self.local_rank, self.local_size = places_by_torchrun()
        self.is_main = self.rank == 0
        self.timeout_seconds = 0.0      # of silence, after which another process counts as lost; 0: torch's
        self._lost = False

    def connect(self, **options) -> None:
        """Meet the other processes; options are those of torch.distributed.init_process_group."""
        if self.size > 1:
            import torch.distributed
            with self.contact():
                torch.distributed.init_process_group(**options)

    def close(self) -> None:
        """Leave the other processes; at once if one of them is lost, or this could wait for it."""
        if self.size > 1 and not self._lost:
            import torch.distributed
            torch.distributed.destroy_process_group()

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.gather(None)

    def gather(self, thing: object) -> list:
        """Every process's thing, in the order of ranks."""
        if self.size == 1:
            return [thing]
        import torch.distributed
        things = [None] * self.size
        with self.contact():
            torch.distributed.all_gather_object(things, thing)
        return things

    def gather_on_main(self, thing: object) -> list:
        """Every process's thing, in the order of ranks, on the first; on the others their own alone."""
        if self.size == 1:
            return [thing]
        import torch.distributed
        things = [None] * self.size if self.is_main else None
        with self.contact():
            torch.distributed.gather_object(thing, things)
        return things or [thing]

    def same(self, thing: object) -> object:
        """The first process's thing, on every process."""
        if self.size == 1:
            return thing
        import torch.distributed
        things = [thing]
        with self.contact():
            torch.distributed.broadcast_object_list(things, src=0)
        return things[0]

    def raise_on_all_ranks(self, work: Callable) -> object:
        """What `work` returns; where it fails on one process with a UserError, all raise it."""
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
        """Turn the loss of another process into one clear line."""
        try:
            yield
        except RuntimeError as error:
            self._lost = True
            silent = (f"was silent for {self.timeout_seconds:g} s (--timeout_seconds)"
                      if self.timeout_seconds else "was silent for long")
            raise UserError(f"process {self.rank} of {self.size} lost another one, which died or {silent}; "
                            f"see what it said, then {self.advice} ({first_line(error)})") from error

    advice = "start again"      # how to go on after a process was lost
