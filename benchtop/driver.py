"""What nvidia-smi says of driver, power and clocks, and which versions do not go together.

A card that is held below its power or its clocks looks fine to torch and is slow.
"""

import re
import subprocess
from dataclasses import dataclass

FIELDS = ("name", "driver_version", "power.limit", "power.default_limit", "clocks.sm", "clocks.max.sm",
          "temperature.gpu", "memory.used", "memory.total")
SECONDS = 20            # a driver in trouble may never answer
OLDEST_DRIVER = {13: 580, 12: 525}      # that the release notes of a CUDA name


@dataclass(frozen=True)
class Card:
    """One line of nvidia-smi: watts, MHz, degrees Celsius and MiB; 0 where it does not say."""
    name: str
    driver: str
    power_limit: float
    usual_power_limit: float
    clock: float
    most_clock: float
    temperature: float
    used_mib: float
    total_mib: float

    def problems(self) -> list[str]:
        found = []
        if 0 < self.power_limit < 0.9 * self.usual_power_limit:
            found.append(f"its power is limited to {self.power_limit:.0f} W of {self.usual_power_limit:.0f}")
        if self.temperature > 85:
            found.append(f"it is hot, at {self.temperature:.0f} degrees Celsius")
        if self.used_mib > 0.1 * self.total_mib > 0:
            found.append(f"{self.used_mib:,.0f} MiB of its memory are in use by others")
        return found


def cards(text: str) -> list[Card]:
    """The cards in what nvidia-smi printed for FIELDS as csv,noheader,nounits."""
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(FIELDS):
            numbers = (float(cell) if re.fullmatch(r"\d+(\.\d+)?", cell) else 0.0 for cell in cells[2:])
            found.append(Card(*cells[:2], *numbers))
    return found


def ask_nvidia_smi() -> tuple[list[Card], str]:
    """The cards of this machine, or why they are not known."""
    command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, errors="replace")
    except FileNotFoundError:
        return [], "nvidia-smi is not installed"
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi did not answer in {SECONDS} s"
    found = cards(done.stdout) if done.returncode == 0 else []
    return found, "" if found else f"nvidia-smi says: {' '.join((done.stdout + done.stderr).split())[:120]}"


def bad_pair(driver: str, cuda: str | None) -> str:
    """Why a driver is too old for the CUDA that torch was built for; nothing if it is not."""
    if not driver or not cuda:
        return ""
    oldest = OLDEST_DRIVER.get(int(cuda.split(".")[0]), 0)
    major = re.match(r"\d+", driver)
    if not major or int(major[0]) >= oldest:
        return ""
    return f"driver {driver} is older than {oldest}, which CUDA {cuda} needs; kernels may fail or be slow"
