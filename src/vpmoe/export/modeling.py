"""The student as transformers classes: AutoModelForCausalLM, generate, save and load.

`import vpmoe.export` registers them. Logits always span the whole o200k vocabulary: a model with a
vocabulary subset gives minus infinity to the ids it has no row for, so that prompts, labels and
generated ids are o200k ids whatever the model keeps.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

from vpmoe.batch import PADDING_DOCUMENT
from vpmoe.config import Tree, resolved, validate
from vpmoe.models.cache import KeyValueCache
from vpmoe.models.init import FLOAT32, cast_parameters, init_weights
from vpmoe.models.student import Student, StudentConfig
from vpmoe.vocabulary import END_OF_TEXT, VOCAB_SIZE

MODEL_TYPE = "vpmoe"
ALIGNMENT_BYTES = 64
IGNORED_LABEL = -100  # transformers' mark for labels without loss


@contextmanager
def quietly() -> Iterator[None]:
    """Inside, transformers draws no progress bars."""
    was_on = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            enable_progress_bar()


class VpmoeConfig(PreTrainedConfig):
    """A student's settings inside transformers' `config.json`.

    `student` holds every setting; the flat fields repeat what other tools look for.
    """

    model_type = MODEL_TYPE
    student: dict | None = None
    vocab_size: int = VOCAB_SIZE
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    tie_word_embeddings: bool = False  # a tied student has one matrix only: nothing to tie
    use_cache: bool = True

    @classmethod
    def from_student(cls, config: StudentConfig) -> "VpmoeConfig":
        """The transformers config of a student."""
        return cls(
            student=resolved(config),
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        )

    @property
    def student_config(self) -> StudentConfig:
        """The settings as this package's own config, checked.

        Raises:
            ConfigError: If a setting is missing or unknown to the installed version.
        """
        tree: Tree = self.student or {}
        return validate(StudentConfig, tree, source="config.json: student")


class StudentCache(Cache):
    """A student's key-value cache under the name and manners transformers expects.

    Args:
        capacity: Tokens of the longest conversation, prompt and completion together.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(layers=[])
        self.capacity = capacity
        self.memory: KeyValueCache | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, padding included."""
        return 0 if self.memory is None else self.memory.step.max_length

    @property
    def is_compileable(self) -> bool:
        """Never: shapes grow as the conversation does."""
        return False

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Tokens the cache has room for."""
        return self.capacity

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these conversations, in this order, as beam search asks."""
        if self.memory is not None:
            self.memory.keep(beam_idx)


class VpmoeForCausalLM(PreTrainedModel, GenerationMixin):
    """A student that speaks transformers' language."""

    config_class = VpmoeConfig
    config: VpmoeConfig
    base_model_prefix = "student"
    main_input_name = "input_ids"

    def __init__(self, config: VpmoeConfig) -> None:
        super().__init__(config)
        self._keep_in_fp32_modules_strict = {*FLOAT32, "expert_bias", "local_tokens_per_expert"}
        student_config = config.student_config
        self.student = Student(student_config)
        if not self.student.embedding.weight.is_meta:
            init_weights(self.student, seed=0, **student_config.init_settings)
        cast_parameters(self.student, self.student.embedding.weight.dtype)
        self.post_init()

    @classmethod
    def from_student(cls, student: Student) -> "VpmoeForCausalLM":
        """The same student, not a copy, behind transformers' interface."""
        config = VpmoeConfig.from_student(student.config)
        config.dtype = student.embedding.weight.dtype
        with torch.device("meta"):
            model = cls(config)
        model.student = student
        return model.eval()

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """The model in a folder or hub repository, as transformers loads it.

        Tensors mapped from a file lie at odd addresses, for which the processor's matrix products
        round differently; they are moved, so that logits equal the checkpoint's bit for bit.
        """
        loaded = super().from_pretrained(*args, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for parameter in model.parameters():
            if parameter.data_ptr() % ALIGNMENT_BYTES:
                parameter.data = parameter.data.clone()
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Refill what no file holds: loading leaves buffers that are not saved without values."""
        empty = {
            name: buffer
            for name in module._non_persistent_buffers_set
            if (buffer := module._buffers[name]) is not None and not buffer.is_meta
        }
        if not empty:
            return
        path = next(name for name, found in self.named_modules() if found is module)
        with torch.device("cpu"):
            fresh = Student(self.config.student_config)
        values = dict(fresh.named_buffers())
        for name, buffer in empty.items():
            buffer.copy_(values[f"{path}.{name}".removeprefix("student.")])

    def get_input_embeddings(self) -> nn.Module:
        """The embedding; its rows are a vocabulary subset's where there is one."""
        return self.student.embedding

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; absent where it is the embedding."""
        return self.student.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: StudentCache | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **ignored: Any,
    ) -> CausalLMOutputWithPast:
        """Logits over o200k ids, float32, and the mean loss if labels are given.

        Args:
            input_ids: o200k ids (batch, seq).
            attention_mask: 1 for text and 0 for padding, on either side; each row holds one
                conversation. With a cache it covers the cached tokens too.
            past_key_values: A cache; the first call takes prompts, later ones a token each.
            labels: o200k ids, -100 where there is no loss; shifted in here.
            logits_to_keep: Only the last so many positions get logits; 0 for all.
            ignored: `position_ids`, `use_cache` and the like: positions follow from the mask.
        """
        seq = input_ids.shape[1]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        is_text = mask[:, -seq:].bool()
        tokens = input_ids.where(is_text, END_OF_TEXT)
        if past_key_values is None:
            hidden = self._states(tokens, is_text, None)
        else:
            hidden = self._cached_states(tokens, is_text, past_key_values)
        logits = self._o200k_logits(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            wanted = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
            loss = F.cross_entropy(
                logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED_LABEL
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _states(self, tokens: Tensor, is_text: Tensor, memory: KeyValueCache | None) -> Tensor:
        positions = (is_text.cumsum(dim=1) - 1).clamp_min(0)
        documents = torch.where(is_text, 0, PADDING_DOCUMENT)
        return self.student(
            tokens, positions=positions, document_ids=documents, cache=memory
        ).hidden

    def _cached_states(self, tokens: Tensor, is_text: Tensor, cache: StudentCache) -> Tensor:
        if cache.memory is not None:
            memory = cache.memory
            return self.student(
                tokens,
                positions=memory.step.lengths[:, None],
                document_ids=torch.zeros_like(tokens),
                cache=memory,
            ).hidden
        cache.memory = self.student.new_cache(batch=tokens.shape[0], capacity=cache.capacity)
        # The cache takes prompts padded at the end: text first, in its order.
        order = (~is_text).long().argsort(dim=1, stable=True)
        hidden = self._states(tokens.gather(1, order), is_text.gather(1, order), cache.memory)
        back = order.argsort(dim=1)[:, :, None].expand_as(hidden)
        return hidden.gather(1, back)

    def _o200k_logits(self, hidden: Tensor) -> Tensor:
        logits = self.student.logits(hidden).float()
        if self.student.id_of is None:
            return logits
        full = logits.new_full((*logits.shape[:-1], VOCAB_SIZE), -torch.inf)
        full[..., self.student.id_of] = logits
        return full

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        """Give `generate` a cache of the size it will need; whether it made one."""
        if not generation_config.use_cache or model_kwargs.get("past_key_values") is not None:
            return False
        model_kwargs["past_key_values"] = StudentCache(max_cache_length + 1)
        return True
