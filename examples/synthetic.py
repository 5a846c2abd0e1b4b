"""What the example programs make where they are given none: corpora, and a small encoder."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import tokenizers as tk
import transformers
from torch import nn


class Sentence(NamedTuple):
    tokens: list[str]
    spans: list[tuple[str, int, int]]
    """(type, start, end) in words, end inclusive."""


class Text(NamedTuple):
    words: list[str]
    labels: list[str]


# --- nested entities -----------------------------------------------------------------------------------------------

# An upper-case symbol is an entity, a lower-case one a name.
GRAMMAR = {
    "sentence": (
        "{PER} was born in {LOC} .",
        "{PER} left the {ORG} for the {ORG} .",
        "In {LOC} , {PER} and {PER} opened the {EVENT} .",
        "The {EVENT} moved from {LOC} to {LOC} last year .",
        "The {ORG} hired {PER} , who had worked in {LOC} .",
        "Critics of {PER} and the {ORG} met at the {EVENT} .",
        "At first nobody in the office noticed the change .",
        "Last year was cold , critics said , and few had worked .",
    ),
    "PER": ("{name} {name}", "{name} {name} {name}", "Dr. {name}", "{name} {name} Jr."),
    "LOC": ("{name}", "Port {name}", "{name} Bay", "Lake {name}"),
    "ORG": (
        "University of {LOC}",
        "{LOC} City Council",
        "{PER} Foundation",
        "{name} and Sons Ltd.",
        "Department of Physics of the University of {LOC}",
        "Friends of the {ORG}",
    ),
    "EVENT": ("{LOC} Film Festival", "{PER} Memorial Lecture", "Open Day of the {ORG}"),
}


def entities(seed: int, train: int = 2000, dev: int = 500) -> tuple[list[Sentence], list[Sentence]]:
    """Training and dev sentences with nested entities, whose names are not the same ones."""
    rng = random.Random(seed)
    names = _names(rng)
    cut = len(names) * train // (train + dev)

    def corpus(size: int, names: list[str]) -> list[Sentence]:
        sentences = [Sentence([], []) for _ in range(size)]
        for sentence in sentences:
            _expand("sentence", sentence, rng, names)
        return sentences

    return corpus(train, names[:cut]), corpus(dev, names[cut:])


def _names(rng: random.Random) -> list[str]:
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in ("a", "e", "i", "o", "u", "an", "el")]
    names = sorted({"".join(rng.choices(syllables, k=3)).capitalize() for _ in range(10000)})
    rng.shuffle(names)
    return names


def _expand(symbol: str, sentence: Sentence, rng: random.Random, names: list[str]) -> None:
    for word in rng.choice(GRAMMAR[symbol]).split():
        inner, start = word.strip("{}"), len(sentence.tokens)
        if inner == word:
            sentence.tokens.append(word)
        elif inner == "name":
            sentence.tokens.append(rng.choice(names))
        else:
            _expand(inner, sentence, rng, names)
            sentence.spans.append((inner, start, len(sentence.tokens) - 1))


# --- labels of texts -----------------------------------------------------------------------------------------------

KEYWORDS = {
    "food": "bread soup cheese apple recipe kitchen",
    "music": "piano song choir violin concert drum",
    "sport": "goal match tennis referee league sprint",
    "travel": "airport luggage hotel passport ferry island",
    "weather": "rain storm sunny snow forecast wind",
    "money": "bank loan salary tax price budget",
    "health": "doctor fever hospital vaccine nurse pill",
    "school": "teacher exam pupil lesson homework class",
}
FILLERS = "the a we they saw had said of and about with then again today some people it was very near"


def labels(seed: int, train: int = 2000, dev: int = 500) -> tuple[list[Text], list[Text]]:
    """Texts with keywords of their labels. A keyword after "no" does not count, so words alone do not tell."""
    rng = random.Random(seed)

    def text() -> Text:
        labels = rng.sample(sorted(KEYWORDS), rng.choice([0, 1, 1, 2, 2, 3]))
        others = [label for label in KEYWORDS if label not in labels]
        parts = [[rng.choice(KEYWORDS[label].split())] for label in labels for _ in range(rng.randint(1, 2))]
        parts += [["no", rng.choice(KEYWORDS[label].split())] for label in rng.sample(others, rng.randint(0, 2))]
        parts += [[word] for word in rng.choices(FILLERS.split(), k=rng.randint(5, 15))]
        rng.shuffle(parts)
        return Text([word for part in parts for word in part], labels)

    return [text() for _ in range(train)], [text() for _ in range(dev)]


# --- very many labels ----------------------------------------------------------------------------------------------

LabelledTexts = list[tuple[str, list[int]]]


def many_labels(
    seed: int, labels: int = 1 << 17, train: int = 40000, dev: int = 2000
) -> tuple[LabelledTexts, LabelledTexts, int]:
    """Texts of a tree of labels, where n stands below n // 8: a label, and all above it. Each gives the text a word
    that it shares with others."""
    rng = random.Random(seed)

    def text() -> tuple[str, list[int]]:
        path = [rng.randrange(1, labels)]
        while path[-1] >= 8:
            path.append(path[-1] // 8)
        words = [f"{depth}x{label % 64}" for depth, label in enumerate(reversed(path))]
        words += rng.choices(FILLERS.split(), k=3)
        rng.shuffle(words)
        return " ".join(words), path

    return [text() for _ in range(train)], [text() for _ in range(dev)], labels


# --- relations -----------------------------------------------------------------------------------------------------

PREDICATES = ["born in", "works for", "founded", "located in"]
# What stands in braces is an entity: a name, or of a capital letter a university, whose place, of the same letter in
# lower case, is one too.
SENTENCES = (
    ("{a} , born in {b} , founded {c} .", (("a", "born in", "b"), ("a", "founded", "c"))),
    ("{a} and {b} founded {c} in {d} .", (("a", "founded", "c"), ("b", "founded", "c"), ("c", "located in", "d"))),
    ("{a} works for {b} , and {c} for {d} .", (("a", "works for", "b"), ("c", "works for", "d"))),
    ("the {U} was founded by {a} .", (("a", "founded", "U"), ("U", "located in", "u"))),
    ("{a} of {b} works for the {U} .", (("a", "born in", "b"), ("a", "works for", "U"), ("U", "located in", "u"))),
    ("{a} never met {b} in {c} .", ()),
    ("nobody works for {a} .", ()),
)
Span = tuple[int, int]
Triple = tuple[Span, str, Span]


class Relations(NamedTuple):
    tokens: list[str]
    triples: list[Triple]
    """(subject, predicate, object), each of the entities (start, end) in words, end inclusive."""


def relations(seed: int, train: int = 2000, dev: int = 300) -> tuple[list[Relations], list[Relations]]:
    """Training and dev sentences with triples that share entities, whose names are not the same ones."""
    rng = random.Random(seed)
    names = _names(rng)
    cut = len(names) * train // (train + dev)

    def sentence(names: list[str]) -> Relations:
        template, triples = rng.choice(SENTENCES)
        tokens: list[str] = []
        spans: dict[str, Span] = {}
        for word in template.split():
            start, slot = len(tokens), word.strip("{}")
            tokens += [word] if slot == word else ["University", "of"] * slot.isupper()
            if slot != word:
                inner = len(tokens)
                tokens += rng.choices(names, k=rng.randint(1, 2))
                spans |= {slot.lower(): (inner, len(tokens) - 1), slot: (start, len(tokens) - 1)}
        return Relations(tokens, [(spans[s], predicate, spans[o]) for s, predicate, o in triples])

    return [sentence(names[:cut]) for _ in range(train)], [sentence(names[cut:]) for _ in range(dev)]


# --- an encoder ----------------------------------------------------------------------------------------------------


def encoder(texts: Iterable[Sequence[str]]) -> tuple[Any, nn.Module]:
    """A ModernBERT of two layers with random weights, which learns in seconds, and its fast tokenizer.

    Its tokens are the words that the texts have three times or more, and one for all others, known by its neighbours
    alone.
    """
    words = tk.Tokenizer(tk.models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = tk.pre_tokenizers.WhitespaceSplit()
    special = ["[PAD]", "[UNK]", "[CLS]"]
    words.train_from_iterator(texts, tk.trainers.WordLevelTrainer(min_frequency=3, special_tokens=special))
    words.post_processor = tk.processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 2)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", model_max_length=8192
    )
    config = transformers.ModernBertConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, cls_token_id=2, sep_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return tokenizer, transformers.ModernBertModel(config)
