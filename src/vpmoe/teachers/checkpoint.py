"""Finding a teacher's files, reading its weights, and refusing what would answer nonsense."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vpmoe.errors import TeacherError
from vpmoe.vocabulary import (
    MESSAGE,
    O200K_SHA256,
    SPECIAL_TOKENS,
    START,
    USER,
    VOCAB_SIZE,
    VocabSubset,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCAB_IDS_FILE = "vocab_ids.json"
_HASHED = ("*.safetensors", "config.json", VOCAB_IDS_FILE)
_NOT_NEEDED = ("original/*", "metal/*")  # other layouts of the same weights in OpenAI's folders

# transformers takes seconds to import: the functions below import it when a teacher is loaded, so
# that configs can be checked without it.


def locate(path: str, revision: str) -> tuple[Path, str]:
    """The folder (or config file) that holds the teacher, and its commit if it is a hub's.

    Args:
        path: A folder, a `.json` config, or a hub id of the form owner/name.
        revision: Branch, tag or commit of a hub id; empty for the main branch.

    Raises:
        TeacherError: If nothing is there, or a local teacher is given a revision.
    """
    local = Path(path)
    if local.exists():
        if revision:
            raise TeacherError(
                f"teacher {path} is a local folder and cannot have revision {revision!r}",
                hint="remove revision; a folder is identified by the hash of its files",
            )
        return local, ""
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise TeacherError(
            f"no teacher at {path}", hint="give a checkpoint folder or a hub id, owner/name"
        )
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            path,
            revision=revision or None,
            allow_patterns=["*.safetensors", "*.json"],
            ignore_patterns=list(_NOT_NEEDED),
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise TeacherError(
            f"teacher {path} is neither a local folder nor reachable on the hub: {reason}",
            hint="check the spelling and the network, or give the path of a local copy",
        ) from error
    return Path(folder), Path(folder).name


def read_vocab(source: Path) -> VocabSubset | None:
    """The subset of o200k that a teacher knows; None if it knows all of it.

    Raises:
        TeacherError: If the file beside the weights is not a list of ids.
    """
    folder = source if source.is_dir() else source.parent
    file = folder / VOCAB_IDS_FILE
    if not file.exists():
        return None
    try:
        ids = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TeacherError(f"{file} is not JSON: {error}") from error
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise TeacherError(f"{file} is not a list of token ids", hint="write [0, 1, ...], sorted")
    return VocabSubset(ids)


def weights_sha256(source: Path, *, seed: int) -> str:
    """Hash of everything in a checkpoint that decides its answers."""
    files = [source]
    if source.is_dir():
        files = sorted(f for pattern in _HASHED for f in source.glob(pattern))
    whole = hashlib.sha256(b"" if source.is_dir() else f"random {seed}".encode())
    for file in files:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        whole.update(f"{file.name} {digest}\n".encode())
    return whole.hexdigest()


def load_model(
    source: Path, *, dtype: torch.dtype, device: str, seed: int, options: dict[str, Any]
) -> tuple["PreTrainedModel", str]:
    """The network, ready to score, and how its weights were stored.

    Args:
        source: A checkpoint folder, or a `.json` config whose weights are then drawn at random.
        dtype: To compute in.
        device: "cpu", "cuda" or "cuda:N".
        seed: Of the random weights of a bare config.
        options: Passed on to transformers: implementations of attention and of the experts.

    Raises:
        TeacherError: If transformers cannot build the model, or the folder lacks some weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    _require_device(device)
    logging.disable_progress_bar()
    # Said outright, or transformers asks on the terminal whether to run code of the folder's own.
    no_code = {"trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(source, **no_code)
        if source.is_file():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
            return model.to(device).eval(), "none"
        quantization = _quantization(config)
        if quantization == "mxfp4":
            # Widening MXFP4 is exact, and the packed form needs kernels that few machines have.
            from transformers.utils.quantization_config import Mxfp4Config

            options = {**options, "quantization_config": Mxfp4Config(dequantize=True)}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **no_code,
            **options,
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise TeacherError(
            f"transformers cannot load the teacher from {source}: {reason}",
            hint="a folder with config.json and safetensors weights is expected",
        ) from error
    finally:
        logging.enable_progress_bar()
    model, report = loaded
    _require_complete(report, source)
    return model.to(device).eval(), quantization


def _require_complete(report: dict[str, Any], source: Path) -> None:
    """transformers fills gaps with random numbers and goes on; a teacher must not."""
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs"):
        if report.get(what):
            first = sorted(map(str, report[what]))[0]
            raise TeacherError(
                f"teacher {source} does not fit its own config: {len(report[what])} "
                f"{what.replace('_', ' ')}, first {first}",
                hint="the folder is incomplete or holds another model; copy it again",
            )


def _quantization(config: Any) -> str:
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return "none"
    return str(settings["quant_method"] if isinstance(settings, dict) else settings.quant_method)


def _require_device(device: str) -> None:
    if device == "cpu":
        return
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(device.partition(":")[2] or 0)
    if index >= present:
        raise TeacherError(
            f"teacher.device is {device!r}, and this machine's torch sees {present} GPUs",
            hint="set teacher.device = cpu, or install a CUDA build of torch",
        )


def output_head(model: "PreTrainedModel") -> nn.Linear:
    """The layer that turns final hidden states into logits.

    Raises:
        TeacherError: If the model has none, or an unusual one.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise TeacherError(
            f"{type(model).__name__} has no linear output head (it has {type(head).__name__})",
            hint="give a causal language model",
        )
    return head


def require_vocab(model: "PreTrainedModel", subset: VocabSubset | None, source: Path) -> str:
    """SHA-256 of the vocabulary that teacher and student share.

    Raises:
        TeacherError: If the teacher's output has another number of rows than the vocabulary, or
            its tokenizer gives Harmony's special tokens other ids.
    """
    rows = output_head(model).weight.shape[0]
    expected = VOCAB_SIZE if subset is None else len(subset)
    if rows != expected:
        named = "o200k Harmony" if subset is None else VOCAB_IDS_FILE
        raise TeacherError(
            f"teacher and student vocabularies differ: {rows:,} and {expected:,} ({named})",
            hint="only teachers that share the o200k Harmony vocabulary can score its ids",
        )
    if subset is not None:
        return subset.sha256
    tokenizer = source / "tokenizer.json"
    if source.is_dir() and tokenizer.exists():
        added = json.loads(tokenizer.read_text(encoding="utf-8")).get("added_tokens", [])
        ids = {token["content"]: token["id"] for token in added}
        for text, token_id in SPECIAL_TOKENS.items():
            if ids.get(text) != token_id:
                raise TeacherError(
                    f"the teacher's tokenizer has id {ids.get(text)} for {text}, Harmony has "
                    f"{token_id}",
                    hint="only teachers that share the o200k Harmony vocabulary can score its ids",
                )
    return O200K_SHA256


@torch.inference_mode()
def require_plain_head(model: "PreTrainedModel", subset: VocabSubset | None) -> None:
    """Refuse a model whose logits are not simply final hidden states times the head's weight.

    Scoring skips the model's own head to avoid the logits of whole sequences. Soft-capped, scaled
    or biased logits would then be silently wrong, so the two paths are compared once.

    Raises:
        TeacherError: If they differ.
    """
    ids = torch.tensor([START, USER, MESSAGE, START])
    tokens = ids if subset is None else torch.from_numpy(subset.row_of)[ids].clamp_min(0)
    head = output_head(model)
    seen: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        tokens = tokens[None].to(model.device)
        logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        hook.remove()
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    plain = nn.functional.linear(seen[0], head.weight)
    same_head = torch.allclose(plain.float(), logits.float(), rtol=1e-5, atol=1e-5)
    # Two forwards on a GPU may add up the experts in another order.
    same_hidden = torch.allclose(hidden.float(), seen[0].float(), rtol=5e-2, atol=5e-2)
    if not (same_head and same_hidden):
        raise TeacherError(
            f"{type(model).__name__} changes its hidden states or logits around the head (soft "
            "cap, scale or bias)",
            hint="such a teacher cannot be scored by head; choose another one",
        )
