"""What the example programs share: files and their errors, options, an encoder, and a run of Transformers' Trainer."""

from __future__ import annotations

import argparse
import dataclasses
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
    """The options that all programs have, beside Trainer's."""

    train: Path | None = field(default=None, metadata={"help": "a file to train on; without it, synthetic data"})
    dev: Path | None = field(default=None, metadata={"help": "a file to evaluate on"})
    encoder: str | None = field(default=None, metadata={"help": "a Hugging Face encoder; without it, a small one"})
    max_length: int = field(default=512, metadata={"help": "longest input of the encoder, in tokens"})
    head_learning_rate: float = field(default=2e-3, metadata={"help": "learning rate of all other layers"})

    def __post_init__(self) -> None:
        if (self.train is None) != (self.dev is None):
            raise ValueError("--train and --dev go together")


# Those of Trainer's options that --help shows.
SHOWN = {
    "output_dir": "a folder for checkpoints, log, scores and the trained model; without it, trainer_output",
    "num_train_epochs": "passes over the training data",
    "max_steps": "training steps; above 0 it takes the place of the epochs",
    "per_device_train_batch_size": "examples per training step and device",
    "learning_rate": "learning rate of the encoder; without it, 5e-5, and {} for the small encoder",
    "bf16": "train under autocast in bfloat16",
    "seed": "seed of weights, order of examples and dropout",
    "use_cpu": "train on the CPU even where there is a GPU",
    "logging_steps": "steps from one line of the log to the next",
    "save_strategy": "when to write a checkpoint",
    "resume_from_checkpoint": "the folder of the checkpoint to continue from",
}


def parse(
    kind: type[Options], about: str, rate: float, epochs: float = 3
) -> tuple[Any, transformers.TrainingArguments]:
    """The options of a program, and Trainer's. Some of Trainer's have other defaults here.

    Args:
        kind: the program's own options.
        about: what the program does, for ``--help``.
        rate: the default learning rate with the small encoder.
        epochs: the default number of epochs.
    """
    parser = transformers.HfArgumentParser([kind, transformers.TrainingArguments], description=about)
    parser.add_argument("--help_all", action="help", help="show the other options of Trainer too, and exit")
    # What forward does not name is what collate reads. Without a learning rate, it depends on the encoder.
    parser.set_defaults(remove_unused_columns=False, learning_rate=None, warmup_steps=0.1, weight_decay=0.01)
    parser.set_defaults(num_train_epochs=epochs)
    parser.set_defaults(per_device_train_batch_size=16, per_device_eval_batch_size=16, logging_steps=50)
    if "--help_all" not in sys.argv:
        own = {option.name for option in dataclasses.fields(kind)} | {"help", argparse.SUPPRESS}
        for action in parser._actions:
            if action.dest not in own:
                action.help = SHOWN.get(action.dest, argparse.SUPPRESS).replace("{}", f"{rate:g}")
    try:
        options, arguments = parser.parse_args_into_dataclasses()
    except ValueError as error:
        parser.error(str(error))
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
    score(trainer)


def score(trainer: transformers.Trainer) -> None:
    """Prints and saves the evaluation."""
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
