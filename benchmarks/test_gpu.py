"""The pass on a GPU, run on a CPU at its smallest sizes: its files, and what it survives."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from . import gpu, growth, report
from .suite import ops

CPU = torch.device("cpu")
SAYS = f"print({gpu.MARK!r} + json.dumps({{'ok': True, 'pid': os.getpid()}}), flush=True)"
# What a child does at its second item: the verdict on that, and whether the first and the third had one child.
ENDS = {
    "os.abort()": ("FAILED: killed by SIGABRT", False),
    "sys.exit(3)": ("FAILED: exit status 3", False),
    "time.sleep(60)": ("FAILED: took more than 1 s", False),
    "print('no result', end='')": ("ok", True),  # said before a result, on its line
    f"{SAYS}; sys.exit({gpu.SPOILT})": ("ok", False),
}


def lines(file: Path) -> list[gpu.Record]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("end", ENDS)
def test_a_child_that_ends_costs_one_item(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = tmp_path / "child.py"
    child.write_text(
        "import json, os, sys, time\n"
        "for item in json.loads(sys.argv[3]):\n"
        f"    if item['n'] == 2: {end}\n"
        f"    {SAYS}\n"
    )  # fmt: skip
    monkeypatch.setattr(gpu, "WORKER", [sys.executable, str(child)])
    monkeypatch.setattr(gpu, "CASE_SECONDS", 1)
    the_pass = gpu.Pass(tmp_path, gpu.Settings("cpu", 0.0), minutes=5)
    asyncio.run(the_pass.work("correctness", [{"n": n} for n in (1, 2, 3)], the_pass.end))
    first, second, third = lines(tmp_path / "correctness.jsonl")
    expected, same_child = ENDS[end]
    assert [gpu.verdict(record) for record in (first, second, third)] == ["ok", expected, "ok"]
    assert (first["pid"] == third["pid"]) == same_child


def test_tests_that_are_cut_off_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text(
        "import pytest, time\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert not 'a reason'\n"
        "def test_slow(): time.sleep(60)\n"
    )  # fmt: skip
    the_pass = gpu.Pass(tmp_path, gpu.Settings("cpu", 0.0), minutes=5)

    async def cut_when_slow() -> None:
        # As main does. A shell's job in the background ignores SIGINT, and so would its children.
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, the_pass.cut_off)
        tests = asyncio.create_task(the_pass.test([file], the_pass.end))
        # Its result, of pytest-xdist or of pytest alone: its name alone may only say that it begins.
        while not re.search("FAILED.*test_wrong|test_wrong.*FAILED", (tmp_path / "log.txt").read_text()):
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.5)
        the_pass.cut_off()
        await tests

    asyncio.run(cut_when_slow())
    record = the_pass.only("tests")
    assert (record["passed"], record["failed"], record["cut"]) == (1, 1, "the time was up")
    assert "test_wrong: AssertionError" in gpu.verdict(record)
    assert "::test_slow" in (tmp_path / "log.txt").read_text()


def test_a_test_counts_for_its_file_in_a_folder_of_such_a_name(tmp_path: Path) -> None:
    report = tmp_path / "junit.xml"
    report.write_text('<testsuite><testcase classname="tmp.test_folder.test_it.TestIt" name="test_x"/></testsuite>')
    assert {file: of["passed"] for file, of in gpu.junit_counts(report).items()} == {"test_it": 1}


@pytest.mark.parametrize(
    "status, place, expected",
    [
        (0, "", "ok"),
        (gpu.FOUND, "", "WRONG"),
        (gpu.FOUND, "Write access at sweep_kernel+0x20", "WRONG"),
        (gpu.FOUND, "Write access at nvjet_sm90_splitK+0x20", "ok"),
        (1, "", "FAILED: exit status 1"),
    ],
)
def test_the_sanitizer_is_believed(
    status: int, place: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool, child = tmp_path / "compute-sanitizer", tmp_path / "child.py"
    tool.write_text(f'#!/bin/sh\nshift 4; "$@"; echo "{place}"; echo "ERROR SUMMARY: so many"; exit {status}\n')
    tool.chmod(0o755)
    child.write_text(f"import json, os\n{SAYS}\n")
    monkeypatch.setattr(gpu, "WORKER", [sys.executable, str(child)])
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    the_pass = gpu.Pass(tmp_path, gpu.Settings("cpu", 0.0), minutes=5)
    asyncio.run(the_pass.sanitize("memcheck", "zlpr_loss", [{"n": 1}], the_pass.end))
    record = the_pass.only("sanitizer")
    assert record["summary"] == ["ERROR SUMMARY: so many"] and record["ran"] == 1
    assert gpu.verdict(record).startswith(expected)


def test_what_no_time_is_left_for_is_recorded(tmp_path: Path) -> None:
    assert gpu.main(tmp_path, CPU, 0.0, True, [ops()["zlpr_loss"]]) == 0
    records = lines(tmp_path / "correctness.jsonl") + lines(tmp_path / "sweep.jsonl")
    assert {record["stage"] for record in records} >= {"ceilings", "correctness", "tests", "sanitizer", "sweep"}
    assert all("skipped" in record for record in records)
    assert json.loads((tmp_path / "results.json").read_text())["cases"] == []


def test_a_result_survives_its_json() -> None:
    committed = Path(__file__).parent / "results" / "cpu-amd-epyc-2-cores" / "results.json"
    for record in json.loads(committed.read_text())["cases"]:
        again = report.case_record(report.result_of(record, CPU))
        assert json.loads(json.dumps(again)) == record


def test_the_whole_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """With a kernel that takes its process down in one stage."""
    child = tmp_path / "child.py"
    child.write_text(
        "import os, sys\n"
        "from benchmarks import gpu\n"
        "gpu.STAGES['repeats'] = lambda *_: os.abort()\n"
        "gpu.work(sys.argv[1], gpu.Settings(**gpu.json.loads(sys.argv[2])), gpu.json.loads(sys.argv[3]))\n"
    )  # fmt: skip
    monkeypatch.setattr(gpu, "WORKER", [sys.executable, str(child)])
    monkeypatch.setenv("PYTHONPATH", str(gpu.ROOT))
    monkeypatch.setattr("shutil.which", lambda _: None)
    out = tmp_path / "out"
    assert gpu.main(out, CPU, 5.0, True, [ops()["pointer_loss"]]) == 1

    records = lines(out / "correctness.jsonl") + lines(out / "sweep.jsonl")
    verdicts = {record["stage"]: gpu.verdict(record) for record in records}
    assert verdicts.pop("repeats") == "FAILED: killed by SIGABRT"
    assert verdicts.pop("sanitizer") == "skipped: compute-sanitizer was not found"
    assert set(verdicts) == {"ceilings", "correctness", "past 32 bits", "compiles", "tests", "sweep", "growth"}
    assert set(verdicts.values()) == {"ok"}
    results, curves = (json.loads((out / name).read_text()) for name in ("results.json", "growth.json"))
    assert results["bytes_written_per_second"] > 0 and results["seconds_of_a_launch"] > 0
    (case,) = results["cases"]
    assert set(case["passes"]["forward + backward"]["contenders"]) == set(report.COLOURS)
    assert set(curves["curves"]) == set(growth.CURVES)
    files = {file.name for file in out.iterdir() if file.stat().st_size > 0}
    assert files == {
        "correctness.jsonl", "growth.json", "growth.png", "log.txt", "plots.pdf", "results.json", "sweep.jsonl",
    }  # fmt: skip
    said = capfd.readouterr().out
    assert "repeats: 1 FAILED" in said and "copy: " in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_cut_off_it_leaves_what_it_had(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "gpu", "--quick", "--device=cpu", "--op=zlpr_loss"]
    record = tmp_path / "correctness.jsonl"
    with subprocess.Popen([*command, f"--out={tmp_path}"], cwd=gpu.ROOT, stdout=subprocess.DEVNULL) as the_pass:
        while the_pass.poll() is None and not (record.exists() and record.read_text()):
            time.sleep(0.1)
        os.kill(the_pass.pid, number)
    records = lines(record)
    assert gpu.verdict(records[0]) == "ok"
    if number == signal.SIGTERM:
        assert the_pass.returncode == 0
        assert gpu.verdict(*lines(tmp_path / "sweep.jsonl")).startswith("skipped")
        assert json.loads((tmp_path / "results.json").read_text())["conditions"]["torch"] == torch.__version__
