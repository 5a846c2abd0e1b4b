"""What both example programs share: input, options, encoders, metrics, the training loop and its checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import json
import math
import os
import reprlib
import shutil
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import load_model, save_model
from torch import nn

Batch = dict[str, torch.Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Options that may differ between a run and its continuation: they change no weight.
FREE = {"resume", "out", "log", "save_every", "eval_every"}

console = Console()


class InputError(Exception):
    """What the user gave is wrong: printed as one line, without a traceback."""


def exit_status(main: Callable[[], None]) -> int:
    """Runs a program."""
    try:
        main()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; with --out, --resume continues from the last checkpoint", file=sys.stderr)
        return 130
    return 0


# --- input ---------------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(file:line, text) of each line of a file, plain or gzipped."""
    where = str(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                yield where, line.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{where}: {getattr(error, 'strerror', None) or error}") from None


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, object) of each line that is not blank."""
    for where, line in read_lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON: {error}") from None
        if not isinstance(record, dict):
            raise InputError(f"{where}: takes a JSON object; got {reprlib.repr(record)}")
        yield where, record


def value_of(where: str, record: dict[str, Any], key: str, kind: type) -> Any:
    if key not in record:
        raise InputError(f"{where}: no key {key!r}; got {list(record)}")
    if not isinstance(record[key], kind):
        raise InputError(f"{where}: {key!r} takes a {kind.__name__}; got {reprlib.repr(record[key])}")
    return record[key]


def strings_of(where: str, record: dict[str, Any], key: str) -> list[str]:
    strings: list[str] = value_of(where, record, key, list)
    for i, string in enumerate(strings):
        if not isinstance(string, str):
            raise InputError(f"{where}: {key!r} takes strings; got {reprlib.repr(string)} at {i}")
    return strings


# --- options -------------------------------------------------------------------------------------------------------


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: a number from low to high."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        bound = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
        raise argparse.ArgumentTypeError(f"takes {kind.__name__} {bound}; got {text!r}")

    return parse


def existing_device(name: str) -> torch.device:
    """An argparse type: a device that is there."""
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None
    return found


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def options_parser(description: str, line: str) -> argparse.ArgumentParser:
    """The options of both programs; ``line`` says what a line of input is."""
    positive, rate = number(int, 1), number(float, 0, 1)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--train", type=Path, metavar="FILE", help=f"{line}; without it, a synthetic corpus")
    add("--dev", type=Path, metavar="FILE", help="likewise, to evaluate on")
    add("--encoder", metavar="NAME", help="a Hugging Face encoder, by path or name; without it, a small plain one")
    add("--epochs", type=positive, default=3, help="over the training data")
    add("--steps", type=positive, help="instead of --epochs")
    add("--batch-size", type=positive, default=16, help="examples a step")
    add("--lr", type=rate, help="of the encoder, default 5e-5; of the plain one 2e-3")
    add("--head-lr", type=rate, default=2e-3, help="of all other layers")
    add("--warmup", type=rate, default=0.1, help="share of the steps in which the learning rate rises, then to fall")
    add("--weight-decay", type=rate, default=0.01, help="of AdamW")
    add("--clip", type=number(float, 0), default=1.0, help="largest norm of the gradient")
    add("--precision", choices=DTYPES, default="fp32", help="autocast; fp16 on a GPU only")
    add("--device", type=existing_device, default=default_device(), help="where to train")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of weights, order, dropout and synthetic corpus")
    add("--out", type=Path, metavar="DIR", help="folder for checkpoints")
    add("--save-every", type=positive, metavar="STEPS", help="checkpoint so often, and at the end")
    add("--resume", action="store_true", help="continue from the checkpoint in --out, with the same options")
    add("--log", type=Path, metavar="FILE", help="a JSON line for each step: step, loss, seconds")
    add("--eval-every", type=positive, metavar="STEPS", help="evaluate so often, and at the end")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, checked against each other."""
    options = parser.parse_args()
    if (options.train is None) != (options.dev is None):
        parser.error("--train and --dev go together")
    if options.resume and not options.out:
        parser.error("--resume needs --out")
    if options.precision == "fp16" and options.device.type != "cuda":
        parser.error(f"argument --precision: fp16 needs a CUDA device; got {options.device}")
    if options.lr is None:
        options.lr = 5e-5 if options.encoder else 2e-3
    return options


def make_repeatable(options: argparse.Namespace) -> None:
    """Same seed, same weights, bit for bit: on a GPU that takes deterministic kernels as well."""
    torch.manual_seed(options.seed)
    if options.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False


# --- encoders ------------------------------------------------------------------------------------------------------


class Pieces(NamedTuple):
    """A sentence as an encoder reads it."""

    ids: list[int]
    words: list[int]
    """Of each piece the index of its word, -1 for special tokens."""


class PlainEncoder(nn.Module):
    """Word embeddings and a few residual convolutions: learns in seconds, and needs no download.

    Words that the training data has fewer than three times are all one unknown word, known by its neighbours alone.
    """

    padding, unknown = 0, 1

    def __init__(self, sentences: Iterable[Sequence[str]], width: int = 128, layers: int = 3, kernel: int = 5) -> None:
        super().__init__()
        counts = Counter(word for sentence in sentences for word in sentence)
        self.vocabulary = {word: 2 + i for i, word in enumerate(sorted(w for w, n in counts.items() if n >= 3))}
        self.width = width
        self.embedding = nn.Embedding(2 + len(self.vocabulary), width, padding_idx=self.padding)
        self.convolutions = nn.ModuleList(nn.Conv1d(width, width, kernel, padding="same") for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.dropout = nn.Dropout(0.1)

    def pieces(self, sentences: Sequence[Sequence[str]], max_length: int) -> list[Pieces]:
        """One piece a word, at most max_length of them."""
        cut = [sentence[:max_length] for sentence in sentences]
        return [Pieces([self.vocabulary.get(w, self.unknown) for w in s], list(range(len(s)))) for s in cut]

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.dropout(self.embedding(ids))
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            # What stands in the padding must not reach the words beside it.
            seen = (hidden * mask.unsqueeze(2)).transpose(1, 2)
            hidden = norm(hidden + self.dropout(nn.functional.gelu(convolution(seen).transpose(1, 2))))
        return hidden


class HubEncoder(nn.Module):
    """An encoder and its tokenizer by path or name, as ``transformers`` finds them.

    What is longer than the positions that the encoder has is read in windows, of which none sees the others.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError:
            raise InputError("--encoder needs transformers: pip install 'flashpointer[examples]'") from None
        try:
            # Byte-level tokenizers refuse words without add_prefix_space; others do not heed it.
            self.tokenizer = AutoTokenizer.from_pretrained(name, add_prefix_space=True)
            self.model = AutoModel.from_pretrained(name).float()
        except (OSError, ValueError) as error:
            raise InputError(f"--encoder {name}: {str(error).splitlines()[0]}") from None
        if not self.tokenizer.is_fast:
            raise InputError(f"--encoder {name}: has no fast tokenizer, which alone tells the words of its pieces")
        self.width = self.model.config.hidden_size
        self.padding = self.tokenizer.pad_token_id or 0
        positions = getattr(self.model.config, "max_position_embeddings", None)
        self.window = min(self.tokenizer.model_max_length, positions or math.inf)

    def pieces(self, sentences: Sequence[Sequence[str]], max_length: int) -> list[Pieces]:
        """Each word in pieces, with special tokens, at most max_length of them.

        A word that the tokenizer drops, such as a lone control character, becomes its unknown token: every word that
        is not cut off has a piece, so every span has its pieces too.
        """
        special = self.tokenizer.num_special_tokens_to_add()
        if max_length <= special:
            raise InputError(
                f"--max-length takes more than the {special} special tokens of --encoder; got {max_length}"
            )
        tokenize = functools.partial(self.tokenizer, is_split_into_words=True, verbose=False)
        whole = tokenize([list(sentence) for sentence in sentences])
        unknown, mended = self.tokenizer.unk_token or "?", []
        for i, sentence in enumerate(sentences):
            seen = set(whole.word_ids(i))
            mended.append([word if j in seen else unknown for j, word in enumerate(sentence)])
        encoded = tokenize(mended, truncation=True, max_length=max_length)
        words = [[-1 if word is None else word for word in encoded.word_ids(i)] for i in range(len(mended))]
        return [Pieces(*pair) for pair in zip(encoded.input_ids, words, strict=True)]

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length = ids.shape
        windows = math.ceil(length / self.window)
        if windows > 1:
            size = math.ceil(length / windows)
            ids, mask = (
                nn.functional.pad(x, (0, windows * size - length)).view(batch * windows, size) for x in (ids, mask)
            )
            mask = torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], 1)  # attention over nothing is NaN
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden.view(batch, -1, self.width)[:, :length]


Encoder = PlainEncoder | HubEncoder


def build_encoder(name: str | None, sentences: Iterable[Sequence[str]]) -> Encoder:
    return HubEncoder(name) if name else PlainEncoder(sentences)


# --- metrics -------------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    precision: float
    recall: float
    f1: float


class Tally:
    """Counts of gold, predicted and right items by type, the first entry of an item."""

    def __init__(self, types: Sequence[str]) -> None:
        self.types = types
        self.gold: Counter[str] = Counter()
        self.predicted: Counter[str] = Counter()
        self.right: Counter[str] = Counter()

    def add(self, gold: Collection[tuple[Any, ...]], predicted: Collection[tuple[Any, ...]]) -> None:
        """Those of one example. An item that is listed twice counts once."""
        gold, predicted = set(gold), set(predicted)
        for counter, items in ((self.gold, gold), (self.predicted, predicted), (self.right, gold & predicted)):
            counter.update(item[0] for item in items)

    def score(self, types: Iterable[str]) -> Score:
        """Of these types together; 0 for 0 / 0."""
        gold, predicted, right = (sum(counter[t] for t in types) for counter in (self.gold, self.predicted, self.right))
        return Score(right / max(1, predicted), right / max(1, gold), 2 * right / max(1, predicted + gold))

    @property
    def micro(self) -> Score:
        return self.score(self.types)

    @property
    def macro_f1(self) -> float:
        """The mean over types, those without any item among them."""
        return sum(self.score([t]).f1 for t in self.types) / max(1, len(self.types))

    def table(self, title: str) -> Table:
        table = Table("type", *Score._fields, "gold", title=title, title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        rows = [(t, self.score([t]), self.gold[t]) for t in self.types]
        for name, score, gold in [*rows, ("micro", self.micro, sum(self.gold.values()))]:
            table.add_row(escape(name), *(f"{x:.4f}" for x in score), str(gold), end_section=name == self.types[-1])
        table.add_row("macro", "", "", f"{self.macro_f1:.4f}", "")
        return table


# --- training ------------------------------------------------------------------------------------------------------


def indices_of(step: int, examples: int, batch_size: int, seed: int) -> list[int]:
    """The examples of a step: a function of seed and step, so that a continued run needs no state to go on."""
    epoch, position = divmod(step, math.ceil(examples / batch_size))
    return _order(examples, seed, epoch)[position * batch_size :][:batch_size]


@functools.lru_cache(1)
def _order(examples: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = np.random.default_rng([seed, epoch]).permutation(examples).tolist()
    return order


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """The share of the full rate: a linear rise, then a linear fall."""
    rise = max(1, round(steps * warmup))
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def autocast(options: argparse.Namespace) -> torch.autocast:
    enabled = options.precision != "fp32"
    return torch.autocast(options.device.type, DTYPES[options.precision] if enabled else None, enabled=enabled)


class Trainer:
    """AdamW on the loss that ``model(batch)`` gives, and all that must be kept to go on later as if never stopped.

    Args:
        model: holds its encoder as ``model.encoder``.
        options: as ``parse`` gives them.
        about: what a checkpoint says of its model beside the options: types, vocabulary, size of the data.
    """

    def __init__(self, model: nn.Module, options: argparse.Namespace, about: dict[str, Any]) -> None:
        self.model, self.options = model.to(options.device), options
        self.steps = options.steps or options.epochs * math.ceil(about["examples"] / options.batch_size)
        encoder = set(model.encoder.parameters())
        groups = [
            {"params": [p for p in model.parameters() if p in encoder], "lr": options.lr},
            {"params": [p for p in model.parameters() if p not in encoder], "lr": options.head_lr},
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
        rate = functools.partial(learning_rate, steps=self.steps, warmup=options.warmup)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        self.scaler = torch.amp.GradScaler(options.device.type, enabled=options.precision == "fp16")
        self.config = {
            "options": {name: json_value(value) for name, value in vars(options).items() if name not in FREE},
            **about,
        }
        self.step = 0
        if options.resume:
            self._resume()
        elif options.out and (found := checkpoints(options.out)):
            raise InputError(f"--out: {found[-1]} is there already; --resume continues it")

    def fit(
        self, examples: Sequence[Any], collate: Callable[[list[Any]], Batch], evaluate: Callable[[], Tally]
    ) -> Tally:
        """Trains to the last step, and gives the evaluation after it."""
        options, seconds = self.options, 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress, self._log() as log:
            task = progress.add_task("training", total=self.steps, completed=self.step)
            self.model.train()
            first = self.step
            while self.step < self.steps:
                began = time.perf_counter()
                indices = indices_of(self.step, len(examples), options.batch_size, options.seed)
                loss = self._train_on(collate([examples[i] for i in indices]))
                took = time.perf_counter() - began
                seconds += took
                self.step += 1
                log({"step": self.step, "loss": loss, "seconds": took})
                progress.update(task, advance=1, description=f"loss {loss:.4f}")
                last = self.step == self.steps
                if options.out and (last or (options.save_every and self.step % options.save_every == 0)):
                    self.save()
                if not last and options.eval_every and self.step % options.eval_every == 0:
                    micro = self._evaluate(evaluate, log).micro
                    progress.console.print(f"step {self.step}: dev micro F1 {micro.f1:.4f}")
            progress.update(task, description="evaluating")
            tally = self._evaluate(evaluate, log)
        if taken := self.step - first:
            console.print(f"{taken} steps in {seconds:.1f} s, {1000 * seconds / taken:.1f} ms each")
        return tally

    def _train_on(self, batch: Batch) -> float:
        with autocast(self.options):
            loss = self.model(to_device(batch, self.options.device))
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad()
        value = loss.item()
        if not math.isfinite(value):
            raise InputError(f"step {self.step + 1}: the loss is {value}; a smaller --lr or --head-lr may help")
        return value

    @torch.no_grad()
    def _evaluate(self, evaluate: Callable[[], Tally], log: Callable[[dict[str, Any]], None]) -> Tally:
        self.model.eval()
        with autocast(self.options):
            tally = evaluate()
        self.model.train()
        log({"step": self.step, "dev": {**tally.micro._asdict(), "macro_f1": tally.macro_f1}})
        return tally

    @contextlib.contextmanager
    def _log(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Writes a line to the log. Lines of steps that an interrupted run took after its checkpoint are taken out."""
        path = self.options.log
        if not path:
            yield lambda record: None
            return
        kept = []
        if self.options.resume and path.exists():
            kept = [line for where, line in read_lines(path) if _logged_step(where, line) <= self.step]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise InputError(f"--log: {error.filename}: {error.strerror}") from None
        with file:
            file.writelines(kept)
            yield lambda record: print(json.dumps(record), file=file, flush=True)

    def save(self) -> None:
        """A checkpoint, which is there as a whole or not at all, and then is the only one."""
        state = {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generator": torch.get_rng_state(),
            "cuda_generator": torch.cuda.get_rng_state() if self.options.device.type == "cuda" else None,
        }
        folder = self.options.out
        target, partial = folder / f"checkpoint-{self.step}", folder / "partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_model(self.model, str(partial / "model.safetensors"))
            torch.save(state, partial / "state.pt")
            (partial / "config.json").write_text(json.dumps(self.config, indent=1, ensure_ascii=False), "utf-8")
            partial.rename(target)
        except OSError as error:
            raise InputError(f"--out: {error.filename or folder}: {error.strerror or error}") from None
        for old in checkpoints(folder)[:-1]:
            shutil.rmtree(old)

    def _resume(self) -> None:
        found = checkpoints(self.options.out)
        if not found:
            raise InputError(f"--resume: no checkpoint in {self.options.out}")
        folder, device = found[-1], self.options.device
        try:
            config = json.loads((folder / "config.json").read_text("utf-8"))
            was, now = config.pop("options"), dict(self.config)
            for name, value in now.pop("options").items():
                if was.get(name) != value:
                    option = f"--{name.replace('_', '-')}"
                    raise InputError(f"--resume: {folder} was made with {option} {was.get(name)}; got {value}")
            if config != now:
                raise InputError(f"--resume: {folder} was made from other data: its types, words or number differ")
            load_model(self.model, folder / "model.safetensors", device=str(device))
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.scaler.load_state_dict(state["scaler"])
            torch.set_rng_state(state["generator"])
            if device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_generator"])
            self.step = state["step"]
        except InputError:
            raise
        except Exception as error:  # whatever the readers of three file formats make of a damaged file
            raise InputError(f"--resume: {folder} cannot be read: {error}") from None


def checkpoints(folder: Path) -> list[Path]:
    """Those in a folder, the latest last. There are two where a run was killed between writing one and removing one."""
    found = {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()}
    return [found[step] for step in sorted(found)]


def json_value(value: Any) -> Any:
    """An option as JSON keeps it."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _logged_step(where: str, line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{where}: not a line of --log") from None
