"""What the example programs share: files and their errors, options, an encoder, and a run of Transformers' Trainer."""

from __future__ import annotations

import gzip
import json
import reprlib
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

import synthetic
import torch
import transformers
from torch import nn


class InputError(Exception):
    """What the user gave is wrong: printed as one line, without a traceback."""


def exit_status(main: Callable[[], None]) -> int:
    """Runs a program."""
    try:
        main()
    except (InputError, OSError) as error:
        said = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
        print(f"{Path(sys.argv[0]).name}: error: {said.splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(file:line, text) of each line of a file, plain or gzipped."""
    where = str(path)
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                yield where, line.decode("utf-8-sig")
        except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise InputError(f"{where}: {error}") from None


def read_json_lines(path: Path, **kinds: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, object) of each line that is not blank: an object with these keys, of these kinds."""
    takes = ", ".join(f"{key!r}: {kind if get_args(kind) else kind.__name__}" for key, kind in kinds.items())
    for where, line in read_lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON: {error}") from None
        if not (isinstance(record, dict) and all(_is_a(record.get(key), kind) for key, kind in kinds.items())):
            raise InputError(f"{where}: takes an object of {takes}; got {reprlib.repr(record)}")
        yield where, record


def _is_a(value: Any, kind: Any) -> bool:
    outer, inner = get_origin(kind) or kind, get_args(kind)
    return isinstance(value, outer) and all(isinstance(x, inner) for x in value if inner)


@dataclass
class Options:
    """Those that all programs have beside Trainer's."""

    train: Path | None = field(default=None, metadata={"help": "a file to train on; without it, a synthetic corpus"})
    dev: Path | None = field(default=None, metadata={"help": "a file to evaluate on"})
    encoder: str | None = field(default=None, metadata={"help": "an encoder by path or name; without it, a small one"})
    max_length: int = field(default=512, metadata={"help": "pieces that the encoder reads at a time"})
    head_learning_rate: float = field(default=2e-3, metadata={"help": "of all layers but the encoder's"})


def parse(
    kind: type[Options], about: str, rate: float, epochs: float = 3
) -> tuple[Any, transformers.TrainingArguments]:
    """The options of a program, and Trainer's, of which some have other defaults here; rate is that of learning for the
    small encoder."""
    parser = transformers.HfArgumentParser([kind, transformers.TrainingArguments], description=about)
    # What forward does not name is what collate reads. Without a learning rate, it depends on the encoder.
    parser.set_defaults(remove_unused_columns=False, learning_rate=None, warmup_steps=0.1, weight_decay=0.01)
    parser.set_defaults(num_train_epochs=epochs)
    parser.set_defaults(per_device_train_batch_size=16, per_device_eval_batch_size=16, logging_steps=50)
    try:
        options, arguments = parser.parse_args_into_dataclasses()
    except ValueError as error:
        parser.error(str(error))
    if (options.train is None) != (options.dev is None):
        parser.error("--train and --dev go together")
    if (resumed := arguments.resume_from_checkpoint) and not (Path(resumed) / "trainer_state.json").exists():
        parser.error(f"--resume_from_checkpoint: no checkpoint in {resumed}")
    if arguments.learning_rate is None:
        arguments.learning_rate = 5e-5 if options.encoder else rate
    return options, arguments


def encoder_of(name: str | None, texts: Iterable[Sequence[str]]) -> tuple[Any, nn.Module]:
    """An encoder and its fast tokenizer, by path or name; or a small one for these texts."""
    if name is None:
        return synthetic.encoder(texts)
    try:
        # Byte-level tokenizers refuse words without add_prefix_space; others do not heed it.
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, add_prefix_space=True)
        encoder = transformers.AutoModel.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise InputError(f"--encoder {name}: {error}") from None
    if not tokenizer.is_fast:
        raise InputError(f"--encoder {name}: has no fast tokenizer, which alone tells the words of its pieces")
    return tokenizer, encoder


def fit(model: Any, options: Options, arguments: transformers.TrainingArguments, **parts: Any) -> None:
    """Trains a model that holds its encoder as ``model.encoder``, saves it, and prints its evaluation."""
    others = [p for name, p in model.named_parameters() if not name.startswith("encoder.")]
    groups = [{"params": model.encoder.parameters()}, {"params": others, "lr": options.head_learning_rate}]
    optimizer = torch.optim.AdamW(groups, arguments.learning_rate, weight_decay=arguments.weight_decay)
    trainer = transformers.Trainer(model, arguments, optimizers=(optimizer, None), **parts)
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
