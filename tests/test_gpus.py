"""GPUs by name, and what nvidia-smi says of them.

Run: ./run.sh test tests/test_gpus.py
"""

import os
import stat
from pathlib import Path

import pytest

from benchtop import gpus
from benchtop.gpus import PEAK_TFLOPS, nvidia_gpus, parse_gpus, peak_tflops

# as torch.cuda.get_device_name() says them
CARDS = {
    "NVIDIA A100-SXM4-40GB": 312, "NVIDIA A100-PCIE-40GB": 312, "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A10": 125, "NVIDIA A40": 149.7, "NVIDIA L4": 121, "NVIDIA L40S": 362,
    "Tesla T4": 65, "Tesla V100-SXM2-16GB": 125, "Tesla V100-PCIE-32GB": 112,
    "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H100 NVL": 835,
    "NVIDIA H200": 989, "NVIDIA H200 NVL": 835, "NVIDIA GH200 480GB": 989, "NVIDIA GH200 144G HBM3e": 989,
    "NVIDIA B200": 2250, "NVIDIA B300 SXM6 AC": 2250, "NVIDIA GB10": 125,
    "NVIDIA RTX A6000": 154.8, "NVIDIA RTX 6000 Ada Generation": 364.2,
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 503.8,
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": 438.9,
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": 500,
    "NVIDIA GeForce RTX 3070": 40.6, "NVIDIA GeForce RTX 3080": 59.5, "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 4060 Ti": 44.1, "NVIDIA GeForce RTX 4080": 97.5, "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5070": 61.7, "NVIDIA GeForce RTX 5070 Ti": 87.9, "NVIDIA GeForce RTX 5080": 112.6,
    "NVIDIA GeForce RTX 5090": 209.5, "AMD Instinct MI300X": 1307}
# cards of other speeds, whose names contain one of the table's
OTHERS = [
    "NVIDIA A10G", "NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA A40-48Q", "NVIDIA L40", "NVIDIA GB200",
    "NVIDIA GB300", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA RTX 6000", "Quadro RTX 6000",
    "NVIDIA RTX PRO 6000 Blackwell", "NVIDIA GeForce RTX 3070 Ti", "NVIDIA GeForce RTX 3080 Ti",
    "NVIDIA GeForce RTX 4060", "NVIDIA GeForce RTX 4080 SUPER", "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 5070 Ti Laptop GPU", "Tesla V100S-PCIE-32GB",
    "AMD Instinct MI300A", "Apple M2", ""]


@pytest.mark.parametrize(("device", "wanted"), CARDS.items())
def test_a_card_has_the_peak_of_its_data_sheet(device, wanted):
    assert peak_tflops(device) == wanted


@pytest.mark.parametrize("device", OTHERS)
def test_no_card_has_the_peak_of_another(device):
    assert peak_tflops(device) == 0


def test_every_row_of_the_table_is_found_by_some_name():
    assert set(PEAK_TFLOPS.values()) == set(CARDS.values())


RECORDED = """\
NVIDIA H100 80GB HBM3, 580.95.05, 700.00, 345, 1980, 2619, 2619, 700.00, 41, 5, 81559
NVIDIA GB10, 595.42, [N/A], 2418, 3003, [N/A], [Not Supported], [N/A], 50, [N/A], [N/A]
a warning of the driver
"""


# as summary.json has them
KEPT = [{"name": "NVIDIA H100 80GB HBM3", "driver": "580.95.05", "power_limit_watts": 700.0,
         "sm_clock_mhz": 345.0, "max_sm_clock_mhz": 1980.0, "memory_clock_mhz": 2619.0,
         "max_memory_clock_mhz": 2619.0},
        {"name": "NVIDIA GB10", "driver": "595.42", "power_limit_watts": None, "sm_clock_mhz": 2418.0,
         "max_sm_clock_mhz": 3003.0, "memory_clock_mhz": None, "max_memory_clock_mhz": None}]


def test_what_nvidia_smi_says_is_read():
    h100, gb10 = parse_gpus(RECORDED)
    assert h100 == KEPT[0] | {"usual_power_limit_watts": 700.0, "temperature_celsius": 41.0,
                              "used_memory_mib": 5.0, "memory_mib": 81559.0}
    assert gb10 == KEPT[1] | {"usual_power_limit_watts": None, "temperature_celsius": 50.0,
                              "used_memory_mib": None, "memory_mib": None}


def nvidia_smi(folder: Path, monkeypatch, script: str) -> None:
    """Put a program of this name in front of all others."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_nvidia_smi_is_asked_for_just_these_facts(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, monkeypatch, f"echo \"$@\" > {tmp_path}/asked; cat <<END\n{RECORDED}END")
    assert nvidia_gpus() == KEPT
    assert (tmp_path / "asked").read_text() == (
        "--query-gpu=name,driver_version,power.limit,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,"
        "power.default_limit,temperature.gpu,memory.used,memory.total --format=csv,noheader,nounits\n")


@pytest.mark.parametrize("script", ["echo 'NVIDIA-SMI has failed'; exit 9", "exec sleep 100"])
def test_an_nvidia_smi_that_fails_or_hangs_is_as_none(tmp_path, monkeypatch, script):
    monkeypatch.setattr(gpus, "NVIDIA_SMI_SECONDS", 0.2)
    nvidia_smi(tmp_path, monkeypatch, script)
    assert nvidia_gpus() == []


def test_a_machine_without_nvidia_smi_has_no_such_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_gpus() == []
