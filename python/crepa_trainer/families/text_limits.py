"""How much of a caption a family's text encoders read: what is behind that trains nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CLIP_TOKENS = 77  # by the pipelines that have it beside another encoder


@dataclass(frozen=True)
class CutText:
    """A text of `tokens` tokens, of which the encoder behind `tokenizer` reads `limit`; `name`: what it is called."""

    name: str
    tokenizer: str
    tokens: int
    limit: int


class TextLimits(ABC):
    """The part of a training family that counts tokens, with the pipeline's own tokenizers and no weights."""

    model: str

    @property
    @abstractmethod
    def text_limits(self) -> Mapping[str, int]:
        """Tokens of a text that are read, by the tokenizer's part: with marks of its ends, without an instruction."""

    def token_count(self, tokenizer: Any, part: str, prompt: str) -> int:
        """How many tokens of a prompt, as the pipeline gives it to the encoder, count against `text_limits[part]`."""
        return tokens(tokenizer, prompt)

    def load_tokenizer(self, part: str) -> Any:
        """Of a processor of texts and images too the texts' part alone: the rest needs torchvision."""
        import transformers

        return transformers.AutoTokenizer.from_pretrained(self.model, subfolder=part)

    def cut_texts(self, texts: Mapping[str, str]) -> list[CutText]:
        """Those of `texts`, prompts by what they are called, that are longer than what is read of them."""
        cut = []
        for part, limit in self.text_limits.items():
            tokenizer = self.load_tokenizer(part)
            counts = {prompt: self.token_count(tokenizer, part, prompt) for prompt in dict.fromkeys(texts.values())}
            cut += [CutText(name, part, counts[text], limit) for name, text in texts.items() if counts[text] > limit]
        return cut


def tokens(tokenizer: Any, text: str) -> int:
    """How many tokens a whole text is, with those that mark its ends."""
    # One by one: a tokenizer that has run in threads complains in every worker that is forked later.
    return len(tokenizer(text, verbose=False).input_ids)
