"""The table of costs: arithmetic that can be done by hand, and labels that are true."""
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("cost", ROOT / "benchmarks" / "cost.py")
cost = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cost)
OPERATIONS = {"unet": 0.803e12, "decoder": 2.515e12}


def rows(lines):
    """-> (names of the columns, {stage: its numbers})."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return cells[0], {row[0]: row[1:] for row in cells[2:]}


def test_the_papers_days_add_up():
    names, table = rows(cost.table({}, OPERATIONS))
    assert table["all"][2] == "199.2" and len(table) == 6
    assert table["reflow, 1024 x 25,000"][:3] == ["25.60 M", "2.41", "64.0"]


def test_a_measured_device_by_hand():
    speed = {"generation": 10.0, "reflow": 100.0, "l2": 50.0, "lpips": 20.0}
    names, table = rows(cost.table({"NVIDIA H100 80GB HBM3": {"speed": speed}}, OPERATIONS))
    assert names[4:] == ["NVIDIA H100 80GB HBM3, measured", "A100, estimate from NVIDIA H100 80GB HBM3"]
    assert float(table["pairs, twice"][3]) == pytest.approx(3.2e6 / 10 / 86400, abs=0.05)
    assert float(table["reflow, 1024 x 25,000"][3]) == pytest.approx(25.6e6 / 100 / 86400, abs=0.05)
    assert float(table["distillation, LPIPS, 1024 x 18,000"][4]) == pytest.approx(
        1024 * 18000 / 20 / 86400 * 989 / 312, abs=0.05)
    assert float(table["all"][3]) == pytest.approx(
        3.2e5 / 86400 + 30.08e6 / 100 / 86400 + 22.016e6 / 50 / 86400 + 18.432e6 / 20 / 86400, abs=0.1)


@pytest.mark.parametrize("measured", [(), ("NVIDIA A100-SXM4-80GB",), ("NVIDIA H200",),
                                      ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 PCIe")])
def test_what_was_not_measured_is_called_an_estimate(measured):
    speed = dict.fromkeys(("generation", "reflow", "l2", "lpips"), 10.0)
    lines = cost.table({device: {"speed": speed} for device in measured}, OPERATIONS)
    for name in rows(lines)[0][4:]:
        assert ((name.endswith(", measured") and name.removesuffix(", measured") in measured)
                or ", estimate " in name), name
    assert lines[-1] == f"Measured at full size: {', '.join(measured) or 'nothing yet'}."


@pytest.mark.slow
def test_every_stage_is_measured_in_small():
    line = [sys.executable, ROOT / "benchmarks" / "cost.py", "measure", "--config", "mini", "--batch", "2",
            "--seconds", "0", "--device", "cpu"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f'"{stage}"' in done.stdout for stage in ("generation", "reflow", "l2", "lpips"))
