"""The o200k Harmony tokenizer and chat template as the files transformers reads."""

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from vpmoe.data.harmony import RenderConfig
from vpmoe.data.o200k import O200K_PATTERN, o200k, token_bytes
from vpmoe.vocabulary import CALL, END_OF_TEXT, FIRST_SPECIAL, RETURN, START_OF_TEXT, VOCAB_SIZE

CHAT_TEMPLATE_FILE = "chat_template.jinja"
STOP_IDS = (RETURN, CALL)
PAD_ID = END_OF_TEXT


class _InMemoryConverter(TikTokenConverter):
    """transformers' converter, fed with ranks that are in memory instead of a file."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        return {token: rank for rank, token in enumerate(token_bytes())}


def special_tokens() -> Mapping[int, str]:
    """Name of every special id below the vocabulary's size, in id order.

    Harmony's own table goes one id further than any model's embedding; that id is left out.
    """
    names = {i: name for name, i in o200k()._special_tokens.items()}
    return {i: names[i] for i in range(FIRST_SPECIAL, VOCAB_SIZE)}


def build_tokenizer(render: RenderConfig) -> PreTrainedTokenizerFast:
    """A transformers tokenizer that gives the same ids as openai-harmony.

    Text that looks like a special token becomes one, as in every transformers tokenizer; pass
    `split_special_tokens=True` to keep untrusted text as text.

    Args:
        render: How the model's training data was rendered; the chat template's defaults.
    """
    names = special_tokens()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_converted(),
        bos_token=names[START_OF_TEXT],
        eos_token=names[RETURN],
        pad_token=names[END_OF_TEXT],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template(render)
    return tokenizer


@cache
def _converted() -> Tokenizer:
    converter = _InMemoryConverter(
        vocab_file="o200k",
        pattern=O200K_PATTERN,
        extra_special_tokens=list(special_tokens().values()),
    )
    return converter.converted()


def chat_template(render: RenderConfig) -> str:
    """A Jinja template that renders messages exactly as `Renderer(render)` does.

    Messages are verbatim: a system or developer message given by the caller stands for the
    configured ones, as it does in a dataset. An assistant message may carry its reasoning as
    `thinking`; it is kept only after the last user message. `reasoning_effort` and
    `developer_instructions` can be passed to `apply_chat_template`.
    """
    settings = {key: value for key, value in render.model_dump().items() if value is not None}
    defaults = json.dumps(settings, ensure_ascii=False)
    body = (resources.files("vpmoe.export") / CHAT_TEMPLATE_FILE).read_text(encoding="utf-8")
    return f"{{%- set defaults = {defaults} -%}}\n{body}"
