"""The evidence on real input: what docs/evidence.md claims holds of its files, and the program that measures runs."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

EXTRAS = {
    "matplotlib": "bench",
    "psutil": "bench",
    "rich": "bench",
    "accelerate": "examples",
    "transformers": "examples",
}
for package, extra in EXTRAS.items():
    pytest.importorskip(package, reason=f"the evidence needs {package}: pip install 'flashpointer[{extra}]'")
ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "docs"), str(ROOT / "examples")]
PROGRAMS = ("evidence", "common", "synthetic", "measure_head")
evidence, common, synthetic, measure_head = map(importlib.import_module, PROGRAMS)

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs measure_head.py in this process, as its command line would: its exit status, and what it says of errors."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["measure_head.py", "--device=cpu", *map(str, arguments)])
        try:
            status = common.exit_status(measure_head.main)
        except SystemExit as exit_:  # as argparse does
            status = exit_.code
        return status, capsys.readouterr().err

    return run


# --- the committed files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", evidence.CURVES)
def test_the_fused_loss_follows_the_eager_one(name: str) -> None:
    apart = evidence.differences(name)
    assert len(apart) == 100
    assert max(apart) < 1e-4


def test_the_logs_of_runs_are_copied_in_full_precision(tmp_path: Path) -> None:
    """Losses by step, then the scores; a folder in a folder is one name. Losses of the end and run times stay out."""
    (run := tmp_path / "runs" / "f1-set" / "zlpr").mkdir(parents=True)
    history = [{"step": 1, "loss": 1 / 3, "epoch": 0.1}, {"step": 2, "loss": 0.25}, {"step": 2, "train_loss": 0.3}]
    (run / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    scores = {"eval_f1": 2 / 3, "eval_f1/A": 0.5, "eval_gold/A": 7, "eval_macro_f1": 0.5, "eval_runtime": 9, "epoch": 1}
    (run / "eval_results.json").write_text(json.dumps(scores))
    evidence.collect(tmp_path / "runs", tmp_path)
    records = list(map(json.loads, (tmp_path / "f1-set-zlpr.jsonl").read_text().splitlines()))
    dev = {"f1": 2 / 3, "f1/A": 0.5, "gold/A": 7, "macro_f1": 0.5}
    assert records == [{"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 0.25}, {"step": 2, "dev": dev}]


def test_the_page_says_what_the_files_say() -> None:
    page = evidence.PAGE.read_text("utf-8")
    assert evidence.filled(page, evidence.tables()) == page


def test_the_figures_can_be_drawn(tmp_path: Path) -> None:
    for figure in (evidence.loss_figure(), evidence.head_figure()):
        figure.savefig(tmp_path / "figure.png")


# --- measure_head.py -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_head_is_measured_beside_its_contenders(run: Run, tmp_path: Path) -> None:
    status, err = run("--documents=32", "--seconds=0", "--out", tmp_path / "new" / "head.json")
    assert status == 0, err
    record = json.loads((tmp_path / "new" / "head.json").read_text())
    assert {"device", "threads", "torch", "date"} <= record["conditions"].keys()
    assert [case["name"] for case in record["cases"]] == ["16 sentences", "4 documents of 32"]
    for case in record["cases"]:
        assert list(case["head"]) == ["eager", "compile", "fused"]
        assert list(case["step"]) == list(case["decode"]) == ["eager", "fused"]
        for measured in (m for part in ("head", "step", "decode") for m in case[part].values()):
            assert measured["time"]["median"] > 0
            assert measured["peak"] > 0
        for contender in ("eager", "fused"):
            assert case["head"][contender]["peak"] < case["step"][contender]["peak"]


def test_where_all_scores_need_too_much_memory_the_fused_head_is_measured_alone(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(measure_head.SCORE_TENSORS, "eager", 1e12)
    status, err = run("--documents=32", "--seconds=0", "--out", tmp_path / "head.json")
    assert status == 0, err
    for case in json.loads((tmp_path / "head.json").read_text())["cases"]:
        assert list(case["head"]) == list(case["step"]) == list(case["decode"]) == ["fused"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--documents=8"], "argument --documents: takes int of at least 16; got '8'"),
        (["--seconds=-1"], "argument --seconds: takes float of at least 0; got '-1'"),
        (["--head=crf"], "argument --head: invalid choice: 'crf'"),
        (["--device=abacus"], "argument --device: "),
        (["--data=absent.jsonl"], "error: absent.jsonl: No such file"),
        (["--documents=1000000"], "error: --documents 1000000: a batch takes 4; "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_name_the_argument(run: Run, arguments: list[str], says: str) -> None:
    status, err = run(*arguments)
    assert status == 2
    assert says in err


def test_errors_name_the_file(run: Run, tmp_path: Path) -> None:
    (data := tmp_path / "a.jsonl").write_text(json.dumps({"tokens": ["a"], "spans": []}))
    for arguments, says in (
        (["--data", data], f"error: {data}: no span\n"),
        (["--out", data / "head.json"], f"error: --out: {data}"),
    ):
        status, err = run(*arguments)
        assert status == 2
        assert says in err


def test_join_keeps_every_token_and_span() -> None:
    sentences = [synthetic.Sentence(list("abc"), [("X", 0, 2)]), synthetic.Sentence(list("de"), [("Y", 1, 1)])] * 3
    sizes = [len(s.tokens) for s in sentences]
    documents = measure_head.join(sentences, sizes, limit=8)
    assert ["".join(d.tokens) for d in documents] == ["abcdeabc", "deabcde"]
    assert documents[0].spans == [("X", 0, 2), ("Y", 4, 4), ("X", 5, 7)]
    assert documents[1].spans == [("Y", 1, 1), ("X", 2, 4), ("Y", 6, 6)]
    assert measure_head.join(sentences, sizes, limit=1) == sentences


def test_long_documents_are_read_in_windows() -> None:
    """Each by itself: 40 tokens are three windows of 14, the last one of them short."""
    tokenizer, model = synthetic.encoder([["a", "b"]] * 3)
    tokenizer.model_max_length = 16
    encoder = measure_head.WindowedEncoder(model, tokenizer).eval()
    ids, mask = torch.randint(0, 5, (2, 40)), torch.ones(2, 40, dtype=torch.int64)
    mask[1, 10:] = 0
    hidden = encoder(ids, mask).last_hidden_state
    assert hidden.shape == (2, 40, 128)
    assert hidden.isfinite().all()
    for start in (0, 14, 28):
        window = slice(start, start + 14)
        torch.testing.assert_close(hidden[:1, window], model(ids[:1, window], mask[:1, window]).last_hidden_state)
    torch.testing.assert_close(hidden[1:, :10], model(ids[1:, :10], mask[1:, :10]).last_hidden_state)


def test_documents_have_at_most_so_many_pieces() -> None:
    tokenizer, _ = synthetic.encoder([["a"]])
    sentences = [synthetic.Sentence(["a", "b", "c"], [])] * 5
    documents = measure_head.join_pieces(tokenizer, sentences, 7)  # one of them special
    assert [len(document.tokens) for document in documents] == [6, 6, 3]
