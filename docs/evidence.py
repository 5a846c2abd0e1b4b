"""Draws the figures in docs/evidence from the files beside them, and writes the tables of docs/evidence.md.

    python docs/evidence.py          # from the files that are there
    python docs/evidence.py runs     # after copying the losses and scores of the training runs in that folder

A test checks that the page and the files agree.
"""

from __future__ import annotations

import json
import math
import sys
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter

sys.path.append(str(Path(__file__).parent.parent))
from benchmarks.measure import Measurement, Timing
from benchmarks.pages import UNITS, filled, table
from benchmarks.report import COLOURS, measurement_of, scaled, short, tick

PAGE = Path(__file__).with_suffix(".md")
FILES = PAGE.with_suffix("")
SETS = {"wnut17": "WNUT 2017", "germeval2014": "GermEval 2014"}
RATES = ("5e-5", "2e-4")  # of learning, in the loss curves
# Set and learning rate of each of these, by its name in the files.
CURVES = {f"{name}-{rate}": (title, rate) for rate in RATES for name, title in SETS.items()}
LIMIT = 1e-4  # our criterion: the losses of a step differ by less
CONTROL, CONTROL_NAME = "eager-2-threads", "eager on two threads"  # what another rounding alone does
CONTENDERS = {"eager": COLOURS["eager"], "compile": COLOURS["compile"], "fused": COLOURS["ours"]}
SCORES = ("precision", "recall", "f1")
PARTS = {"head": "head", "step": "whole step", "decode": "decoding"}


# --- files ---------------------------------------------------------------------------------------------------------


def collect(runs: Path, files: Path) -> None:
    """Copies the log of each training run: a line for the loss of each step, then one for its scores on dev."""
    for path in runs.rglob("eval_results.json"):
        history = json.loads((path.parent / "trainer_state.json").read_text())["log_history"]
        losses = [{name: record[name] for name in ("step", "loss")} for record in history if "loss" in record]
        scores = {name.removeprefix("eval_"): score for name, score in json.loads(path.read_text()).items()}
        dev = {name: score for name, score in scores.items() if name.partition("/")[0] in (*SCORES, "macro_f1", "gold")}
        lines = [json.dumps(record) + "\n" for record in (*losses, {"step": losses[-1]["step"], "dev": dev})]
        (files / f"{'-'.join(path.parent.relative_to(runs).parts)}.jsonl").write_text("".join(lines))


def log(run: str) -> list[dict[str, Any]]:
    """The records of a run."""
    return [json.loads(line) for line in (FILES / f"{run}.jsonl").read_text().splitlines()]


def curve(run: str, loss: str) -> list[float]:
    """The loss of each step of a run."""
    return [record["loss"] for record in log(f"loss-{run}-{loss}") if "loss" in record]


def differences(run: str, loss: str = "fused") -> list[float]:
    """Of another curve from the eager one at each step, relative to it."""
    return [abs(other / eager - 1) for other, eager in zip(curve(run, loss), curve(run, "eager"), strict=True)]


def head() -> dict[str, Any]:
    """What ``measure_head.py`` wrote."""
    return json.loads((FILES / "head.json").read_text())


def measured(case: dict[str, Any], part: str) -> dict[str, Measurement]:
    """By contender."""
    return {contender: measurement_of(record) for contender, record in case[part].items()}


def value(case: dict[str, Any], part: str, contender: str, what: str) -> float | None:
    """The median time or the peak memory; None where nothing was measured."""
    found = measured(case, part).get(contender)
    return found and found.number(what)


def over(a: float | None, b: float | None) -> float:
    return a / b if a and b else math.nan


def share(case: dict[str, Any], contender: str, what: str) -> float:
    """What the head takes, over what the whole step takes."""
    return over(value(case, "head", contender, what), value(case, "step", contender, what))


# --- tables --------------------------------------------------------------------------------------------------------


def score_table(name: str) -> str:
    """The scores of a tagger: of each type, of all spans, and their mean over the types."""
    dev = log(f"f1-{name}")[-1]["dev"]
    gold = {key.removeprefix("gold/"): count for key, count in dev.items() if key.startswith("gold/")}
    rows = [[kind, *(f"{dev[f'{score}/{kind}']:.4f}" for score in SCORES), str(gold[kind])] for kind in gold]
    rows.append(["micro", *(f"{dev[score]:.4f}" for score in SCORES), str(sum(gold.values()))])
    rows.append(["macro", "", "", f"{dev['macro_f1']:.4f}", ""])
    return table(["type", *SCORES, "gold"], rows)


def classifier_table() -> str:
    """The scores of the classifiers, by their loss."""
    logs = {loss: log(f"f1-goemotions-{loss}")[-1]["dev"] for loss in ("zlpr", "bce")}
    rows = [[loss, *(f"{dev[score]:.4f}" for score in (*SCORES, "macro_f1"))] for loss, dev in logs.items()]
    return table(["loss", "precision", "recall", "micro F1", "macro F1"], rows)


def loss_table() -> str:
    rows = []
    for run, (title, rate) in CURVES.items():
        fused = curve(run, "fused")
        largest = [f"{max(differences(run, loss)):.2e}" for loss in ("fused", CONTROL)]
        rows.append([title, rate, str(len(fused)), f"{fused[0]:.4f}", f"{fused[-1]:.4f}", *largest])
    apart = "largest relative difference from eager"
    return table(["set", "learning rate", "steps", "first loss", "last loss", f"{apart}, fused", CONTROL_NAME], rows)


def head_table(what: str) -> str:
    """Times, or peak memory, of all contenders."""
    rows = []
    for case in head()["cases"]:
        for part, title in PARTS.items():
            values = [value(case, part, contender, what) for contender in CONTENDERS]
            ratio = over(values[0], values[-1])
            said = ["" if x is None else scaled(x, UNITS[what]) for x in values]
            shape = f"{case['batch']} x {case['heads']} x {case['tokens']:,}"
            rows.append([shape, title, *said, "" if math.isnan(ratio) else short(ratio)])
    return table(["batch x types x pieces", "", *CONTENDERS, "eager / fused"], rows)


def conditions() -> str:
    found = head()
    told = found["conditions"]
    times = [m.time for case in found["cases"] for part in PARTS for m in measured(case, part).values()]
    spreads = [(time.high - time.low) / 2 / time.median for time in times if isinstance(time, Timing)]
    return textwrap.fill(
        f"{told['device']}, threads: {told['threads']}, torch {told['torch']}, {told['date']}; other processes "
        f"{told['other processes']}. Times are medians; half the distance between the 20 % and the 80 % quantile is "
        f"{min(spreads):.0%} to {max(spreads):.0%} of them. {found['encoder']}; {found['head']}; {found['data']}. "
        "All numbers: [head.json](evidence/head.json).",
        120,
    )


def share_table() -> str:
    rows = []
    for case in head()["cases"]:
        shares = [share(case, contender, what) for what in UNITS for contender in ("eager", "fused")]
        row = [case["name"], f"{case['tokens']:,}", *("" if math.isnan(x) else f"{x:.1%}" for x in shares)]
        rows.append(row)
    names = [f"{what}, {contender}" for what in ("time", "peak memory") for contender in ("eager", "fused")]
    return table(["batch", "pieces", *names], rows)


def tables() -> dict[str, str]:
    """By the name that they have on the page."""
    taggers = {f"f1-{name}": score_table(name) for name in SETS}
    times, memory = head_table("time"), head_table("peak")
    return {
        "losses": loss_table(),
        **taggers,
        "f1-goemotions": classifier_table(),
        "time": times,
        "memory": memory,
        "conditions": conditions(),
        "share": share_table(),
    }


# --- figures -------------------------------------------------------------------------------------------------------


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd")
    axes.set_axisbelow(True)


def loss_figure() -> Figure:
    """Both curves of each run, and under them how far they are apart."""
    canvas = Figure(figsize=(14, 6), layout="constrained")
    canvas.suptitle("The loss of each training step, one seed, float32", weight="bold", size=13)
    above, below = canvas.subplots(2, len(CURVES), sharex=True, sharey="row", height_ratios=(3, 2))
    for column, (run, (title, rate)) in enumerate(CURVES.items()):
        fused = curve(run, "fused")
        steps = range(1, len(fused) + 1)
        above[column].plot(steps, curve(run, "eager"), color=CONTENDERS["eager"], linewidth=5, label="eager")
        above[column].plot(steps, fused, color=CONTENDERS["fused"], linewidth=1.2, label="fused")
        above[column].set_title(f"{title}, learning rate {rate}", size=10)
        # A step with the same loss to the last bit has no place on a log scale.
        below[column].plot(steps, differences(run, CONTROL), "o", color=CONTENDERS["eager"], label=CONTROL_NAME)
        below[column].plot(steps, differences(run), ".", color=CONTENDERS["fused"], label="fused")
        below[column].axhline(LIMIT, color="black", linestyle="--", linewidth=1, label="criterion")
        below[column].set_xlabel("step")
    above[0].set_yscale("log")
    above[0].set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
    above[0].yaxis.set_minor_formatter(NullFormatter())
    above[0].set_ylabel("ZLPR loss")
    above[0].legend(frameon=False)
    below[0].set_yscale("log")
    below[0].set_ylabel("relative difference\nfrom eager")
    below[0].legend(frameon=False)
    for axes in (*above, *below):
        tidy(axes)
    return canvas


def head_figure() -> Figure:
    """Time and peak memory of the head and of the step over the lengths, and under them the head over the step."""
    found = head()
    cases = found["cases"]
    canvas = Figure(figsize=(11, 8), layout="constrained")
    canvas.suptitle("The span head in a training step, forward + backward", weight="bold", size=13)
    above, below = canvas.subplots(2, 2, sharex=True, height_ratios=(3, 2))
    for column, (what, title) in enumerate({"time": "time", "peak": "peak memory"}.items()):
        for contender, colour in CONTENDERS.items():
            for part, line in {"step": "o--", "head": "o-"}.items():
                values = [value(case, part, contender, what) or math.nan for case in cases]
                if not all(map(math.isnan, values)):
                    label = f"{PARTS[part]}, {contender}"
                    above[column].plot(values, line, color=colour, markersize=5, label=label)
            shares = [share(case, contender, what) for case in cases]
            below[column].plot(shares, "o-", color=colour, markersize=5)
        above[column].set_yscale("log")
        above[column].yaxis.set_major_formatter(tick(UNITS[what]))
        above[column].yaxis.set_minor_formatter(NullFormatter())
        above[column].set_ylabel(title)
        below[column].set_ylim(0, 1)
        below[column].yaxis.set_major_formatter(PercentFormatter(1))
        below[column].set_ylabel(f"{title}: head / whole step")
        below[column].set_xticks(range(len(cases)), [case["name"].replace(" of ", "\nof ") for case in cases])
        below[column].set_xlabel("batch (documents: pieces of each)")
    # In the panel that has room for it.
    below[0].legend(*above[0].get_legend_handles_labels(), frameon=False, loc="upper left")
    for axes in (*above, *below):
        tidy(axes)
    told = found["conditions"]
    canvas.supxlabel(
        f"{found['encoder']}; {found['head']}; {found['data']}, {cases[0]['heads']} types.\n"
        f"{told['device']}, threads: {told['threads']}; other processes {told['other processes']}; "
        f"torch {told['torch']}; {told['date']}.",
        size=8,
        color="#555555",
    )
    return canvas


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        collect(Path(folder), FILES)
    loss_figure().savefig(FILES / "losses.png", dpi=150)
    head_figure().savefig(FILES / "head.png", dpi=150)
    PAGE.write_text(filled(PAGE.read_text("utf-8"), tables()), "utf-8")
