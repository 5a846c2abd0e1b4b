"""Span heads on the encoders of Transformers: Trainer trains and evaluates the model, ``predict`` goes from texts to
entities. ::

    model = SpanModel.from_encoder("bert-base-cased", ["PER", "LOC"])
    train = model.examples(texts, entities, tokenizer)
    Trainer(model, arguments, train_dataset=train, data_collator=model.collator()).train()
    model.predict(["Anna lives in Berlin."], tokenizer)
    # [[{"text": "Anna", "label": "PER", "start": 0, "end": 4, "score": 3.2}, ...]]

Long texts are read in overlapping windows of tokens, the same ones in ``examples`` and in ``predict``.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import nn, spans
from .ops import _checks
from .ops.pointer_decode import choose
from .spans import _read
from .spans.offsets import read_texts

try:
    from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
    from transformers.utils import ModelOutput, logging
except ModuleNotFoundError as error:
    raise ImportError("flashpointer.hf takes transformers: pip install 'flashpointer[transformers]'") from error

HEADS = ("EfficientGlobalPointer", "GlobalPointer")
CHOICES = ("non_overlapping", "non_crossing", "one_label")
"""The options of decoding that compare spans with each other."""
LONGEST = 512
"""Tokens of a window, unless the encoder takes fewer. What is nearer tells more of an entity, and costs less."""


class SpanConfig(PretrainedConfig):
    """What a ``SpanModel`` is made of.

    Args:
        encoder: the config of its encoder, one that ``AutoModel`` knows.
        types: the types of entities, in the order of their heads; as ``id2label`` they are saved.
        head: "EfficientGlobalPointer" or "GlobalPointer" of ``flashpointer.nn``.
        head_options: its arguments behind ``heads``: ``{"head_size": 64, "rope": False, ...}``.
        decoding: what ``decode`` takes: ``{"threshold": 0.5, "non_overlapping": True, ...}``. A model that was not
            trained finds half of all cells; ``max_spans`` bounds them, and ``top_k`` those of each type.

    Raises:
        TypeError, ValueError: for types that are no list of strs, or not unique, or a head of another name.
    """

    model_type = "flashpointer"
    sub_configs = {"encoder": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        encoder: PretrainedConfig | Mapping[str, Any] | None = None,
        types: Sequence[str] | None = None,
        head: str = HEADS[0],
        head_options: Mapping[str, Any] | None = None,
        decoding: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if types is not None:
            takes = "a list of strs, each once"
            listed = _read.each("SpanConfig", "types", types, takes)
            if not all(isinstance(kind, str) for kind in listed) or len(set(listed)) < len(listed):
                raise ValueError(f"SpanConfig: types takes {takes}; got {_checks.short(listed)}")
            label2id = {kind: head for head, kind in enumerate(listed)}
            options |= {"label2id": label2id, "id2label": dict(enumerate(listed))}
        _read.choice("SpanConfig", "head", head, HEADS)
        self.encoder = AutoConfig.for_model(**encoder) if isinstance(encoder, Mapping) else encoder
        attention = getattr(self.encoder, "_attn_implementation_internal", None)  # which would be reset
        options = {"attn_implementation": attention, **options}
        self.head, self.head_options, self.decoding = head, dict(head_options or {}), dict(decoding or {})
        super().__init__(**options)


@dataclass
class SpanOutput(ModelOutput):
    """What a ``SpanModel`` returns."""

    loss: torch.Tensor | None = None
    """With labels: the ZLPR loss, the mean over sentences and types."""
    spans: torch.Tensor | None = None
    """In eval mode what was found, int64 ``[B, P, 3]``: rows (head, start, end) in tokens, then rows of -100."""
    scores: torch.Tensor | None = None
    """In eval mode ``[B, P]``: the score of each, -100 behind."""


class SpanModel(PreTrainedModel):
    """An encoder with a span head: see ``SpanConfig`` for what it is made of, ``from_encoder`` to start from a
    pretrained one. It is saved, loaded, put on devices and into dtypes as any other model of Transformers.

    Attributes:
        encoder: the model of ``AutoModel``.
        head: the head of ``flashpointer.nn``: what PEFT takes in ``modules_to_save=["head"]``.

    Raises:
        ValueError: for a config without an encoder.
    """

    config_class = SpanConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    # A pooler has no part in anything, and the encoder of another task has none to save.
    _keys_to_ignore_on_load_missing = [r"encoder\.pooler\."]  # noqa: RUF012
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, config: SpanConfig, encoder: PreTrainedModel | None = None) -> None:
        if config.encoder is None:
            raise ValueError(
                "SpanModel: config takes one with an encoder, the config of a model; got None. "
                "Of a pretrained encoder SpanModel.from_encoder makes a SpanModel"
            )
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder) if encoder is None else encoder
        pooler = getattr(self.encoder, "pooler", None)
        if isinstance(pooler, torch.nn.Module):  # no part of the loss: DDP would wait for its gradient
            pooler.requires_grad_(False)
        self.head = getattr(nn, config.head)(config.encoder.hidden_size, config.num_labels, **config.head_options)
        self.post_init()

    @classmethod
    def from_encoder(
        cls,
        encoder: str | os.PathLike[str] | PreTrainedModel,
        types: Sequence[str],
        *,
        head: str = HEADS[0],
        head_options: Mapping[str, Any] | None = None,
        decoding: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> SpanModel:
        """A pretrained encoder with a head that knows nothing yet.

        Args:
            encoder: its name or folder, as ``AutoModel.from_pretrained`` takes it; options go there too. Or a model of
                Transformers, with or without a head of its own, whose encoder this becomes: it is not copied, and its
                pooler, which has no part in the loss, is frozen.
            types, head, head_options, decoding: as for ``SpanConfig``.

        Raises:
            TypeError, ValueError: for an encoder that is neither; for a model that ``AutoModel`` would not make of its
                config, and so not load; for options beside a model; and as of ``SpanConfig``.
        """
        if isinstance(encoder, PreTrainedModel):
            if options:
                raise TypeError(f"from_encoder: a model as encoder takes no options; got {', '.join(options)}")
            encoder = encoder.base_model
            kind, known = type(encoder.config), MODEL_MAPPING.get(type(encoder.config), ())
            if type(encoder) not in (known if isinstance(known, tuple) else (known,)):
                takes = f"of a {kind.__name__} what AutoModel makes of it, or else it could not be loaded"
                raise TypeError(f"from_encoder: encoder takes {takes}; got {type(encoder).__name__}")
        elif isinstance(encoder, (str, os.PathLike)):
            encoder = AutoModel.from_pretrained(encoder, **options)
        else:
            takes = "the name or the folder of a pretrained encoder, or a model of Transformers"
            raise TypeError(f"from_encoder: encoder takes {takes}; got {_checks.describe(encoder)}")
        model = cls(SpanConfig(encoder.config, types, head, head_options, decoding), encoder)
        model.head.to(encoder.device, encoder.dtype)
        return model

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        special_tokens_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> SpanOutput:
        """The loss, in eval mode also what was found.

        Args:
            input_ids, token_type_ids, position_ids, inputs_embeds: those that the encoder takes.
            attention_mask: ``[B, N]``, 0 for padding; 1 throughout by default.
            labels: the true spans, int64 ``[B, P, 3]``, rows (head, start, end), padded with -100. Or ``[S, 4]``.
            special_tokens_mask: ``[B, N]``, 1 for special tokens, where no entity starts or ends; 0 by default.

        Raises:
            TypeError, ValueError: for an argument of wrong type, shape, device or value.
        """
        hidden, mask = self._hidden(
            attention_mask, special_tokens_mask, input_ids=input_ids, token_type_ids=token_type_ids,
            position_ids=position_ids, inputs_embeds=inputs_embeds,
        )  # fmt: skip
        loss = None if labels is None else self.head.loss(hidden, labels, mask)
        if self.training:
            return SpanOutput(loss=loss)
        found, scores = self.head.decode(hidden, mask, padded=True, **self.config.decoding)
        return SpanOutput(loss=loss, spans=found, scores=scores)

    def collator(self) -> Callable[[Iterable[Mapping[str, Any]]], dict[str, Any]]:
        """``data_collator`` of Trainer, and ``collate_fn`` of a ``DataLoader``, for what ``examples`` gives."""
        heads = {"labels": spans.SpanSet(self.config.label2id)}
        padding = getattr(self.config.encoder, "pad_token_id", None) or 0
        return functools.partial(spans.collate, heads=heads, pad_token_id=padding)

    def examples(
        self,
        texts: Iterable[str],
        entities: Iterable[Iterable[Sequence[Any] | Mapping[str, Any]]],
        tokenizer: Any,
        *,
        max_length: int | None = None,
        stride: int | None = None,
    ) -> list[dict[str, Any]]:
        """What to train or evaluate on: of each window of each text the tokens, and in ``labels`` the entities that it
        holds whole. A warning says if no window holds one.

        Args:
            texts, tokenizer, max_length, stride: as for ``predict``.
            entities: for each text its entities (type, start, end) in characters, end exclusive, or ``{"label",
                "start", "end"}``.

        Returns:
            ``input_ids``, ``attention_mask``, ``special_tokens_mask``, perhaps ``token_type_ids``, and ``labels``, a
            list of ``{"label", "start", "end"}`` in tokens, end inclusive: for Trainer, or ``Dataset.from_list``.

        Raises:
            TypeError, ValueError: as of ``predict`` and ``flashpointer.spans.from_offsets``.
        """
        texts, encoding = self._encode("examples", texts, tokenizer, max_length, stride)
        entities = _read.each("examples", "entities", entities, "for each text a list of (type, start, end)")
        if len(entities) != len(texts):
            raise ValueError(f"examples: entities takes a list for each of {len(texts)} texts; got {len(entities)}")
        found, lost, _ = spans.from_offsets(entities, encoding, self.config.label2id, texts=texts)
        if lost:
            warnings.warn(
                f"examples: {len(lost)} entities, the first (text, type, start, end) {_checks.short(lost[0])}, lie "
                "whole in no window, or hold no token; a larger stride, the tokens that windows share, may save them",
                stacklevel=2,
            )
        rows = _rows(encoding)
        for row in rows:
            row["labels"] = []
        for row, head, start, end in found.tolist():
            rows[row]["labels"].append({"label": self.config.id2label[head], "start": start, "end": end})
        return rows

    @torch.no_grad()
    def predict(
        self,
        texts: Iterable[str],
        tokenizer: Any,
        *,
        batch_size: int = 16,
        max_length: int | None = None,
        stride: int | None = None,
    ) -> list[list[dict[str, Any]]]:
        """The entities of texts of any length, in batches of windows of about the same length, the longest first. The
        progress bar is that of Transformers, as ``transformers.utils.logging`` shows or hides it.

        Args:
            texts: as the tokenizer takes them.
            tokenizer: a fast one, which knows the characters of its tokens.
            batch_size: windows of a batch.
            max_length: tokens of a window, special ones included; by default 512, or fewer if the encoder or the
                tokenizer says so.
            stride: tokens that neighbouring windows of a text share; by default a quarter of a window. Twice the tokens
                of the longest entity is enough: ``flashpointer.spans.to_entities`` says why.

        Returns:
            For each text its entities in order: ``text``, ``label``, ``start`` and ``end``, exclusive, in characters,
            and ``score``, whose probability is roughly ``sigmoid(2 * score)``. ``decoding`` of the config chose them:
            what compares spans with each other, those of a whole text; all else, those of a window.

        Raises:
            TypeError, ValueError: for an argument of wrong type or value.
        """
        texts, encoding = self._encode("predict", texts, tokenizer, max_length, stride)
        if not _checks.is_int(batch_size, 1):
            raise ValueError(f"predict: batch_size takes an int of at least 1; got {_checks.describe(batch_size)}")
        rows, collate = _rows(encoding), self.collator()
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]["input_ids"]))
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        heads, choices = self.config.label2id, {name: x for name, x in self.config.decoding.items() if name in CHOICES}
        decoding = {name: x for name, x in self.config.decoding.items() if name not in CHOICES}
        found, scores = [torch.zeros(0, 4, dtype=torch.int64, device="cpu")], [torch.zeros(0, device="cpu")]
        training = self.training
        self.eval()
        try:
            for batch in logging.tqdm(batches):
                inputs = {name: x.to(self.device) for name, x in collate([rows[row] for row in batch]).items()}
                here, of = (x.cpu() for x in self.head.decode(*self._hidden(**inputs), **decoding))
                here[:, 0] = torch.tensor(batch, device="cpu")[here[:, 0]]
                found.append(here)
                scores.append(of.float())
        finally:
            self.train(training)
        entities = spans.to_entities(torch.cat(found), encoding, heads, scores=torch.cat(scores), texts=texts)
        return _chosen(entities, heads, choices) if any(choices.values()) else entities

    def _hidden(
        self, attention_mask: torch.Tensor | None, special_tokens_mask: torch.Tensor | None, **inputs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the encoder gives ``[B, N, D]``, and the mask of the tokens of text ``[B, N]``."""
        given = {"attention_mask": attention_mask, **inputs}
        hidden = self.encoder(**{name: value for name, value in given.items() if value is not None})[0]
        if special_tokens_mask is None:
            return hidden, attention_mask
        if attention_mask is None:
            return hidden, special_tokens_mask == 0
        return hidden, attention_mask.masked_fill(special_tokens_mask != 0, 0)  # the head refuses what is not 0 or 1

    def _init_weights(self, module: torch.nn.Module) -> None:
        if isinstance(module, torch.nn.Linear):  # of the head, as the encoder looks after its own
            module.reset_parameters()

    def _encode(
        self, op: str, texts: Any, tokenizer: Any, max_length: int | None, stride: int | None
    ) -> tuple[list[str], Any]:
        """The texts, checked, and all their windows as the tokenizer gives them."""
        listed = _read.each(op, "texts", texts, "a list of strs")
        listed = read_texts(op, listed, len(listed))
        if not getattr(tokenizer, "is_fast", False):
            raise TypeError(
                f"{op}: tokenizer takes a fast tokenizer of Transformers; got {_checks.describe(tokenizer)}"
            )
        special = tokenizer.num_special_tokens_to_add()
        if max_length is None:
            positions = getattr(self.config.encoder, "max_position_embeddings", None) or LONGEST
            max_length = min(LONGEST, tokenizer.model_max_length, positions)
        if not _checks.is_int(max_length, special + 1):
            takes = f"an int above the {special} special tokens of a window, or None"
            raise ValueError(f"{op}: max_length takes {takes}; got {_checks.describe(max_length)}")
        room = max_length - special
        if stride is None:
            stride = room // 4
        if not _checks.is_int(stride, 0) or stride >= room:
            takes = f"an int from 0 to {room - 1}, less than the tokens of a window, or None"
            raise ValueError(f"{op}: stride takes {takes}; got {_checks.describe(stride)}")
        if not listed:  # of which a tokenizer makes an error
            return [], {"input_ids": [], "offset_mapping": []}
        encoding = tokenizer(
            listed, truncation=True, max_length=max_length, stride=stride, return_overflowing_tokens=True,
            return_offsets_mapping=True, return_special_tokens_mask=True,
        )  # fmt: skip
        return listed, encoding


def _rows(encoding: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each window what ``forward`` takes."""
    names = ("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask")
    columns = {name: encoding[name] for name in names if name in encoding}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _chosen(
    entities: list[list[dict[str, Any]]], heads: Mapping[str, int], choices: Mapping[str, bool]
) -> list[list[dict[str, Any]]]:
    """Those of each text that the choices keep."""

    def cell(i: int, entity: dict[str, Any]) -> tuple[int, int, int, int]:
        return i, heads[entity["label"]], entity["start"], entity["end"] - 1

    cells = [cell(i, x) for i, here in enumerate(entities) for x in here]
    scores = torch.tensor([x["score"] for here in entities for x in here], device="cpu")
    best, _ = choose(torch.tensor(cells, dtype=torch.int64, device="cpu").view(-1, 4), scores, **choices)
    kept = set(map(tuple, best.tolist()))
    return [[x for x in here if cell(i, x) in kept] for i, here in enumerate(entities)]


AutoConfig.register(SpanConfig.model_type, SpanConfig)
AutoModel.register(SpanConfig, SpanModel)
