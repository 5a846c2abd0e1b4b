"""Span tensors: what ``pointer_loss`` takes for labels and ``pointer_decode`` gives back.

int64 ``[S, 4]``, a row (batch, head, start, end) for each span, end inclusive, in any order; a row that is listed twice
counts once. A batch of 16 sentences takes a few hundred bytes, where its dense labels take megabytes. ::

    spans = from_lists([[("PER", 0, 1), ("LOC", 4, 4)], []], heads=["PER", "LOC"])
    # [[0, 0, 0, 1],
    #  [0, 1, 4, 4]]

Or batch-first: int64 ``[B, P, 3]``, rows (head, start, end), where a row with a negative entry, by convention of -100,
is padding. DataParallel, accelerate and Trainer can split, pad and gather this form. All functions take both forms. ::

    pad(spans, batch=2)
    # [[[0, 0, 1], [1, 4, 4]],
    #  [[-100, -100, -100], [-100, -100, -100]]]
"""

from ._read import Heads
from .dense import from_dense, from_padded, to_dense
from .entities import from_utf16, to_entities, to_words
from .lists import SpanSet, collate, from_lists
from .offsets import FromOffsets, from_offsets, from_words
from .padded import flatten, pad
from .tags import from_tags, join_words

__all__ = [
    "FromOffsets",
    "Heads",
    "SpanSet",
    "collate",
    "flatten",
    "from_dense",
    "from_lists",
    "from_offsets",
    "from_padded",
    "from_tags",
    "from_utf16",
    "from_words",
    "join_words",
    "pad",
    "to_dense",
    "to_entities",
    "to_words",
]
