"""`lm_eval --model bmojo`: models of this family in the LM Evaluation Harness.

    lm_eval --model bmojo --model_args pretrained=runs/mine --tasks lambada_openai --batch_size 8

In Python, `lm_eval.simple_evaluate(model="bmojo", ...)` knows the name once this module is imported. See
docs/lm-eval.md.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bmojo.config import ModelConfig
from bmojo.data.tokenizers import FileTokenizer, find_tokenizer
from bmojo.errors import CheckpointError, ConfigError, DataError, MissingPackageError

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from tqdm import tqdm
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
except ImportError as error:
    raise MissingPackageError(
        f"lm_eval --model bmojo needs the package {(error.name or 'lm_eval').partition('.')[0]}: "
        "pip install 'bmojo[eval]'"
    ) from error

from bmojo.hf import BMojoByteTokenizer, BMojoCache

logger = logging.getLogger(__name__)

SEGMENT = 1024  # tokens of a call; bounds the memory that the logits of a long document take
UNLIMITED = 2**40  # tokens
ROWS_ON_CPU = 8


@register_model("bmojo")
class HarnessLM(HFLM):
    """lm_eval's model for Transformers, where batches keep their mask and texts their length.

    - Rows of unequal length are padded on the left and masked, in `loglikelihood`, `loglikelihood_rolling` and
      `generate_until`: a row gets in any batch what it gets alone.
    - Whatever the length of a text, it is read whole, in calls of SEGMENT tokens with the memory carried. With
      `max_length`, the tokens before the last `max_length` are cut off, as lm_eval does for models with a limit.
    - What a tokenizer without BOS and EOS gives for an empty context, or before a document, is a line feed, or
      `prefix_token_id`; generation then ends at the task's stop strings and its length alone.
    - `batch_size=auto` tries out how many rows fit a GPU's memory; on a CPU it is ROWS_ON_CPU.

    `pretrained`: a model, or a folder of `bmojo train` (the run's or the model's) or of `save_pretrained`. Its
    tokenizer is, in this order, `tokenizer`, the one that `save_pretrained` put there, the nearest tokenizer.json of
    the model's vocabulary size in the folder or up to LEVELS above (its own folder's may be smaller: vocabularies are
    padded), and bytes if that size is 256. `device`: the GPU if there is one. Other keywords are HFLM's.
    Raises CheckpointError if the folder is missing, foreign or without a tokenizer of the model's size.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(pretrained, str):
            folder, config = _open(Path(pretrained))
            pretrained, tokenizer = str(folder), tokenizer or _find_tokenizer(folder, config.vocab_size)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained, tokenizer=tokenizer, device=device, **{"backend": "causal", **kwargs})
        if self.tokenizer.vocab_size > self.config.vocab_size:
            raise CheckpointError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens, the model {self.config.vocab_size}; "
                "name the one that the model was trained with: tokenizer=FOLDER"
            )

    @property
    def max_length(self) -> int:
        return self._max_length or UNLIMITED

    @property
    def prefix_token_id(self) -> int:
        given = super().prefix_token_id
        return self.tokenizer.encode("\n", add_special_tokens=False)[-1] if given is None else given

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> Any:
        """The text of tokens; that of the end-of-text token of a tokenizer that has none (None) is None."""
        return None if tokens is None else super().tok_decode(tokens, skip_special_tokens)

    def _detect_batch_size(self, requests: Sequence | None = None, pos: int = 0) -> int:
        """The most rows of the longest call, a segment, that fit; memory that a CPU lacks can't be tried for safely."""
        if self.device.type == "cpu":
            return min(ROWS_ON_CPU, self.max_batch_size)
        return super()._detect_batch_size([(None, [0] * min(SEGMENT, self.max_length), [0])])

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """(log p(continuation | context), is it the greedy one) of each request (texts, context, continuation).

        Requests that differ in their last token alone, such as the letters of a multiple choice, are read once.
        """
        rows: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            rows.setdefault(self._input(context, continuation), []).append(i)
        longest_first = sorted(rows, key=len, reverse=True)
        size = override_bs or self.batch_size
        size = self._detect_batch_size() if size == "auto" else int(size)
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="loglikelihood") as progress:
            for start in range(0, len(rows), size):
                batch = longest_first[start : start + size]
                scored = max(len(requests[i][2]) for row in batch for i in rows[row])
                for row, *scores in zip(batch, *self._score(batch, scored), strict=True):
                    for i in rows[row]:
                        texts, _, continuation = requests[i]
                        answers[i] = _answer(continuation, *scores)
                        if texts is not None:
                            self.cache_hook.add_partial("loglikelihood", texts, answers[i])
                    progress.update(len(rows[row]))
        return [answers[i] for i in range(len(requests))]

    def _input(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """The tokens to read for a request: all but the last, less what is beyond `max_length`."""
        if not 0 < len(continuation) <= self.max_length:
            raise DataError(
                f"a continuation must have between 1 and max_length ({self.max_length}) tokens, got {len(continuation)}"
            )
        tokens = (context + continuation)[:-1]
        if not tokens:
            raise DataError("a continuation of one token needs a context of at least one: the prefix token will do")
        if len(tokens) > self.max_length:
            logger.warning("%d tokens are more than max_length=%d; the first are cut off", len(tokens), self.max_length)
        return tuple(tokens[-self.max_length :])

    def _score(self, rows: list[tuple[int, ...]], scored: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the model thought of the last tokens of each row, and of what comes next.

        Returns log p [batch, n] of the last n >= scored - 1 tokens of each row, whether each was the likeliest
        [batch, n], and the log p [batch, vocab_size] of every token after the row.
        """
        width = max(map(len, rows))
        tokens = torch.tensor([(0,) * (width - len(row)) + row for row in rows], device=self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        mask = torch.arange(width, device=self.device) >= width - lengths[:, None]
        cache = None
        found, likeliest = [], []
        for start in range(0, width, SEGMENT):
            end = min(start + SEGMENT, width)
            keep = max(1, end - max(start, width - scored))
            out = self._read(tokens[:, start:end], mask[:, :end], cache, logits_to_keep=keep, use_cache=end < width)
            cache = out.past_key_values
            dtype = self.softmax_dtype or torch.promote_types(out.logits.dtype, torch.float32)
            log_p = F.log_softmax(out.logits, -1, dtype=dtype)
            seen = tokens[:, end - keep + 1 : end + 1]
            known = log_p[:, : seen.shape[1]]
            found.append(known.gather(-1, seen[..., None])[..., 0])
            likeliest.append(known.argmax(-1) == seen)
        return torch.cat(found, 1), torch.cat(likeliest, 1), log_p[:, -1]

    def _read(self, tokens: Tensor, mask: Tensor | None, cache: BMojoCache | None = None, **kwargs: Any) -> Any:
        with (
            torch.no_grad(),
            torch.autocast(
                self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
            ),
        ):
            return self.model(input_ids=tokens, attention_mask=mask, past_key_values=cache, **kwargs)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits [batch, time, vocab_size] of `inps` [batch, time]; False in `attn_mask`: padding."""
        if labels is not None:
            raise ConfigError("labels belong to encoder-decoder models; leave them out")
        return self._read(inps, attn_mask, use_cache=False).logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """`context` [batch, time], padded where `attention_mask` is 0, and what follows it."""
        mask = generation_kwargs.get("attention_mask")
        if mask is not None:  # lm_eval gives a tokenizer without a padding token one, beyond the vocabulary
            context = context.masked_fill(mask == 0, 0)
        return super()._model_generate(context, max_length, stop, **generation_kwargs)


def _answer(continuation: list[int], found: Tensor, likeliest: Tensor, after: Tensor) -> tuple[float, bool]:
    """Of one row: its score and greediness, from those of its tokens and of the one after (`HarnessLM._score`)."""
    before, last = len(found) - (len(continuation) - 1), continuation[-1]
    score = found[before:].double().sum() + after[last].double()
    return float(score), bool(likeliest[before:].all()) and int(after.argmax()) == last


def _open(path: Path) -> tuple[Path, ModelConfig]:
    """The model folder of a run or model folder, and its configuration."""
    folder = path / "model" if (path / "model").is_dir() else path
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"no bmojo model at {path}: expected a folder of `bmojo train` or save_pretrained, with a config.json"
        )
    return folder, ModelConfig.read(file)


def _find_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model; None: the one that AutoTokenizer finds in the folder."""
    if (folder / "tokenizer_config.json").is_file():
        return None
    found = find_tokenizer(folder, vocab_size)
    if isinstance(found, FileTokenizer):
        return PreTrainedTokenizerFast(tokenizer_file=str(found.path), name_or_path=str(found.path.parent))
    return BMojoByteTokenizer()
