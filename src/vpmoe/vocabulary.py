"""The o200k Harmony vocabulary: special ids, and id maps for models that keep only a part of it."""

import hashlib
from collections.abc import Sequence

import numpy as np

from vpmoe.errors import ConfigError, DataError

VOCAB_SIZE = 201_088  # ids 0..201087; Harmony's own table names one id more, which no model has
NUM_RANKS = 199_998  # ordinary byte-pair tokens, ids 0..199997
O200K_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"

START_OF_TEXT = 199_998
END_OF_TEXT = 199_999  # ends a document in a dataset; also the padding id
RETURN = 200_002  # ends the last assistant message of a conversation
CONSTRAIN = 200_003
CHANNEL = 200_005
START = 200_006
END = 200_007
MESSAGE = 200_008
CALL = 200_012
FIRST_SPECIAL = START_OF_TEXT

SPECIAL_TOKENS = {
    "<|startoftext|>": START_OF_TEXT,
    "<|endoftext|>": END_OF_TEXT,
    "<|return|>": RETURN,
    "<|constrain|>": CONSTRAIN,
    "<|channel|>": CHANNEL,
    "<|start|>": START,
    "<|end|>": END,
    "<|message|>": MESSAGE,
    "<|call|>": CALL,
}
STOP_TOKENS = (RETURN, CALL)  # where a completion ends

# Single-token words of message headers.
SYSTEM = 17_360
DEVELOPER = 77_944
USER = 1_428
ASSISTANT = 173_781
ANALYSIS = 35_644
FINAL = 17_196

COMPLETION_HEADER = (START, ASSISTANT)  # what a prompt ends with; the model goes on from here


class VocabSubset:
    """A bijection between o200k ids and the rows of a smaller embedding table.

    It sits at a model's two ends, so that datasets, samples and teachers keep o200k ids.

    Args:
        ids: o200k ids in row order, strictly increasing.

    Raises:
        ConfigError: If the ids are not strictly increasing or leave the vocabulary.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        rows = np.asarray(ids, dtype=np.int64)
        if rows.ndim != 1 or rows.size == 0 or np.any(np.diff(rows) <= 0):
            raise ConfigError([("vocabulary subset ids are not strictly increasing", "sort them")])
        if rows[0] < 0 or rows[-1] >= VOCAB_SIZE:
            outside = rows[0] if rows[0] < 0 else rows[-1]
            raise ConfigError(
                [(f"vocabulary subset holds id {outside}", f"ids lie in 0..{VOCAB_SIZE - 1}")]
            )
        self.ids = rows  # (rows,) o200k id of each row
        self.row_of = np.full(VOCAB_SIZE, -1, dtype=np.int64)
        self.row_of[rows] = np.arange(rows.size)

    def __len__(self) -> int:
        return int(self.ids.size)

    @property
    def sha256(self) -> str:
        """Identity of the map, for manifests."""
        return hashlib.sha256(self.ids.astype("<i8").tobytes()).hexdigest()

    def require(self, tokens: np.ndarray, *, what: str) -> None:
        """Refuse tokens that the subset does not hold.

        Raises:
            DataError: Naming `what`, the first such id and how many distinct ids are missing.
        """
        missing = np.unique(tokens[self.row_of[tokens] < 0])
        if missing.size:
            raise DataError(
                f"{what} uses {missing.size} token ids that the model's vocabulary subset lacks, "
                f"first {missing[0]}",
                hint="add them to vocab_subset, or drop the subset",
            )
