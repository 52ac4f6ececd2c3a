"""Peak throughput of GPUs by name, and what nvidia-smi reports about the GPUs of this machine.

A card with reduced power or clocks looks normal to torch but is slow. This module needs no torch.
"""

import re
import subprocess

# values of --device besides cpu, in torch's names
ACCELERATORS = {"cuda": "an NVIDIA or AMD GPU", "mps": "an Apple GPU", "xpu": "an Intel GPU"}

# Dense TFLOP/s in bfloat16 (float16 for the T4 and V100, which have no bfloat16) with float32 accumulation,
# which halves the rate of GeForce cards. Sources: the manufacturers' data sheets; for GeForce and RTX cards,
# appendices of NVIDIA's papers on GA102, Ada, RTX Blackwell and RTX PRO Blackwell. Rates with sparsity are
# halved. B200 and B300: an eighth of their HGX boards. GB10 is specified in sparse FP4 only (1,000); an
# eighth of that is dense bfloat16 on cards that accumulate in float32 at the full rate.
# A name that is a prefix of another one comes after it.
PEAK_TFLOPS = {
    "V100-PCIE": 112, "V100": 125, "T4": 65, "A100": 312, "A40": 149.7, "A10": 125, "L40S": 362, "L4": 121,
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 835, "H200": 989, "GH200": 989,
    "B200": 2250, "B300": 2250, "GB10": 125,
    "RTX A6000": 154.8, "RTX 6000 Ada Generation": 364.2,
    "RTX PRO 6000 Blackwell Workstation Edition": 503.8, "RTX PRO 6000 Blackwell Server Edition": 500,
    "RTX PRO 6000 Blackwell Max-Q Workstation Edition": 438.9,
    "RTX 3070": 40.6, "RTX 3080": 59.5, "RTX 3090": 71, "RTX 4060 Ti": 44.1, "RTX 4080": 97.5,
    "RTX 4090": 165.2, "RTX 5070 Ti": 87.9, "RTX 5070": 61.7, "RTX 5080": 112.6, "RTX 5090": 209.5,
    "MI300X": 1307}
# socket and memory size, which may follow a name; any other suffix means another model
VARIANT = r"(-(SXM\d?|PCIE))?(-\d+GB)?( \d+GB?)?( (HBM3e?|PCIe|OAM|SXM\d( AC)?))?"

# what nvidia-smi is asked for each GPU: our name -> its name
QUERY = {"name": "name", "driver": "driver_version", "power_limit_watts": "power.limit",
         "sm_clock_mhz": "clocks.sm", "max_sm_clock_mhz": "clocks.max.sm",
         "memory_clock_mhz": "clocks.mem", "max_memory_clock_mhz": "clocks.max.mem",
         "usual_power_limit_watts": "power.default_limit", "temperature_celsius": "temperature.gpu",
         "used_memory_mib": "memory.used", "memory_mib": "memory.total"}
# the part of QUERY that a run records, since it may explain why two runs differ in speed
KEPT = tuple(QUERY)[:7]
NVIDIA_SMI_SECONDS = 20     # it hangs when the driver does
OLDEST_DRIVER = {13: 580, 12: 525}      # per CUDA version, from its release notes


def peak_tflops(device_name: str) -> float:
    """The TFLOP/s in PEAK_TFLOPS for a GPU, by torch's name for it; 0 if it is not listed."""
    return next((peak for name, peak in PEAK_TFLOPS.items()
                 if re.fullmatch(f"(.* )?{name}{VARIANT}", device_name)), 0)


def ask_nvidia_smi() -> tuple[list[dict], str]:
    """The values in QUERY for each GPU of this machine; if there are none, the reason.

    If the driver has lost a GPU, nvidia-smi prints an error in place of its line and still lists the others.
    """
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={','.join(QUERY.values())}",
                               "--format=csv,noheader,nounits"], capture_output=True, text=True,
                              errors="replace", timeout=NVIDIA_SMI_SECONDS)
    except OSError:
        return [], "nvidia-smi is not installed"
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi did not answer in {NVIDIA_SMI_SECONDS} s"
    found = parse_gpus(done.stdout)
    return found, "" if found else f"nvidia-smi says: {' '.join((done.stdout + done.stderr).split())[:120]}"


def nvidia_gpus() -> list[dict]:
    """What a run records about this machine's GPUs; empty if nvidia-smi is missing, fails or hangs."""
    return [{fact: gpu[fact] for fact in KEPT} for gpu in ask_nvidia_smi()[0]]


def parse_gpus(text: str) -> list[dict]:
    """The values in QUERY for each line of nvidia-smi's output; numbers as floats, unknown ones as None.

    NVIDIA A10, 535.183.01, 150.00, 210, 1695, 405, 6251, 150.00, 34, 4, 23028
    """
    rows = [line.split(", ") for line in text.splitlines()]
    return [{fact: cell if fact in ("name", "driver") else number(cell)
             for fact, cell in zip(QUERY, row, strict=True)} for row in rows if len(row) == len(QUERY)]


def number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:      # [N/A], [Not Supported], [Unknown Error]
        return None


def problems_of(gpu: dict) -> list[str]:
    """Reasons why a GPU may be slower than others of its model; torch reports none of these."""
    found = []
    limit, usual = gpu["power_limit_watts"], gpu["usual_power_limit_watts"]
    if limit and usual and limit < 0.9 * usual:
        found.append(f"its power is limited to {limit:.0f} W of {usual:.0f}")
    if (gpu["temperature_celsius"] or 0) > 85:
        found.append(f"it is hot, at {gpu['temperature_celsius']:.0f} degrees Celsius")
    used, memory = gpu["used_memory_mib"], gpu["memory_mib"]
    if used and memory and used > 0.1 * memory:
        found.append(f"{used:,.0f} MiB of its memory are in use by other processes")
    return found


def bad_pair(driver: str, cuda: str | None) -> str:
    """Why a driver is too old for the CUDA version that torch was built for; empty if it is not."""
    if not driver or not cuda:
        return ""
    oldest = OLDEST_DRIVER.get(int(cuda.split(".")[0]), 0)
    major = re.match(r"\d+", driver)
    if not major or int(major[0]) >= oldest:
        return ""
    return f"driver {driver} is older than {oldest}, which CUDA {cuda} needs; kernels may fail or be slow"
