"""The example programs: what they learn, what they read and refuse, and that a run can be interrupted."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import flashpointer as fp

for package in ("accelerate", "transformers"):
    pytest.importorskip(package, reason=f"the examples need {package}: pip install 'flashpointer[examples]'")
EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
transformers = importlib.import_module("transformers")
PROGRAMS = ("common", "synthetic", "train_ner", "train_many_labels", "train_multilabel", "train_relations")
common, synthetic, train_ner, train_many_labels, train_multilabel, train_relations = map(
    importlib.import_module, PROGRAMS
)

both_programs = pytest.mark.parametrize("program", [train_ner, train_multilabel], ids=lambda p: p.__name__)
both_heads = pytest.mark.parametrize("head", ["efficient", "global"])


class Finished(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Finished]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a program in this process, as its command line would."""

    def run(program: Any, *arguments: object) -> Finished:
        ours = ["--use_cpu=True", "--disable_tqdm=True", f"--output_dir={tmp_path / 'out'}"]
        monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *ours, *map(str, arguments)])
        try:
            status = common.exit_status(program.main)
        except SystemExit as exit_:  # as argparse does
            status = exit_.code
        return Finished(status, *capsys.readouterr())

    return run


def results_in(folder: Path) -> dict[str, float]:
    results: dict[str, float] = json.loads((folder / "eval_results.json").read_text())
    return results


def log_in(folder: Path, key: str = "loss") -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [record[key] for record in history if key in record]


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["train_ner.py"], ["train_multilabel.py", "--compare"]], ids=lambda command: command[0]
)
def test_the_commands_of_the_readme(command: list[str], tmp_path: Path) -> None:
    """In a process of their own, within three minutes."""
    line = [sys.executable, EXAMPLES / command[0], *command[1:]]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=180, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folders = [path.parent for path in tmp_path.rglob("eval_results.json")]
    assert len(folders) == (2 if "--compare" in command else 1)
    for folder in folders:
        assert results_in(folder)["eval_f1"] > (0.95 if len(folders) == 1 else 0.9)


@both_heads
def test_the_tagger_learns_nested_entities(run: Run, tmp_path: Path, head: str) -> None:
    done = run(train_ner, "--max_steps=200", "--head", head)
    assert done.status == 0, done.err
    f1 = results_in(tmp_path / "out")["eval_f1"]
    assert f1 > 0.95
    assert str(round(f1, 4)) in done.out
    folder = tmp_path / "out" / "model"
    assert f"SpanModel.from_pretrained({str(folder)!r})" in done.out
    texts, entities = fp.spans.join_words(*zip(*synthetic.entities(0)[1][:20], strict=True))
    model = importlib.import_module("flashpointer.hf").SpanModel.from_pretrained(folder)
    found = model.predict(texts, transformers.AutoTokenizer.from_pretrained(folder))
    given = {(i, kind, start, end) for i, of in enumerate(entities) for kind, start, end in of}
    read = {(i, e["label"], e["start"], e["end"]) for i, of in enumerate(found) for e in of}
    assert len(given & read) > 0.9 * len(given | read)
    done = run(train_ner, "--trained", folder)  # scores the same alone
    assert done.status == 0 and results_in(tmp_path / "out")["eval_f1"] == pytest.approx(f1)


@pytest.mark.parametrize(
    "options",
    [["--r_drop=1", "--smoothing=0.1"], ["--loss=bce", "--mixup=0.2"]],
    ids=" ".join,
)
def test_the_classifier_learns(run: Run, tmp_path: Path, options: list[str]) -> None:
    done = run(train_multilabel, "--max_steps=150", *options)
    assert done.status == 0, done.err
    result = results_in(tmp_path / "out")
    assert result["eval_precision"] > 0.75  # to predict every label is right for one in five
    assert result["eval_recall"] > 0.1


@pytest.mark.slow
def test_the_linker_learns_relations(run: Run, tmp_path: Path) -> None:
    done = run(train_relations)
    assert done.status == 0, done.err
    result = results_in(tmp_path / "out")
    assert result["eval_f1"] > 0.95
    assert min(result[f"eval_f1/{predicate}"] for predicate in synthetic.PREDICATES) > 0.9


def check_losses(run: Run, folder: Path, *options: object) -> None:
    """Those of 100 steps, without the scores, and from all scores and dense labels, differ by less than 1e-4."""
    curves = []
    for loss in ("fused", "eager"):
        done = run(train_ner, "--max_steps=100", "--logging_steps=1", "--learning_rate=2e-3", "--loss", loss, *options)
        assert done.status == 0, done.err
        curves.append(torch.tensor(log_in(folder / "out")))
    assert curves[0].shape == (100,)
    assert not curves[0].equal(curves[1])  # else one program was run twice
    torch.testing.assert_close(*curves, rtol=1e-4, atol=0)


@both_heads
def test_fused_and_eager_losses_coincide(run: Run, tmp_path: Path, head: str) -> None:
    check_losses(run, tmp_path, "--head", head)


@pytest.mark.parametrize("name", ["germeval2014", "wnut17"])
def test_fused_and_eager_losses_coincide_on_real_data(run: Run, tmp_path: Path, name: str) -> None:
    if "FLASHPOINTER_DATA" not in os.environ:
        pytest.skip("FLASHPOINTER_DATA names no folder of data sets")
    file = Path(os.environ["FLASHPOINTER_DATA"]) / name / "dev.jsonl.gz"
    check_losses(run, tmp_path, "--train", file, "--dev", file)


# --- interruption --------------------------------------------------------------------------------------------------

RESUMED = {
    "tagger": (train_ner, []),
    "tagger-bf16": (train_ner, ["--bf16=True", "--head=global"]),
    # These draw random numbers beside those of dropout.
    "classifier": (train_multilabel, ["--r_drop=1", "--mixup=0.5"]),
}


@pytest.mark.parametrize("program, options", RESUMED.values(), ids=RESUMED)
def test_a_run_resumed_from_a_checkpoint_ends_as_one_that_never_stopped(
    run: Run, tmp_path: Path, program: Any, options: list[str]
) -> None:
    """With the same weights, bit for bit, and the same log."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    arguments = ["--max_steps=24", "--save_steps=10", "--logging_steps=1", *options]
    assert run(program, *arguments, "--output_dir", whole).status == 0
    resumed = run(program, *arguments, "--output_dir", halves, "--resume_from_checkpoint", whole / "checkpoint-10")
    assert resumed.status == 0, resumed.err
    assert not (halves / "checkpoint-10").exists()
    weights = [(folder / "model.safetensors").read_bytes() for folder in (whole, whole / "checkpoint-20", halves)]
    assert weights[0] == weights[2] != weights[1]
    for key in ("step", "loss", "learning_rate"):
        assert log_in(whole, key)[:24] == log_in(halves, key)[:24]
    assert results_in(whole)["eval_f1"] == results_in(halves)["eval_f1"]


# --- what is malformed ---------------------------------------------------------------------------------------------

GOOD_SENTENCE, GOOD_TEXT = {"tokens": ["Anna", "ran"], "spans": [[0, 0, "PER"]]}, {"text": "yes", "labels": ["joy"]}


def sentence(**changes: object) -> str:
    return json.dumps({**GOOD_SENTENCE, **changes})


def text(**changes: object) -> str:
    return json.dumps({**GOOD_TEXT, **changes})


# (program, name of the file, its third line, what the error says after the file and the line)
MALFORMED = {
    "bad JSON": (train_ner, "a.jsonl", '{"tokens": [', "not JSON"),
    "no object": (train_ner, "a.json", "[1, 2]", "takes an object of 'tokens': list[str], 'spans': list; got [1, 2]"),
    "no tokens": (train_ner, "a.jsonl", '{"spans": []}', "'tokens': list[str], 'spans': list; got {'spans': []}"),
    "no spans": (train_ner, "a.jsonl", '{"tokens": ["a"]}', "got {'tokens': ['a']}"),
    "empty": (train_ner, "a.jsonl", sentence(tokens=[]), "'tokens' is empty"),
    "text for tokens": (
        train_ner,
        "a.jsonl",
        sentence(tokens="Anna ran"),
        "got {'spans': [[0, 0, 'PER']], 'tokens': 'Anna ran'}",
    ),
    "token no string": (train_ner, "a.jsonl", sentence(tokens=["a", 3]), "'tokens': ['a', 3]}"),
    "span out of range": (train_ner, "a.jsonl", sentence(spans=[[0, 2, "X"]]), "0 <= start <= end < 2"),
    "span reversed": (train_ner, "a.jsonl", sentence(spans=[[1, 0, "X"]]), "got [1, 0, 'X']"),
    "span negative": (train_ner, "a.jsonl", sentence(spans=[[-1, 0, "X"]]), "got [-1, 0, 'X']"),
    "span of two": (train_ner, "a.jsonl", sentence(spans=[[0, 0]]), "< 2, the tokens; got [0, 0]"),
    "span of bool": (
        train_ner,
        "a.jsonl",
        sentence(spans=[[False, 0, "X"]]),
        "takes [start, end, type] with 0 <= start <= end < 2, the tokens; got [",
    ),
    "span of float": (
        train_ner,
        "a.jsonl",
        sentence(spans=[[0.0, 0, "X"]]),
        "takes [start, end, type] with 0 <= start <= end < 2, the tokens; got [",
    ),
    "span without type": (
        train_ner,
        "a.jsonl",
        sentence(spans=[[0, 0, ""]]),
        "takes [start, end, type] with 0 <= start <= end < 2, the tokens; got [",
    ),
    "gzipped": (train_ner, "a.jsonl.gz", sentence(spans=[[0, 2, "X"]]), "0 <= start <= end < 2"),
    "unknown tag": (train_ner, "a.conll", "Anna X-PER", "column 2, the last, takes a tag O, or B-"),
    "tag without type": (train_ner, "a.conll", "Anna B", "got 'B'"),
    "no tag": (train_ner, "a.bio", "Anna", "column 1, the last, takes a tag O, or B-"),
    "no token": (train_ner, "a.bio", "O", "takes a token and its tag; got 'O'"),
    "gzipped columns": (train_ner, "a.bio.gz", "Anna\t?", "got '?'"),
    "text missing": (
        train_multilabel,
        "a.jsonl",
        '{"labels": []}',
        "takes an object of 'text': str, 'labels': list[str]; got {'labels': []}",
    ),
    "text no string": (train_multilabel, "a.jsonl", text(text=["yes"]), "'text': ['yes']}"),
    "label no string": (train_multilabel, "a.jsonl", text(labels=[None]), "got {'labels': [None], 'text': 'yes'}"),
    "labels no list": (train_multilabel, "a.jsonl", text(labels="joy"), "got {'labels': 'joy', 'text': 'yes'}"),
    "not UTF-8": (train_multilabel, "a.jsonl", b"\xff\xfe", "codec can't decode"),
}


@pytest.mark.parametrize("program, name, line, says", MALFORMED.values(), ids=MALFORMED)
def test_errors_name_the_file_and_the_line(
    run: Run, tmp_path: Path, program: Any, name: str, line: str | bytes, says: str
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
def test_errors_name_a_file_that_is_none(run: Run, tmp_path: Path, program: Any) -> None:
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
        (["--learning_rate=fast"], "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        (["--max_steps=1.5"], "argument --max_steps/--max-steps: invalid int value: '1.5'"),
        (["--warmup_steps=-1"], "warmup_steps = -1.0"),
        (["--train=a.jsonl"], "--train and --dev go together"),
        (["--resume_from_checkpoint=absent"], "--resume_from_checkpoint: no checkpoint in absent"),
        (["--colour=red"], "--colour=red"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_name_the_argument(run: Run, program: Any, arguments: list[str], says: str) -> None:
    done = run(program, *arguments)
    assert done.status == 2
    assert says in done.err.splitlines()[-1]


def test_errors_of_a_trained_tagger(run: Run, tmp_path: Path) -> None:
    done = run(train_ner, "--trained=a", "--train=a.jsonl")
    assert done.status == 2 and "--trained and --train exclude each other" in done.err
    done = run(train_ner, "--trained", tmp_path)
    assert (done.status, done.err) == (2, f"train_ner.py: error: --trained: no model in {tmp_path}\n")


@both_programs
def test_help_is_short_and_names_what_the_readme_and_the_program_itself_use(run: Run, program: Any) -> None:
    shown = run(program, "--help")
    assert shown.status == 0
    assert len(shown.out.splitlines()) < 70
    texts = [(EXAMPLES.parent / "README.md").read_text(encoding="utf-8"), program.__doc__]
    commands = [match for text in texts for match in re.findall(rf"{program.__name__}\.py[^;\n]*", text)]
    used = {option for command in commands for option in re.findall(r"--\w+", command)}
    assert "--encoder" in used
    for option in used:
        assert option in shown.out
    everything = run(program, "--help_all")
    assert everything.status == 0
    assert "--warmup_steps" in everything.out
    assert "--warmup_steps" not in shown.out


def test_errors_name_the_choices(run: Run) -> None:
    assert "argument --head: invalid choice: 'crf' (choose from" in run(train_ner, "--head=crf").err
    assert "argument --loss: invalid choice: 'hinge'" in run(train_multilabel, "--loss=hinge").err


@both_programs
def test_errors_name_a_folder_that_cannot_be_written(run: Run, tmp_path: Path, program: Any) -> None:
    (tmp_path / "file").write_text("")
    done = run(program, "--max_steps=1", "--output_dir", tmp_path / "file" / "inner")
    assert done.status == 2
    assert f"error: {tmp_path / 'file'}" in done.err


def test_an_error_is_one_line_to_the_shell(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "train_ner.py"), "--train", "no.jsonl", "--dev", "no.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "train_ner.py: error: no.jsonl: No such file or directory\n"


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [" ", "\t", " NN "])
def test_columns_are_read(tmp_path: Path, separator: str) -> None:
    """Behind comments and document marks; a lone # is a token if it has a tag."""
    lines = [f"w0{separator}O", f"#{separator}B-A", f"w2{separator}I-A", f"w3{separator}S-B"]
    block = "\n".join(lines)
    file = tmp_path / "a.bio.gz"
    file.write_bytes(gzip.compress(f"-DOCSTART- -X- O\n\n# text = w0\n{block}\n\n\n{block}".encode()))
    expected = synthetic.Sentence(["w0", "#", "w2", "w3"], [("A", 1, 2), ("B", 3, 3)])
    assert train_ner.read(file) == [expected] * 2


@pytest.mark.parametrize("separator", [" ", "\t"])
def test_a_comment_that_ends_like_a_tag_is_no_word(tmp_path: Path, separator: str) -> None:
    """It has other columns than the words; a word that starts with # has as many."""
    comments = ["# see annex O", "# newdoc id = O", "# O" if separator == "\t" else "#O"]
    words = [f"#nlp{separator}S-A", f"#{separator}O", f"w{separator}B-A"]
    file = tmp_path / "a.bio"
    for lines in (comments + words, words[:1] + comments + words[1:], [*comments, "", *words, *comments]):
        file.write_text("\n".join(lines))
        assert train_ner.read(file) == [synthetic.Sentence(["#nlp", "#", "w"], [("A", 0, 0), ("A", 2, 2)])]
    file.write_text("\n".join(words[:2]))  # no line tells how many columns a word has
    assert train_ner.read(file) == [synthetic.Sentence(["#nlp", "#"], [("A", 0, 0)])]


def test_json_lines_and_columns_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.bio").write_text("Anna B-PER\nSmith I-PER\nran O\n")
    line = {"tokens": ["Anna", "Smith", "ran"], "spans": [[0, 1, "PER"]]}
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(line).encode()))
    assert train_ner.read(tmp_path / "a.bio") == train_ner.read(tmp_path / "a.jsonl.gz")


def test_the_synthetic_corpus_is_nested_and_its_dev_names_are_new() -> None:
    train, dev = synthetic.entities(0)
    assert synthetic.entities(0) == (train, dev) != synthetic.entities(1)
    frame = {word for s in train for word in s.tokens} & {word for s in dev for word in s.tokens}
    templates = " ".join(template for templates in synthetic.GRAMMAR.values() for template in templates)
    assert frame <= set(templates.split())
    for split in (train, dev):
        assert any(not s.spans for s in split)
        nested = sum(any(a != b and a[1] <= b[1] and b[2] <= a[2] for a in s.spans for b in s.spans) for s in split)
        assert nested > len(split) / 3


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


# Nested, repeated and crossing spans, one token, a sentence without any, and one of three windows.
SENTENCES = [
    synthetic.Sentence(["ab", "cde", "f"], [("X", 0, 2), ("X", 0, 0), ("Y", 0, 2), ("Y", 0, 2), ("X", 1, 2)]),
    synthetic.Sentence(["a"], [("Y", 0, 0)]),
    synthetic.Sentence(["abcdef", "ghi"], []),
    synthetic.Sentence(["ab"] * 15, [("X", 0, 2), ("Y", 6, 7), ("Y", 7, 7), ("X", 14, 14)]),
]


def write_sentences(path: Path, sentences: list[Any]) -> Path:
    lines = [{"tokens": s.tokens, "spans": [[start, end, kind] for kind, start, end in s.spans]} for s in sentences]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def perfect(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tagger that finds in each window just the spans that its labels have."""

    def forward(tagger: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Any:
        return {"loss": sum(p.sum() for p in tagger.parameters()) * 0, "spans": labels}

    monkeypatch.setattr(train_ner.Tagger, "forward", forward)


# Of 10 entities two are one. All lie in a window of 14 pieces, or words; in windows of 4 those of the whole first
# sentence, and of three words of the last, do not.
@pytest.mark.usefixtures("perfect")
@pytest.mark.parametrize("max_length, held", [(16, 9), (6, 6), (None, 9)])
def test_entities_in_windows_of_pieces_are_scored_in_words(
    run: Run, tmp_path: Path, hub_encoder: Path, max_length: int | None, held: int
) -> None:
    file = write_sentences(tmp_path / "a.jsonl", SENTENCES)
    options = ["--train", file, "--dev", file, "--max_steps=1", "--save_strategy=no"]
    done = run(train_ner, *options, *(["--encoder", hub_encoder, "--max_length", max_length] if max_length else []))
    assert done.status == 0, done.err
    result = results_in(tmp_path / "out")
    assert result["eval_precision"] == 1
    assert result["eval_recall"] == pytest.approx(held / 9)
    assert (result["eval_gold/X"], result["eval_gold/Y"]) == (5, 4)
    lost = {9: 0, 6: 4}[held]  # one of them is listed twice
    assert f"4 and 4 sentences; no window holds {lost} of the 10 entities of dev" in done.out


def test_no_window_is_shorter_than_its_special_tokens(run: Run, hub_encoder: Path) -> None:
    done = run(train_ner, "--encoder", hub_encoder, "--max_length=2")
    assert done.status == 2
    assert "error: --max_length takes more than 2, the special tokens of --encoder; got 2\n" in done.err


@both_programs
def test_a_hub_encoder_trains_and_resumes(run: Run, tmp_path: Path, hub_encoder: Path, program: Any) -> None:
    file = write_sentences(tmp_path / "a.jsonl", SENTENCES)
    if program is train_multilabel:
        lines = [{"text": t, "labels": ls} for t, ls in (("ab c", ["X"]), ("", []), ("a" * 40, ["X", "Y"]))]
        file.write_text("\n".join(map(json.dumps, lines)))
    options = ["--train", file, "--dev", file, "--encoder", hub_encoder, "--max_steps=3", "--save_steps=2"]
    done = run(program, *options)
    assert done.status == 0, done.err
    assert torch.tensor(results_in(tmp_path / "out")["eval_loss"]).isfinite()
    assert run(program, *options, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-2").status == 0


@both_programs
def test_errors_name_the_encoder(run: Run, tmp_path: Path, program: Any) -> None:
    done = run(program, "--encoder", tmp_path)
    assert done.status == 2
    assert f"error: --encoder {tmp_path}: " in done.err.splitlines()[-1]


# --- relations -----------------------------------------------------------------------------------------------------


def test_triples_are_joined_again(hub_encoder: Path) -> None:
    """All those of the corpus, in words of one piece and of several, from what a perfect model would find."""
    train, dev = synthetic.relations(0)
    assert synthetic.relations(0) == (train, dev) != synthetic.relations(1)
    assert {kind for sentence in dev for _, kind, _ in sentence.triples} == set(synthetic.PREDICATES)
    whole, _ = common.encoder_of(None, [sentence.tokens for sentence in train])
    letters, _ = common.encoder_of(str(hub_encoder), [])
    for tokenizer, sentences in ((whole, train[:50]), (letters, dev[:50])):
        for sentence in sentences:
            ids, triples = train_relations.in_pieces(tokenizer, sentence)
            batch = fp.spans.collate([train_relations.example(ids, triples)], heads=train_relations.SETS)
            assert train_relations.join(*(batch[name][0].tolist() for name in train_relations.SETS)) == set(triples)
            assert len(triples) == len(sentence.triples)
            for triple, (subject, _, _) in zip(triples, sentence.triples, strict=True):
                text = tokenizer.decode(ids[triple[0][0] : triple[0][1] + 1]).replace(" ##", "").replace("##", "")
                words = " ".join(sentence.tokens[subject[0] : subject[1] + 1])
                assert "[UNK]" in text or text.lower() == words.lower()


def test_a_triple_needs_both_entities_and_both_pairs() -> None:
    rows = {"entities": [[0, 0, 1], [1, 3, 3]], "firsts": [[2, 0, 3]], "lasts": [[2, 1, 3]]}
    padding = [-100, -100, -100]
    found = train_relations.join(*([*listed, padding] for listed in rows.values()))
    assert found == {((0, 1), synthetic.PREDICATES[2], (3, 3))}
    for name, listed in rows.items():
        for i in range(len(listed)):
            fewer = {**rows, name: listed[:i] + listed[i + 1 :]}
            assert train_relations.join(*fewer.values()) == set()
    other = {**rows, "lasts": [[1, 1, 3]]}
    assert train_relations.join(*other.values()) == set()


def test_entities_of_triples_do_not_mix_as_numbers() -> None:
    triples = [((a, a + 1), "founded", (b, b)) for a in range(3) for b in range(3)]
    rows = train_relations.as_spans([triples, triples[:1]])
    assert len(rows.unique(dim=0)) == 10
    assert rows[:, :2].tolist() == [[0, 2]] * 9 + [[1, 2]]


def test_relations_take_no_file(run: Run) -> None:
    done = run(train_relations, "--train=a.jsonl", "--dev=a.jsonl")
    assert done.status == 2
    assert "error: --train: takes no file, as the corpus is made; got a.jsonl\n" in done.err


# --- the classifier ------------------------------------------------------------------------------------------------


def test_labels_are_scored_as_by_hand(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """X is found wherever it is not, and Y is found where it is."""

    def forward(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Any:
        scores = (labels != torch.tensor([1.0, 0.0])).float() - 0.5
        return {"loss": sum(p.sum() for p in model.parameters()) * 0, "scores": scores}

    monkeypatch.setattr(train_multilabel.Classifier, "forward", forward)
    lines = [{"text": "a b", "labels": labels} for labels in (["X"], ["Y"], ["X", "Y"], [])]
    (file := tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert run(train_multilabel, "--train", file, "--dev", file, "--max_steps=1", "--save_strategy=no").status == 0
    result = results_in(tmp_path / "out")
    assert (result["eval_f1/X"], result["eval_f1/Y"]) == (0, 1)
    assert (result["eval_precision"], result["eval_recall"]) == (1 / 2, 1 / 2)
    assert result["eval_macro_f1"] == 1 / 2


def test_an_encoder_does_not_see_padding() -> None:
    _, encoder = synthetic.encoder([["a", "b"]] * 3)
    ids, mask = torch.tensor([[2, 3, 1, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    padded, alone = (encoder.eval()(ids[:, :n], mask[:, :n]).last_hidden_state for n in (5, 3))
    torch.testing.assert_close(padded[:, :3], alone)


def test_classifier_options_change_the_loss_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dropout: smoothing by hand, mixup of a text with itself, and R-Drop of two passes that are one."""
    options = train_multilabel.ClassifierOptions()
    model = train_multilabel.Classifier(synthetic.encoder([["a", "b"]] * 3)[1], 3, options)
    model.dropout.p = 0.0
    labels = torch.tensor([[1.0, 0.0, 0.0]])
    batch = {"input_ids": torch.tensor([[2, 3]]), "attention_mask": torch.tensor([[1, 1]]), "labels": labels}
    scores = model.eval()(**batch)["scores"].detach()
    plain = fp.reference.zlpr_loss(scores, labels).item()
    assert model(**batch)["loss"].item() == pytest.approx(plain, rel=1e-5)
    assert model.train()(**batch)["loss"].item() == pytest.approx(plain, rel=1e-5)
    options.mixup = options.r_drop = 0.5
    assert model(**batch)["loss"].item() == pytest.approx(plain, rel=1e-5)
    options.smoothing = 0.2
    soft = fp.reference.zlpr_loss(scores, torch.tensor([[0.9, 0.1, 0.1]])).item()
    assert model(**batch)["loss"].item() == pytest.approx(soft, rel=1e-5)


def test_r_drop_and_mixup_are_those_of_their_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two texts, mixed by a share of 1/4; and two passes whose scores differ by dropout."""
    options = train_multilabel.ClassifierOptions(mixup=1.0, loss="bce")
    model = train_multilabel.Classifier(synthetic.encoder([["a", "b"]] * 3)[1], 3, options)
    model.dropout.p = 0.0
    labels = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    batch = {"input_ids": torch.tensor([[2, 3], [2, 4]]), "attention_mask": torch.ones(2, 2, dtype=torch.int64)}
    scores = model.eval()(**batch, labels=labels)["scores"].detach()
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self, shape: torch.full(shape, 0.25))
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(n).flip(0))
    mixed = [0.25 * x + 0.75 * x.flip(0) for x in (scores, labels)]  # the linear layer is linear
    expected = train_multilabel.bce_loss(*mixed).item()
    assert model.train()(**batch, labels=labels)["loss"].item() == pytest.approx(expected, rel=1e-5)
    options.mixup, options.r_drop = 0.0, 2.0
    passes = []
    monkeypatch.setattr(model.linear, "forward", lambda x: passes.append(torch.randn(2, 2, 3)) or passes[-1])
    loss = model(**batch, labels=labels)["loss"].item()
    (drawn,) = passes
    halves = [train_multilabel.bce_loss(x, labels).item() for x in drawn]
    divergence = fp.reference.zlpr_kl_div(drawn[0], drawn[1]).item()
    assert loss == pytest.approx(sum(halves) / 2 + 2 / 4 * divergence, rel=1e-5)


# --- very many labels ----------------------------------------------------------------------------------------------

# The end is as in processes.py, and for its reason.
FEW = """
import functools, os, sys
import synthetic, train_many_labels
train_many_labels.read = functools.partial(synthetic.many_labels, labels=601, train=2000, dev=200)
train_many_labels.main()
sys.stdout.flush()
os._exit(0)
"""


def precision_of(arguments: list[str], folder: Path, launcher: tuple[str, ...] = ()) -> list[float]:
    """P@1 and P@5 after so many steps on few labels, by processes of their own."""
    (folder / "few.py").write_text(FEW)
    command = [sys.executable, *launcher, str(folder / "few.py"), "--size=64", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180, env=environment)
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    return [float(part.split()[1]) for part in last.split(", ") if part.startswith("P@")]


@pytest.mark.slow
def test_very_many_labels_are_learned_by_one_process_and_by_two(tmp_path: Path) -> None:
    alone = precision_of(["--steps=100"], tmp_path)
    assert alone[0] > 0.9
    assert alone[1] > 0.4
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert precision_of(["--steps=100"], tmp_path, two)[0] > 0.9
    assert precision_of(["--steps=100", "--in-backward=adafactor"], tmp_path)[0] > 0.9


@pytest.mark.parametrize("classes", [200, 700])
@pytest.mark.parametrize("name", train_many_labels.BLOCKWISE)
def test_steps_in_backward_are_those_of_the_optimizer(name: str, classes: int) -> None:
    """Of one block, which is the whole weight, and of several."""
    torch.manual_seed(0)
    make = train_many_labels.BLOCKWISE[name]
    weight = torch.randn(classes, 16)
    here, there = (weight.clone().requires_grad_() for _ in range(2))
    update = train_many_labels.InBackward(here, make)
    plain = None
    for _ in range(4):
        hidden, positives = torch.randn(256, 16), torch.randint(classes, (256, 3))
        fp.linear_zlpr_loss(hidden.requires_grad_(), here, positives, weight_grad=update).backward()
        if plain is None:
            blocks = [b.detach().requires_grad_() for b in there.split([len(b) for b, _ in update.blocks.values()])]
            assert (len(blocks) > 1) == (classes > 200)
            plain = make(blocks)
        (gradient,) = torch.autograd.grad(fp.linear_zlpr_loss(hidden, there, positives), there)
        for block, part in zip(blocks, gradient.split([len(block) for block in blocks]), strict=True):
            block.grad = part
        plain.step()
        assert here.grad is None
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-6)
    assert (here - weight).abs().max() > 1e-3


def test_codes_come_with_all_above_them() -> None:
    pytest.importorskip("simple_icd_10_cm", reason="the labels are its codes: pip install 'flashpointer[examples]'")
    train, dev, labels = train_many_labels.read(0)
    assert labels > 90_000
    texts = dict(train)
    cholera = texts["Cholera due to Vibrio cholerae 01, biovar cholerae"]
    above = [next(text for text, of in train if of[0] == label) for label in cholera[1:]]
    assert above[0] == "Cholera"
    assert above[1].startswith("Intestinal infectious diseases")
    assert above[2].startswith("Certain infectious and parasitic diseases")
    assert all(0 <= label < labels for _, of in train + dev for label in of)


def test_without_the_codes_labels_are_made_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "simple_icd_10_cm", None)
    train, dev, labels = train_many_labels.read(0)
    assert "simple-icd-10-cm is not installed: the labels are made up" in capsys.readouterr().out
    assert labels == 1 << 17
    assert {labels[0] for _, labels in dev} - {labels[0] for _, labels in train}
    assert train_many_labels.read(1)[0] != train
