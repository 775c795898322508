"""Which ids a dataset's labels are, the most frequent first: codecs name those in few bits."""

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from vpmoe.data.dataset import Dataset
from vpmoe.errors import DataError
from vpmoe.spans import Span
from vpmoe.teachers.codecs.ranking import Ranking
from vpmoe.vocabulary import VOCAB_SIZE

# Even 59 k labels rank ids well, see docs/targets.md; so many are counted in seconds.
_COUNTED_TOKENS = 2**24
_AT_ONCE = 2**20


def label_ranking(dataset: Dataset, known: np.ndarray | None = None) -> Ranking:
    """Ids by how often they are trained labels of the dataset's train split.

    Conversations are counted in even steps, all of them up to 17 M tokens. The same dataset has
    the same ranking, whichever split is scored.

    Args:
        dataset: Either split.
        known: All ids that a teacher can name, where it is not all of o200k: those that are no
            label count as one.

    Raises:
        DataError: If the train split cannot be read.
    """
    try:
        train = dataset if dataset.split == "train" else Dataset(dataset.path, "train")
    except DataError as error:
        raise DataError(
            f"{error.message}, whose labels codec adaptive ranks ids by",
            hint="choose another codec, or build the dataset with a train split",
        ) from error
    step = -(-int(train.lengths.sum()) // _COUNTED_TOKENS)
    counts = label_counts(train, step=step)
    if known is not None:
        counts[torch.from_numpy(known)] = counts[torch.from_numpy(known)].clamp_min(1)
    return Ranking.of_counts(counts)


def label_counts(dataset: Dataset, *, step: int = 1) -> Int64[Tensor, " vocab"]:
    """How often each id is a trained label of every `step`-th conversation."""
    counts = np.zeros(VOCAB_SIZE, dtype=np.int64)
    waiting: list[np.ndarray] = []
    held = 0
    for index in range(0, len(dataset), step):
        labels = dataset.tokens(index)[1:][dataset.span_ids(index)[:-1] != Span.IGNORE]
        waiting.append(labels)
        held += len(labels)
        if held >= _AT_ONCE:
            counts += np.bincount(np.concatenate(waiting), minlength=VOCAB_SIZE)
            waiting, held = [], 0
    if waiting:
        counts += np.bincount(np.concatenate(waiting), minlength=VOCAB_SIZE)
    return torch.from_numpy(counts)
