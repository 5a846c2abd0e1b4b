"""The example programs: what they learn, what they read and refuse, and that a run can be interrupted."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

for package in ("rich", "safetensors"):
    pytest.importorskip(package, reason=f"the examples need {package}: pip install 'flashpointer[examples]'")
EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
common, train_ner, train_multilabel = map(importlib.import_module, ("common", "train_ner", "train_multilabel"))

both_programs = pytest.mark.parametrize("program", [train_ner, train_multilabel], ids=lambda p: p.__name__)
both_heads = pytest.mark.parametrize("head", ["efficient", "global"])


class Finished(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Runs a program in this process, as its command line would."""

    def run(program: Any, *arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", "--device=cpu", *map(str, arguments)])
        try:
            status = common.exit_status(program.main)
        except SystemExit as exit_:  # as argparse does
            status = exit_.code
        return Finished(status, *capsys.readouterr())

    return run


def log_of(path: Path, key: str = "loss") -> list[Any]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record[key] for record in records if key in record]


def weights_in(folder: Path) -> bytes:
    """The weights of the one checkpoint that is there."""
    (file,) = folder.rglob("model.safetensors")
    return file.read_bytes()


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["train_ner.py"], ["train_multilabel.py", "--compare"]], ids=lambda command: command[0]
)
def test_the_commands_of_the_readme(command: list[str], tmp_path: Path) -> None:
    """In a process of their own, within three minutes."""
    line = [sys.executable, EXAMPLES / command[0], *command[1:], "--log", tmp_path / "log"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr
    logs = sorted(tmp_path.iterdir())
    assert len(logs) == (2 if "--compare" in command else 1)
    for log in logs:
        assert log_of(log, "dev")[-1]["f1"] > (0.95 if len(logs) == 1 else 0.9)


@both_heads
def test_the_tagger_learns_nested_entities(run: Callable[..., Finished], tmp_path: Path, head: str) -> None:
    done = run(train_ner, "--steps=200", "--head", head, "--log", tmp_path / "log")
    assert done.status == 0, done.err
    (dev,) = log_of(tmp_path / "log", "dev")
    assert dev["f1"] > 0.95
    assert f"{dev['f1']:.4f}" in done.out
    assert len(log_of(tmp_path / "log")) == 200


@pytest.mark.parametrize(
    "options",
    [["--compare"], ["--r-drop=1", "--smoothing=0.1"], ["--loss=bce", "--mixup=0.2"]],
    ids=" ".join,
)
def test_the_classifier_learns(run: Callable[..., Finished], tmp_path: Path, options: list[str]) -> None:
    done = run(train_multilabel, "--steps=150", "--log", tmp_path / "log", *options)
    assert done.status == 0, done.err
    for log in tmp_path.iterdir():
        (dev,) = log_of(log, "dev")
        assert dev["precision"] > 0.75  # to predict every label is right for one in five
        assert dev["recall"] > 0.1


@both_heads
def test_fused_and_eager_losses_coincide(run: Callable[..., Finished], tmp_path: Path, head: str) -> None:
    curves = []
    for loss in ("fused", "eager"):
        assert run(train_ner, "--steps=100", "--head", head, "--loss", loss, "--log", tmp_path / loss).status == 0
        curves.append(torch.tensor(log_of(tmp_path / loss)))
    torch.testing.assert_close(*curves, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["germeval2014", "wnut17"])
def test_fused_and_eager_losses_coincide_on_real_data(run: Callable[..., Finished], tmp_path: Path, name: str) -> None:
    if "FLASHPOINTER_DATA" not in os.environ:
        pytest.skip("FLASHPOINTER_DATA names no folder of data sets")
    folder = Path(os.environ["FLASHPOINTER_DATA"]) / name
    curves = []
    for loss in ("fused", "eager"):
        files = ["--train", folder / "dev.jsonl.gz", "--dev", folder / "dev.jsonl.gz"]
        assert run(train_ner, *files, "--steps=100", "--loss", loss, "--log", tmp_path / loss).status == 0
        curves.append(torch.tensor(log_of(tmp_path / loss)))
    torch.testing.assert_close(*curves, rtol=1e-4, atol=0)


# --- interruption --------------------------------------------------------------------------------------------------

RESUMED = {
    "tagger": (train_ner, []),
    "tagger-bf16": (train_ner, ["--precision=bf16", "--head=global"]),
    # These draw random numbers beside those of dropout.
    "classifier": (train_multilabel, ["--r-drop=1", "--mixup=0.5"]),
}


@pytest.mark.parametrize("program, options", RESUMED.values(), ids=RESUMED)
def test_an_interrupted_run_ends_with_the_same_weights(
    run: Callable[..., Finished],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    program: Any,
    options: list[str],
) -> None:
    """It also ends with the same log, although the interrupted run had logged steps after its last checkpoint."""

    def arguments(name: str) -> list[object]:
        return ["--steps=24", "--save-every=10", "--out", tmp_path / name, "--log", tmp_path / f"{name}.log", *options]

    assert run(program, *arguments("whole")).status == 0
    train_on = common.Trainer._train_on

    def interrupted(trainer: Any, batch: Any) -> float:
        if trainer.step == 17:
            raise KeyboardInterrupt
        return train_on(trainer, batch)

    monkeypatch.setattr(common.Trainer, "_train_on", interrupted)
    stopped = run(program, *arguments("halves"))
    assert stopped.status == 130
    assert "--resume" in stopped.err
    monkeypatch.setattr(common.Trainer, "_train_on", train_on)
    assert weights_in(tmp_path / "halves") != weights_in(tmp_path / "whole")
    assert len(log_of(tmp_path / "halves.log")) == 17
    assert run(program, *arguments("halves"), "--resume").status == 0
    assert weights_in(tmp_path / "halves") == weights_in(tmp_path / "whole")
    for key in ("step", "loss", "dev"):
        assert log_of(tmp_path / "halves.log", key) == log_of(tmp_path / "whole.log", key)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights(run: Callable[..., Finished], tmp_path: Path) -> None:
    """Killed at no point in particular, while it writes a checkpoint after each step."""

    def arguments(name: str) -> list[object]:
        return ["--steps=60", "--save-every=1", "--out", tmp_path / name, "--log", tmp_path / f"{name}.log"]

    # As many threads in both processes: their number decides the order of sums.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, EXAMPLES / "train_ner.py", "--device=cpu", *arguments("halves")]
    process = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.DEVNULL)
    log = tmp_path / "halves.log"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 20):
        time.sleep(0.01)
    process.kill()
    assert process.wait() != 0
    assert run(train_ner, *arguments("halves"), "--resume").status == 0
    assert run(train_ner, *arguments("whole")).status == 0
    assert weights_in(tmp_path / "halves") == weights_in(tmp_path / "whole")


def test_comparison_resumes_where_one_loss_has_not_begun(run: Callable[..., Finished], tmp_path: Path) -> None:
    folder = ["--compare", "--steps=4", "--out"]
    assert run(train_multilabel, *folder, tmp_path / "whole").status == 0
    assert run(train_multilabel, "--loss=zlpr", "--steps=4", "--out", tmp_path / "halves" / "zlpr").status == 0
    # It is the same run but for the option that names both.
    config = tmp_path / "halves" / "zlpr" / "checkpoint-4" / "config.json"
    config.write_text(config.read_text().replace('"compare": false', '"compare": true'))
    assert run(train_multilabel, *folder, tmp_path / "halves", "--resume").status == 0
    for loss in ("zlpr", "bce"):
        assert weights_in(tmp_path / "halves" / loss) == weights_in(tmp_path / "whole" / loss)


def test_a_finished_run_resumes_to_its_evaluation(run: Callable[..., Finished], tmp_path: Path) -> None:
    arguments = ["--steps=3", "--out", tmp_path / "out"]
    tables = [run(train_ner, *arguments, *more).out for more in ([], ["--resume"])]
    assert tables[0][tables[0].index("precision") :] == tables[1][tables[1].index("precision") :]


def test_resume_refuses_what_it_cannot_continue(run: Callable[..., Finished], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "no checkpoint in" in run(train_ner, "--resume", "--out", out).err
    assert run(train_ner, "--steps=2", "--out", out).status == 0
    assert "--resume continues it" in run(train_ner, "--steps=2", "--out", out).err
    other = run(train_ner, "--steps=2", "--lr=0.5", "--out", out, "--resume")
    assert other.status == 2
    assert "--lr 0.002; got 0.5" in other.err
    for name in ("state.pt", "model.safetensors", "config.json"):
        (out / "checkpoint-2" / name).write_bytes(b"damaged")
        damaged = run(train_ner, "--steps=2", "--out", out, "--resume")
        assert damaged.status == 2
        assert f"{out / 'checkpoint-2'} cannot be read" in damaged.err


# --- what is malformed ---------------------------------------------------------------------------------------------

GOOD_SENTENCE, GOOD_TEXT = {"tokens": ["Anna", "ran"], "spans": [[0, 0, "PER"]]}, {"text": "yes", "labels": ["joy"]}


def sentence(**changes: object) -> str:
    return json.dumps({**GOOD_SENTENCE, **changes})


def text(**changes: object) -> str:
    return json.dumps({**GOOD_TEXT, **changes})


# (program, name of the file, its third line, what the error says after the file and the line)
MALFORMED = {
    "bad JSON": (train_ner, "a.jsonl", '{"tokens": [', "not JSON"),
    "no object": (train_ner, "a.json", "[1, 2]", "takes a JSON object; got [1, 2]"),
    "no tokens": (train_ner, "a.jsonl", '{"spans": []}', "no key 'tokens'; got ['spans']"),
    "no spans": (train_ner, "a.jsonl", '{"tokens": ["a"]}', "no key 'spans'"),
    "empty": (train_ner, "a.jsonl", sentence(tokens=[]), "'tokens' is empty"),
    "text for tokens": (train_ner, "a.jsonl", sentence(tokens="Anna ran"), "'tokens' takes a list; got 'Anna ran'"),
    "token no string": (train_ner, "a.jsonl", sentence(tokens=["a", 3]), "'tokens' takes strings; got 3 at 1"),
    "span out of range": (train_ner, "a.jsonl", sentence(spans=[[0, 2, "X"]]), "0 <= start <= end < 2"),
    "span reversed": (train_ner, "a.jsonl", sentence(spans=[[1, 0, "X"]]), "got [1, 0, 'X']"),
    "span negative": (train_ner, "a.jsonl", sentence(spans=[[-1, 0, "X"]]), "got [-1, 0, 'X']"),
    "span of two": (train_ner, "a.jsonl", sentence(spans=[[0, 0]]), "takes [start, end, type]; got [0, 0]"),
    "span of bool": (train_ner, "a.jsonl", sentence(spans=[[False, 0, "X"]]), "takes [start, end, type]"),
    "span of float": (train_ner, "a.jsonl", sentence(spans=[[0.0, 0, "X"]]), "takes [start, end, type]"),
    "span without type": (train_ner, "a.jsonl", sentence(spans=[[0, 0, ""]]), "takes [start, end, type]"),
    "gzipped": (train_ner, "a.jsonl.gz", sentence(spans=[[0, 2, "X"]]), "0 <= start <= end < 2"),
    "unknown tag": (train_ner, "a.conll", "Anna X-PER", "got 'X-PER'"),
    "tag without type": (train_ner, "a.conll", "Anna B", "got 'B'"),
    "no tag": (train_ner, "a.bio", "Anna", "takes a token and its tag; got 'Anna'"),
    "gzipped columns": (train_ner, "a.bio.gz", "Anna\t?", "got '?'"),
    "text missing": (train_multilabel, "a.jsonl", '{"labels": []}', "no key 'text'"),
    "text no string": (train_multilabel, "a.jsonl", text(text=["yes"]), "'text' takes a str; got ['yes']"),
    "label no string": (train_multilabel, "a.jsonl", text(labels=[None]), "'labels' takes strings; got None at 0"),
    "labels no list": (train_multilabel, "a.jsonl", text(labels="joy"), "'labels' takes a list; got 'joy'"),
    "not UTF-8": (train_multilabel, "a.jsonl", b"\xff\xfe", "codec can't decode"),
}


@pytest.mark.parametrize("program, name, line, says", MALFORMED.values(), ids=MALFORMED)
def test_errors_name_the_file_and_the_line(
    run: Callable[..., Finished], tmp_path: Path, program: Any, name: str, line: str | bytes, says: str
) -> None:
    columns = not {".jsonl", ".json"} & set(Path(name).suffixes)
    good = "Anna B-PER" if columns else sentence() if program is train_ner else text()
    content = f"{good}\n\n".encode() + (line if isinstance(line, bytes) else line.encode()) + b"\n"
    file = tmp_path / name
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    done = run(program, "--train", file, "--dev", file)
    assert done.status == 2
    assert f"error: {file}:3: " in done.err
    assert says in done.err


@both_programs
def test_errors_name_a_file_that_is_none(run: Callable[..., Finished], tmp_path: Path, program: Any) -> None:
    absent, blank, broken = (tmp_path / name for name in ("absent.jsonl", "blank.jsonl", "broken.jsonl.gz"))
    blank.write_text("\n\n")
    broken.write_bytes(gzip.compress(b"{}" * 1000)[:-9])
    for file, says in ((absent, "No such file"), (blank, "no "), (broken, "ended"), (tmp_path, "directory")):
        done = run(program, "--train", file, "--dev", file)
        assert done.status == 2
        assert str(file) in done.err
        assert says in done.err


@both_programs
@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--steps=0"], "argument --steps: takes int of at least 1; got '0'"),
        (["--lr=fast"], "argument --lr: takes float from 0 to 1; got 'fast'"),
        (["--warmup=nan"], "argument --warmup: takes float from 0 to 1; got 'nan'"),
        (["--loss=hinge"], "argument --loss: invalid choice: 'hinge'"),
        (["--precision=fp16"], "argument --precision: fp16 needs a CUDA device; got cpu"),
        (["--device=abacus"], "argument --device: "),
        (["--train=a.jsonl"], "--train and --dev go together"),
        (["--resume"], "--resume needs --out"),
        (["--colour=red"], "unrecognized arguments: --colour=red"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_name_the_argument(run: Callable[..., Finished], program: Any, arguments: list[str], says: str) -> None:
    done = run(program, *arguments)
    assert done.status == 2
    assert says in done.err


@both_programs
def test_errors_name_a_folder_that_cannot_be_written(
    run: Callable[..., Finished], tmp_path: Path, program: Any
) -> None:
    (tmp_path / "file").write_text("")
    for option in ("--out", "--log"):
        done = run(program, "--steps=1", option, tmp_path / "file" / "inner")
        assert done.status == 2
        assert f"error: {option}: {tmp_path / 'file'}" in done.err


def test_an_error_is_one_line_to_the_shell(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "train_ner.py"), "--train", "no.jsonl", "--dev", "no.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "train_ner.py: error: no.jsonl: No such file or directory\n"


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tags, spans",
    [
        ("O B-A I-A O", [("A", 1, 2)]),
        ("B-A B-A I-B O", [("A", 0, 0), ("A", 1, 1), ("B", 2, 2)]),
        ("I-A I-A O I-B", [("A", 0, 1), ("B", 3, 3)]),
        ("S-A B-A I-A E-A", [("A", 0, 0), ("A", 1, 3)]),
        ("U-A B-A L-A I-A", [("A", 0, 0), ("A", 1, 2), ("A", 3, 3)]),
        ("O O O O", []),
    ],
)
@pytest.mark.parametrize("separator", [" ", "\t", " NN "])
def test_columns_are_read_as_the_conll_scorer_does(
    tmp_path: Path, tags: str, spans: list[tuple[str, int, int]], separator: str
) -> None:
    lines = [f"w{i}{separator}{tag}" for i, tag in enumerate(tags.split())]
    block = "\n".join(lines)
    file = tmp_path / "a.bio.gz"
    file.write_bytes(gzip.compress(f"-DOCSTART- -X- O\n\n{block}\n\n\n{block}".encode()))
    assert train_ner.read(file) == [train_ner.Sentence(["w0", "w1", "w2", "w3"], spans)] * 2


def test_json_lines_and_columns_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.bio").write_text("Anna B-PER\nSmith I-PER\nran O\n")
    line = {"tokens": ["Anna", "Smith", "ran"], "spans": [[0, 1, "PER"]]}
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(line).encode()))
    assert train_ner.read(tmp_path / "a.bio") == train_ner.read(tmp_path / "a.jsonl.gz")


def test_the_synthetic_corpus_is_nested_and_its_dev_names_are_new() -> None:
    train, dev = train_ner.synthetic(0)
    assert train_ner.synthetic(0) == (train, dev) != train_ner.synthetic(1)
    frame = {word for s in train for word in s.tokens} & {word for s in dev for word in s.tokens}
    templates = " ".join(template for templates in train_ner.GRAMMAR.values() for template in templates)
    assert frame <= set(templates.split())
    for split in (train, dev):
        assert any(not s.spans for s in split)
        nested = sum(any(a != b and a[1] <= b[1] and b[2] <= a[2] for a in s.spans for b in s.spans) for s in split)
        assert nested > len(split) / 3


def test_join_keeps_every_token_and_span() -> None:
    sentences = [train_ner.Sentence(list("abc"), [("X", 0, 2)]), train_ner.Sentence(list("de"), [("Y", 1, 1)])] * 3
    sizes = [len(s.tokens) for s in sentences]
    documents = train_ner.join(sentences, sizes, limit=8)
    assert ["".join(d.tokens) for d in documents] == ["abcdeabc", "deabcde"]
    assert documents[0].spans == [("X", 0, 2), ("Y", 4, 4), ("X", 5, 7)]
    assert documents[1].spans == [("Y", 1, 1), ("X", 2, 4), ("Y", 6, 6)]
    assert train_ner.join(sentences, sizes, limit=1) == sentences


# --- pieces --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def hub_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of 16 positions, which splits words into single letters and drops control characters."""
    transformers = pytest.importorskip("transformers", reason="--encoder needs transformers")
    folder = tmp_path_factory.mktemp("encoder")
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=16)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=16, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


# Nested, repeated and crossing spans, one token, a sentence without any, a word that the tokenizer drops.
SENTENCES = [
    train_ner.Sentence(["ab", "cde", "f"], [("X", 0, 2), ("X", 0, 0), ("Y", 0, 2), ("Y", 0, 2), ("X", 1, 2)]),
    train_ner.Sentence(["a"], [("Y", 0, 0)]),
    train_ner.Sentence(["abcdef", "ghi"], []),
    train_ner.Sentence(["ab", "\u200d", "cd"], [("X", 1, 1), ("Y", 1, 2)]),
]
TYPES = ["X", "Y"]


def predicted(encoder: Any, sentences: list[Any], max_length: int) -> tuple[list[set[tuple[str, int, int]]], int]:
    """What the tagger says of sentences where its head finds just the labels that it is taught."""
    encoded = train_ner.encode(encoder, sentences, max_length)
    batch = train_ner.collate(encoded.examples, TYPES, encoder.padding)
    model = train_ner.Tagger(encoder, "efficient", len(TYPES), "fused")
    model.head.decode = lambda hidden, mask: (batch["spans"], None)
    assert model(batch).isfinite()
    found: list[set[tuple[str, int, int]]] = [set() for _ in sentences]
    for i, kind, start, end in model.predict(batch).tolist():
        found[i].add((TYPES[kind], start, end))
    return found, encoded.lost


def encoders(request: pytest.FixtureRequest, kind: str) -> Any:
    if kind == "plain":
        return common.PlainEncoder([s.tokens for s in SENTENCES])
    return common.HubEncoder(str(request.getfixturevalue("hub_encoder")))


@pytest.mark.parametrize("kind", ["plain", "hub"])
def test_spans_make_the_round_trip_through_pieces(request: pytest.FixtureRequest, kind: str) -> None:
    found, lost = predicted(encoders(request, kind), SENTENCES, max_length=16)
    assert found == [set(s.spans) for s in SENTENCES]
    assert lost == 0


@pytest.mark.parametrize("kind, max_length", [("plain", 2), ("hub", 2 + 5)])
def test_truncation_loses_what_lies_beyond(request: pytest.FixtureRequest, kind: str, max_length: int) -> None:
    """Two words are kept of the first sentence, with their five pieces."""
    found, lost = predicted(encoders(request, kind), SENTENCES[:2], max_length)
    assert found == [{("X", 0, 0)}, {("Y", 0, 0)}]
    assert lost == 4


def test_pieces_of_words(request: pytest.FixtureRequest) -> None:
    encoder = encoders(request, "hub")
    assert [pieces.words for pieces in encoder.pieces([s.tokens for s in SENTENCES], 16)] == [
        [-1, 0, 0, 1, 1, 1, 2, -1],
        [-1, 0, -1],
        [-1, *[0] * 6, *[1] * 3, -1],
        [-1, 0, 0, 1, 2, 2, -1],
    ]
    with pytest.raises(common.InputError, match="--max-length takes more than the 2 special tokens"):
        encoder.pieces([["a"]], 2)


def test_long_documents_are_read_in_windows(request: pytest.FixtureRequest) -> None:
    """Each by itself: 40 pieces are three windows of 14, the last one of them short."""
    encoder = encoders(request, "hub").eval()
    ids, mask = torch.randint(5, 30, (2, 40)), torch.ones(2, 40, dtype=torch.int64)
    mask[1, 10:] = 0
    hidden = encoder(ids, mask)
    assert hidden.shape == (2, 40, encoder.width)
    assert hidden.isfinite().all()
    for start in (0, 14, 28):
        window = slice(start, start + 14)
        torch.testing.assert_close(hidden[:1, window], encoder(ids[:1, window], mask[:1, window]))
    torch.testing.assert_close(hidden[1:, :10], encoder(ids[1:, :10], mask[1:, :10]))


@both_programs
def test_a_hub_encoder_trains_and_resumes(
    run: Callable[..., Finished], tmp_path: Path, hub_encoder: Path, program: Any
) -> None:
    lines = [{"tokens": s.tokens, "spans": [[a, b, kind] for kind, a, b in s.spans]} for s in SENTENCES]
    if program is train_multilabel:
        lines = [{"text": t, "labels": ls} for t, ls in (("ab c", ["X"]), ("", []), ("a" * 40, ["X", "Y"]))]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    options = ["--train", file, "--dev", file, "--encoder", hub_encoder, "--epochs=3", "--batch-size=2"]
    if program is train_ner:
        options += ["--join-tokens=18"]
    done = run(program, *options, "--out", tmp_path / "out")
    assert done.status == 0, done.err
    assert run(program, *options, "--out", tmp_path / "out", "--resume").status == 0


def test_cut_entities_are_reported_and_missed(run: Callable[..., Finished], tmp_path: Path, hub_encoder: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"tokens": ["ab", "cd", "ef"], "spans": [[0, 0, "X"], [2, 2, "X"], [1, 2, "Y"]]}))
    arguments = ["--train", file, "--dev", file, "--encoder", hub_encoder, "--max-length=5", "--steps=1"]
    done = run(train_ner, *arguments, "--log", tmp_path / "log")
    assert done.status == 0, done.err
    assert "dev: 1 sentences, 3 entities of 2 types; 2 of them beyond --max-length 5" in " ".join(done.out.split())
    (dev,) = log_of(tmp_path / "log", "dev")
    assert dev["recall"] <= 1 / 3


@both_programs
def test_errors_name_the_encoder(run: Callable[..., Finished], tmp_path: Path, program: Any) -> None:
    pytest.importorskip("transformers", reason="--encoder needs transformers")
    done = run(program, "--encoder", tmp_path)
    assert done.status == 2
    assert f"--encoder {tmp_path}: " in done.err


# --- the parts -----------------------------------------------------------------------------------------------------


def test_metrics_are_those_computed_by_hand() -> None:
    tally = common.Tally(["A", "B", "C"])
    # Listed twice counts once; right type at wrong ends and wrong type at right ends are both wrong.
    tally.add([("A", 0, 1), ("A", 0, 1), ("A", 3, 3), ("B", 5, 6)], [("A", 0, 1), ("A", 3, 4), ("A", 5, 6)])
    tally.add([("B", 0, 0)], [("B", 0, 0), ("B", 0, 0)])
    tally.add([], [])
    assert tally.score(["A"]) == pytest.approx((1 / 3, 1 / 2, 2 / 5))
    assert tally.score(["B"]) == pytest.approx((1, 1 / 2, 2 / 3))
    assert tally.score(["C"]) == (0, 0, 0)
    assert tally.micro == pytest.approx((2 / 4, 2 / 4, 1 / 2))
    assert tally.table("dev").row_count == 5
    assert tally.macro_f1 == pytest.approx((2 / 5 + 2 / 3 + 0) / 3)


def test_an_epoch_sees_every_example_once_in_an_order_of_its_own() -> None:
    draw = partial(common.indices_of, examples=10, batch_size=4, seed=0)
    epochs = [[draw(step) for step in range(first, first + 3)] for first in (0, 3)]
    for batches in epochs:
        assert [len(batch) for batch in batches] == [4, 4, 2]
        assert sorted(i for batch in batches for i in batch) == list(range(10))
    assert epochs[0] != epochs[1]
    assert draw(0) == epochs[0][0]
    assert common.indices_of(0, 10, 4, seed=1) != epochs[0][0]


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [common.learning_rate(step, steps=10, warmup=0.2) for step in range(11)]
    assert rates == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])
    assert common.learning_rate(0, steps=1, warmup=1.0) == 1


def test_padding_changes_nothing() -> None:
    encoder = common.PlainEncoder([["a", "b"]] * 3).eval()
    ids, mask = torch.tensor([[2, 3, 1, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    torch.testing.assert_close(encoder(ids, mask)[:, :3], encoder(ids[:, :3], mask[:, :3]))


def test_classifier_options_change_the_loss_as_they_say() -> None:
    """Without dropout: smoothing by hand, mixup of a text with itself, and R-Drop of two passes that are one."""
    encoder = common.PlainEncoder([["a", "b"]] * 3)
    batch = {
        "input_ids": torch.tensor([[2, 3]]),
        "attention_mask": torch.tensor([[1, 1]]),
        "labels": torch.tensor([[True, False, False]]),
    }
    model = train_multilabel.Classifier(encoder, 3, "zlpr").eval()
    scores = model.scores(batch).detach()
    plain = model(batch).item()
    assert plain == pytest.approx(train_multilabel.fp.reference.zlpr_loss(scores, batch["labels"]).item(), rel=1e-5)
    model.mixup = model.r_drop = 0.5
    assert model(batch).item() == pytest.approx(plain, rel=1e-5)
    model.smoothing = 0.2
    soft = torch.tensor([[0.9, 0.1, 0.1]])
    assert model(batch).item() == pytest.approx(train_multilabel.fp.reference.zlpr_loss(scores, soft).item(), rel=1e-5)
