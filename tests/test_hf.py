"""The model for Transformers: trained and evaluated by Trainer, saved, loaded, checkpointed, adapted, over windows."""

from __future__ import annotations

import copy
import functools
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import flashpointer as fp

transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'flashpointer[transformers]'"
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402

from flashpointer.hf import SpanConfig, SpanModel  # noqa: E402

TYPES = ["PER", "LOC"]
NAMES = ["Bado", "Dorlu", "Fimek", "Kasa", "Luvel", "Meton", "Nifi", "Polba", "Rinka", "Sator", "Torme", "Velni"]
OTHERS = ["it", "rains", "and", "snows", "again", "today", ",", "they", "say", "to", "all", "of", "them", "there", "."]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
LENGTH = 48
"""Tokens of a window."""
Text = tuple[str, list[tuple[str, int, int]]]


def text_of(words: int) -> Text:
    """A text whose persons are "Dr Name" or "Dr Name Name", of which the first two words look like a person too, where
    a window ends; and whose places are "in Name" without the "in"."""
    listed: list[str] = []
    entities = []

    def add(*some: str) -> tuple[int, int]:
        start = len(" ".join(listed)) + bool(listed)
        listed.extend(some)
        return start, len(" ".join(listed))

    while len(listed) < words:
        kind = random.choice(["PER", "LOC", None, None, None, None])
        if kind == "PER":
            entities.append(("PER", *add("Dr", *random.choices(NAMES, k=random.choice([1, 2])))))
        elif kind == "LOC":
            add("in")
            entities.append(("LOC", *add(random.choice(NAMES))))
        if len(listed) < words:
            add(random.choice(OTHERS))
    return " ".join(listed), entities


@functools.cache
def a_tokenizer() -> Any:
    """Of whole words, with the special tokens of BERT."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, "Dr", "in", *NAMES, *OTHERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    options = {"model_input_names": ["input_ids", "attention_mask"], "model_max_length": LENGTH}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **options)


class NearConfig(transformers.PretrainedConfig):
    model_type = "near"

    def __init__(self, vocab_size: int = 64, hidden_size: int = 48, **options: Any) -> None:
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**options)


class NearModel(transformers.PreTrainedModel):
    """An encoder of which each state tells of a token and its two neighbours: quick to train, and no matter where."""

    config_class = NearConfig

    def __init__(self, config: NearConfig) -> None:
        super().__init__(config)
        self.embedding = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.layer = torch.nn.Conv1d(config.hidden_size, config.hidden_size, 3, padding=1)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        embedded = self.embedding(input_ids) * attention_mask.unsqueeze(2)
        hidden = self.layer(embedded.mT).mT + embedded
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=torch.nn.functional.gelu(hidden))

    def _init_weights(self, module: torch.nn.Module) -> None:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


transformers.AutoConfig.register("near", NearConfig)
transformers.AutoModel.register(NearConfig, NearModel)


def bert(**options: Any) -> Any:
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    config = {"vocab_size": len(a_tokenizer()), "max_position_embeddings": LENGTH, **sizes}
    return transformers.BertConfig(**{**config, **options})


def a_model(encoder: Any = None, **options: Any) -> SpanModel:
    torch.manual_seed(0)
    return SpanModel(SpanConfig(encoder or bert(), TYPES, **{"head_options": {"head_size": 16}, **options}))


def arguments(folder: Path, **options: Any) -> Any:
    return transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", seed=0, **options
    )


@pytest.fixture(autouse=True, scope="module")
def _without_bars() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def corpus(count: int, words: int) -> tuple[list[str], list[list[tuple[str, int, int]]]]:
    texts, entities = zip(*(text_of(words) for _ in range(count)), strict=True)
    return list(texts), list(entities)


def trainer_of(model: SpanModel, folder: Path, train: list[Any], **options: Any) -> Any:
    """As it stands: it drops no column that the model needs, and finds labels and loss."""
    return transformers.Trainer(
        model, arguments(folder, **options), train_dataset=train, eval_dataset=train, data_collator=model.collator(),
        compute_metrics=fp.metrics.SpanF1(TYPES).compute_metrics,
    )  # fmt: skip


def triples(found: list[list[dict[str, Any]]]) -> list[list[tuple[str, int, int]]]:
    return [[(x["label"], x["start"], x["end"]) for x in here] for here in found]


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> SpanModel:
    """Trained on texts that fit into a window."""
    random.seed(0)
    model = a_model(NearConfig(len(a_tokenizer())))
    train = model.examples(*corpus(800, LENGTH - 5), a_tokenizer())
    assert len(train) == 800
    trainer = trainer_of(
        model, tmp_path_factory.mktemp("near"), train, num_train_epochs=5, learning_rate=1e-2,
        per_device_train_batch_size=16, logging_steps=25,
    )  # fmt: skip
    trainer.train()
    return model


# Trainer


def test_trainer_lowers_the_loss(tmp_path: Path) -> None:
    """Until all is found that it has seen: of a BERT that knew nothing, in float32 with autocast to bfloat16."""
    random.seed(0)
    model = a_model()
    train = model.examples(*corpus(8, 12), a_tokenizer())
    trainer = trainer_of(
        model, tmp_path, train, max_steps=80, learning_rate=3e-3, per_device_train_batch_size=8, logging_steps=10,
        bf16=True,
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_loss"] > 1 > 0.1 > after["eval_loss"]
    assert before["eval_f1"] < 0.1 and after["eval_f1"] == 1.0


def test_evaluation_does_not_depend_on_batches(near: SpanModel, tmp_path: Path) -> None:
    """Sentences of different lengths and numbers of spans, of which a high threshold leaves some."""
    random.seed(1)
    model = copy.deepcopy(near).eval()
    sentences = [text for words in (3, 20, 40) for text in zip(*corpus(7, words), strict=True)]
    texts, entities = zip(*sentences, strict=True)
    scores = [x["score"] for here in model.predict(texts, a_tokenizer()) for x in here]
    model.config.decoding = {"threshold": statistics.median(scores)}
    found = triples(model.predict(texts, a_tokenizer()))
    right = sum(len(set(here) & set(gold)) for here, gold in zip(found, entities, strict=True))
    assert 0 < right == sum(map(len, found)) < sum(map(len, entities))
    train = model.examples(texts, entities, a_tokenizer())
    results = []
    for size in (1, 4, 21):
        trainer = trainer_of(model, tmp_path / str(size), train, per_device_eval_batch_size=size)
        results.append(trainer.evaluate())
        assert results[-1]["eval_f1"] == pytest.approx(2 * right / (right + sum(map(len, entities))))
        assert results[-1]["eval_loss"] == pytest.approx(results[0]["eval_loss"], rel=1e-4)
        predictions, labels, _ = trainer.predict(train)
        spans, of = map(torch.from_numpy, predictions)
        assert fp.spans.flatten(torch.from_numpy(labels)).shape[0] == sum(map(len, entities))
        flat, values = fp.spans.flatten(spans, of)
        assert len(flat) == right and (values > model.config.decoding["threshold"]).all()
        assert ((of == -100) == (spans == -100).all(2)).all()


def test_gradient_checkpointing() -> None:
    """The same gradients, of layers that run twice."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    grads, calls = [], []
    for checkpointed in (False, True):
        model = a_model(bert(**still)).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing == checkpointed
        count: list[int] = []
        layer = model.encoder.encoder.layer[0].intermediate
        layer.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        random.seed(0)
        model(**model.collator()(model.examples(*corpus(4, 12), a_tokenizer()))).loss.backward()
        grads.append({name: x.grad for name, x in model.named_parameters() if x.requires_grad})
        calls.append(len(count))
    assert calls == [1, 2]
    assert all(x is not None for x in grads[0].values())  # nothing that DDP would wait for
    torch.testing.assert_close(grads[0], grads[1])


def test_special_tokens_are_masked() -> None:
    model = a_model().eval()
    texts = ["Dr Bado rains", "Dr Bado and Dorlu it rains"]
    batch = model.collator()(model.examples(texts, [[("PER", 0, 7)], [("LOC", 12, 17)]], a_tokenizer()))
    assert batch["special_tokens_mask"].tolist() == [[1, 0, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 1]]
    assert batch["labels"].tolist() == [[[0, 1, 2]], [[1, 4, 4]]]
    output = model(**batch)
    hidden = model.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    text = torch.tensor([[0, 1, 1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1, 0]])
    torch.testing.assert_close(output.loss, model.head.loss(hidden, batch["labels"], text))
    found = fp.spans.flatten(output.spans)
    assert len(found) > 4 and text[found[:, 0], found[:, 2]].all() and text[found[:, 0], found[:, 3]].all()
    with pytest.raises(ValueError, match="mask takes"):  # not inverted
        model(**{**batch, "attention_mask": -1e4 * (1 - batch["attention_mask"])})
    del batch["special_tokens_mask"]
    torch.testing.assert_close(model(**batch).loss, model.head.loss(hidden, batch["labels"], batch["attention_mask"]))
    whole = model(batch["input_ids"], labels=batch["labels"]).loss  # without any mask
    hidden = model.encoder(input_ids=batch["input_ids"])[0]
    torch.testing.assert_close(whole, model.head.loss(hidden, batch["labels"]))
    assert model.train()(**batch).spans is None


# Saved and loaded


def test_saved_and_loaded(near: SpanModel, tmp_path: Path) -> None:
    decoding = {"threshold": [0.5, 0.25], "one_label": True}
    options = {"head_size": 8, "rope": False, "bias": False}
    other = a_model(head="GlobalPointer", head_options=options, decoding=decoding).eval()
    text, _ = text_of(100)
    for model in (near.eval(), other):
        folder = tmp_path / model.config.head
        model.save_pretrained(folder)
        loaded = SpanModel.from_pretrained(folder)
        for name in ("head", "head_options", "decoding", "id2label", "label2id"):
            assert getattr(loaded.config, name) == getattr(model.config, name)
        assert list(loaded.config.id2label.values()) == TYPES and not loaded.training
        assert type(loaded.head).__name__ == model.config.head
        assert loaded.predict([text], a_tokenizer()) == model.predict([text], a_tokenizer())
        assert type(transformers.AutoModel.from_pretrained(folder)) is SpanModel
    assert loaded.config.decoding == decoding and loaded.head.extra_repr() == other.head.extra_repr()


def test_from_a_pretrained_encoder(tmp_path: Path) -> None:
    encoder = transformers.BertModel(bert())
    encoder.save_pretrained(tmp_path)
    model = SpanModel.from_encoder(str(tmp_path), TYPES, head_options={"head_size": 16})
    torch.testing.assert_close(model.encoder.state_dict(), encoder.state_dict())
    model = SpanModel.from_encoder(str(tmp_path), TYPES, attn_implementation="eager")
    assert model.encoder.config._attn_implementation == "eager"
    heads = [SpanModel.from_encoder(str(tmp_path), TYPES).head.p_dense for _ in range(2)]
    assert not torch.equal(heads[0].weight, heads[1].weight)
    model = SpanModel.from_pretrained(tmp_path, config=SpanConfig(bert(), TYPES))  # says that the head is new
    torch.testing.assert_close(model.encoder.state_dict(), encoder.state_dict())
    for layer in (*heads, model.head.p_dense):
        assert layer.weight.std().item() == pytest.approx((1 / 48 / 3) ** 0.5, rel=0.1)  # as torch.nn.Linear begins


@pytest.mark.parametrize("kind", [transformers.BertForTokenClassification, transformers.BertModel])
def test_from_a_model(kind: type[transformers.PreTrainedModel], tmp_path: Path) -> None:
    """Its encoder, weights and all, without the head that it has; and saved and loaded without a word."""
    theirs = kind(bert())
    with torch.no_grad():
        for x in theirs.parameters():
            x.normal_(0.0, 0.02)
    before = {name: x.clone() for name, x in theirs.base_model.state_dict().items()}
    model = SpanModel.from_encoder(theirs, TYPES, decoding={"threshold": -1e4})  # finds all
    assert model.encoder is theirs.base_model
    torch.testing.assert_close(model.encoder.state_dict(), before)
    batch = model.collator()(model.examples(["Dr Bado rains"], [[("PER", 0, 7)]], a_tokenizer()))
    model(**batch).loss.backward()
    assert theirs.base_model.embeddings.word_embeddings.weight.grad.any()
    model.save_pretrained(tmp_path)
    loaded, report = SpanModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert loaded.predict(["Dr Bado rains"], a_tokenizer()) == model.predict(["Dr Bado rains"], a_tokenizer()) != [[]]


def test_what_is_no_encoder() -> None:
    with pytest.raises(TypeError, match=r"from_encoder: encoder takes the name or the folder .*; got int 7"):
        SpanModel.from_encoder(7, TYPES)
    t5 = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(TypeError, match=r"encoder takes of a T5Config what AutoModel makes .*; got T5EncoderModel"):
        SpanModel.from_encoder(transformers.T5EncoderModel(t5), TYPES)
    with pytest.raises(TypeError, match=r"from_encoder: a model as encoder takes no options; got dtype"):
        SpanModel.from_encoder(transformers.BertModel(bert()), TYPES, dtype=torch.float16)


def test_bfloat16(tmp_path: Path) -> None:
    """Weights and all: from an encoder, saved, loaded."""
    transformers.BertModel(bert()).save_pretrained(tmp_path / "encoder")
    half = {"dtype": torch.bfloat16}
    finds_all = {"threshold": -1e4}  # for it knows nothing
    model = SpanModel.from_encoder(str(tmp_path / "encoder"), TYPES, decoding=finds_all, **half)
    model.save_pretrained(tmp_path / "model")
    loaded = SpanModel.from_pretrained(tmp_path / "model", **half)
    for one in (model, loaded):
        assert {x.dtype for x in one.parameters()} == {torch.bfloat16}
        batch = one.collator()(one.examples(["Dr Bado rains"], [[("PER", 0, 7)]], a_tokenizer()))
        one.train()(**batch).loss.backward()
        assert one.head.p_dense.weight.grad.isfinite().all()
    assert model.predict(["Dr Bado rains"], a_tokenizer()) == loaded.predict(["Dr Bado rains"], a_tokenizer()) != [[]]


def test_peft_saves_the_head(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    random.seed(0)
    base = a_model(decoding={"threshold": -9.0})
    first = copy.deepcopy(base.head.state_dict())
    lora = peft.LoraConfig(target_modules=["query", "value"], modules_to_save=["head"])
    model = peft.get_peft_model(base, lora)
    train = base.examples(*corpus(8, 12), a_tokenizer())
    trainer = transformers.Trainer(
        model, arguments(tmp_path, max_steps=4, learning_rate=1e-2), train_dataset=train, data_collator=base.collator()
    )
    trainer.train()
    for name, x in model.named_parameters():
        assert x.requires_grad == ("lora" in name or "head.modules_to_save" in name)
    trained, original = base.head.modules_to_save["default"], base.head.original_module
    assert all(torch.equal(x, first[name]) for name, x in original.state_dict().items())
    assert all(not torch.equal(x, first[name]) for name, x in trained.state_dict().items())
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(a_model(decoding={"threshold": -9.0}), tmp_path / "adapter")
    texts = ["Dr Bado rains", "it rains in Dorlu"]
    assert loaded.predict(texts, a_tokenizer()) == model.predict(texts, a_tokenizer()) != [[], []]
    assert loaded.predict(texts, a_tokenizer()) != a_model(decoding={"threshold": -9.0}).predict(texts, a_tokenizer())


# Texts


def test_predict_finds_what_windows_placed_by_hand_find(near: SpanModel) -> None:
    """In 20,000 characters, of 100 windows: one around each entity, true or found, with most of it on neither side."""
    random.seed(2)
    text, entities = text_of(4600)
    assert len(text) > 20_000
    (found,) = near.predict([text], a_tokenizer())
    assert all(x["text"] == text[x["start"] : x["end"]] for x in found)
    around, expected = [], []
    for entity in sorted({*entities, *triples([found])[0]}, key=lambda x: x[1:]):
        first = text.rfind(" ", 0, max(0, entity[1] - 60)) + 1
        around.append((entity, first, text[first : f"{text} ".find(" ", min(len(text), entity[2] + 60))]))
    for (entity, first, _), here in zip(
        around, near.predict([part for _, _, part in around], a_tokenizer()), strict=True
    ):
        if any((x["label"], x["start"] + first, x["end"] + first) == entity for x in here):
            expected.append(entity)
    assert triples([found])[0] == expected == entities
    assert len(expected) > 500


@pytest.mark.parametrize("length, stride", [(None, None), (20, 6), (12, 8), (40, 37)])
def test_predict_takes_windows_of_any_size(near: SpanModel, length: int | None, stride: int | None) -> None:
    """That share twice the tokens of the longest entity."""
    random.seed(3)
    text, entities = text_of(500)
    assert triples(near.predict([text], a_tokenizer(), max_length=length, stride=stride)) == [entities]


def test_predict_gives_each_text_its_own(near: SpanModel) -> None:
    """In the order of the texts, whatever batches they come in; the model is left as it was."""
    random.seed(4)
    texts, entities = corpus(20, 5)
    for words in (70, 1, 200, 40):
        text, of = text_of(words)
        texts.insert(words % 11, text)
        entities.insert(words % 11, of)
    near.train()
    lengths: list[int] = []
    hook = near.encoder.register_forward_pre_hook(
        lambda _, inputs, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    found = near.predict(texts, a_tokenizer(), batch_size=4)
    hook.remove()
    assert near.training
    assert len(lengths) > 1 and lengths == sorted(lengths, reverse=True)
    assert triples(found) == entities
    for size in (1, 5, 16, 100):
        others = near.predict(iter(texts), a_tokenizer(), batch_size=size)
        assert triples(others) == triples(found)
        assert [x["score"] for here in others for x in here] == pytest.approx(
            [x["score"] for here in found for x in here], rel=1e-4
        )
    assert near.predict(texts, a_tokenizer(), batch_size=4) == found
    assert near.predict(texts, a_tokenizer()) == near.predict(texts, a_tokenizer(), batch_size=16)  # the default
    assert triples(near.predict(texts[::-1], a_tokenizer())) == entities[::-1]
    assert near.predict(["", " ", "it rains"], a_tokenizer()) == [[], [], []]
    assert near.predict([], a_tokenizer()) == []


def test_predict_does_not_ask_the_default_device(near: SpanModel) -> None:
    """With a choice among what windows found, which is made on the CPU."""
    model = copy.deepcopy(near).eval()
    model.config.decoding = {"non_overlapping": True}
    texts, _ = corpus(3, 12)
    expected = model.predict(texts, a_tokenizer(), max_length=12, stride=4)
    with torch.device("meta"):
        assert model.predict(texts, a_tokenizer(), max_length=12, stride=4) == expected != [[], [], []]


@pytest.mark.parametrize("option", ["non_overlapping", "non_crossing", "one_label"])
def test_choices_are_those_of_a_whole_text(option: str) -> None:
    """Not of a window: the best of all that was found."""
    random.seed(5)
    text, _ = text_of(120)
    model = a_model(NearConfig(len(a_tokenizer())), decoding={"threshold": -9.0, "top_k": 40})
    (found,) = model.predict([text], a_tokenizer())
    model.config.decoding[option] = True
    (chosen,) = model.predict([text], a_tokenizer())
    kept: list[dict[str, Any]] = []
    for x in sorted(found, key=lambda x: -x["score"]):
        for y in kept:
            (a, b), (c, d) = sorted([(x["start"], -x["end"]), (y["start"], -y["end"])])
            shares, nests = c < -b, -d <= -b
            if {"non_overlapping": shares, "non_crossing": shares and not nests, "one_label": (a, b) == (c, d)}[option]:
                break
        else:
            kept.append(x)
    assert chosen == sorted(kept, key=lambda x: found.index(x))
    assert len(chosen) < len(found)


def test_windows_are_as_long_as_tokenizer_and_encoder_take() -> None:
    text, entities = text_of(900)
    endless = copy.deepcopy(a_tokenizer())
    endless.model_max_length = 10**30
    short, near = a_model(bert(max_position_embeddings=24)), a_model(NearConfig(len(endless)))
    for model, tokenizer, length in ((short, endless, 24), (near, a_tokenizer(), LENGTH), (near, endless, 512)):
        rows = [row["input_ids"] for row in model.examples([text], [entities], tokenizer)]
        assert max(map(len, rows)) == len(rows[0]) == length
        assert rows[1][1 : 1 + (length - 2) // 4] == rows[0][-1 - (length - 2) // 4 : -1]  # what they share


def test_examples_say_what_no_window_holds() -> None:
    model = a_model()
    text = " ".join(["Dr Bado"] * 20)
    entities = [[("PER", 0, 7), ("LOC", 3, len(text))], []]
    with pytest.warns(UserWarning, match=r"examples: 1 entities, the first .* \(0, 'LOC', 3, 159\), lie whole in no"):
        rows = model.examples([text, ""], entities, a_tokenizer(), max_length=12, stride=3)
    assert [row["labels"] for row in rows] == [[{"label": "PER", "start": 1, "end": 2}], *[[]] * 6]
    assert all(set(row) == {"input_ids", "attention_mask", "special_tokens_mask", "labels"} for row in rows)
    assert model.examples([], [], a_tokenizer()) == []


def test_words_with_tags() -> None:
    words, tags = ["Anna", "Lee", "ran"], ["B-PER", "I-PER", "O"]
    texts, entities = fp.spans.join_words([words], fp.spans.from_tags([tags]))
    tokenizer, model = a_tokenizer(), a_model()
    (row,) = model.examples(texts, entities, tokenizer)
    assert row == model.examples(["Anna Lee ran"], [[("PER", 0, 8)]], tokenizer)[0]
    with pytest.raises(ValueError, match=r"^examples: entities takes a list for each of 1 texts; got 0$"):
        model.examples(texts, [], tokenizer)


def test_a_column_of_datasets_keeps_its_spans() -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'flashpointer[integrations]'")
    random.seed(6)
    model = a_model()
    rows = model.examples(*corpus(5, 12), a_tokenizer())
    stored = [datasets.Dataset.from_list(rows)[i] for i in range(5)]
    expected, batch = model.collator()(rows), model.collator()(stored)
    assert all(torch.equal(batch[name], x) for name, x in expected.items())


def test_the_script_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    """From raw text to printed entities, of a text that it has not seen, in at most 25 lines."""
    page = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (script,) = (x for x in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S) if "flashpointer.hf" in x)
    assert len([line for line in script.splitlines() if line.strip()]) <= 25
    exec(script, {})
    printed = capsys.readouterr().out.splitlines()[-2:]
    assert re.match(r"{'text': 'Lima', 'label': 'LOC', 'start': 3, 'end': 7, 'score': \d", printed[0])
    assert re.match(r"{'text': 'Dr Chen', 'label': 'PER', 'start': 23, 'end': 30, 'score': \d", printed[1])


# Errors


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: SpanModel(SpanConfig(types=TYPES)), ValueError, "SpanModel: config takes one with an encoder, .*None"),
        (lambda: SpanConfig(bert(), "PER"), TypeError, "SpanConfig: types takes a list of .*; got str 'PER'"),
        (lambda: SpanConfig(bert(), {"PER": 1}), TypeError, "SpanConfig: types takes a list of .*; got dict"),
        (lambda: SpanConfig(bert(), [1, 2]), ValueError, r"SpanConfig: types takes a list of .*; got \[1, 2\]"),
        (lambda: SpanConfig(bert(), ["PER", "PER"]), ValueError, "SpanConfig: types .*each once; got .*'PER'"),
        (lambda: SpanConfig(bert(), TYPES, "Pointer"), ValueError, "SpanConfig: head takes one of 'Eff.*got str 'Poi"),
        (lambda: a_model(head_options={"head_size": 3}), ValueError, "EfficientGlobalPointer: head_size takes .* got"),
        (lambda: a_model().predict("Dr Bado", a_tokenizer()), TypeError, "predict: texts takes a list of strs; got"),
        (lambda: a_model().predict([3], a_tokenizer()), TypeError, "predict: texts takes a str for each .*int 3 at 0"),
        (lambda: a_model().predict([], None), TypeError, "predict: tokenizer takes a fast tokenizer .*; got NoneType"),
        (lambda: a_model().predict([], a_tokenizer(), batch_size=0), ValueError, "predict: batch_size takes .*int 0"),
        (lambda: a_model().predict([], a_tokenizer(), max_length=2), ValueError, "predict: max_length takes .*int 2"),
        (lambda: a_model().predict([], a_tokenizer(), max_length=9, stride=7), ValueError, "predict: stride .* 0 to 6"),
        (lambda: a_model().examples(["a"], [], a_tokenizer()), ValueError, "examples: entities takes a list .*; got 0"),
        (lambda: a_model().examples(["a"], [[("X", 0, 1)]], a_tokenizer()), ValueError, "from_offsets: .* of a type"),
    ],
)  # fmt: skip
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}") as raised:
        call()
    assert "\n" not in str(raised.value)


def test_it_is_imported_only_when_asked_for() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None; import flashpointer\n"
        "try: import flashpointer.hf\n"
        "except ImportError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "flashpointer.hf takes transformers: pip install 'flashpointer[transformers]'\n"
