"""Synthetic text that repeats exactly where it should: a block's words are a function of the block's name alone.

Every word is one token in the byte-pair vocabularies of today's models (checked for SmolLM2's), and stands with the space
before it, so that n words are n tokens wherever they are put together. Other tokenizers are measured (`tokens_per_word`).
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import shake_256

_WORDS = """
that with from this have your their cont they will which more other about were also into these some self when time under there
than over know people like year been help what would need through work include most many used only first child system between
learn where could health should well every high world even form water sign just make years data then result those each because
effect while process during found long after return read using part lead fact test life very being find right person back both
follow grow much main great food start good might school within class often around made said show same power design provide
again small allow serv care less example down take support quest human treat state called point number build play though body
must plan common want three cell pass social real public still change better hand another report place present project list
feel light become energy open mean keep others best include direct name history create happen perform home stand move among
mark look things type large think group means rest control here animal several women pain area family object current program
early focus access last success making certain period land blood case since local head post along value order come text across
cost times areas cause able toward problem systems view major course model else press hard line tool special species future
natural plant complex role until second country young works always suggest exist levels step today given strong little results
range ways book next four similar short working past space sing amount free concept heart later author says needs words give
paper kind mind improve skills field begin parent expect cells
"""
VOCABULARY = tuple(dict.fromkeys(word for word in _WORDS.split() if word not in ("cont", "serv", "quest")))[:256]

#: characters of written blocks that are kept; a conversation's prompts repeat nearly all of theirs
_KEPT_CHARACTERS = 64 << 20


class Writer:
    """Writes blocks. `seed` makes another run's blocks different; `tokens_per_word` corrects lengths for odd tokenizers."""

    def __init__(self, seed: str, tokens_per_word: float = 1.0) -> None:
        self.seed, self.tokens_per_word = seed, tokens_per_word
        self._kept: OrderedDict[tuple[str, int], str] = OrderedDict()
        self._characters = 0

    def block(self, name: str, tokens: int) -> str:
        """`tokens` tokens of the text called `name`; a shorter one is the beginning of a longer one."""
        found = self._kept.get((name, tokens))
        if found is None:
            found = self._kept[name, tokens] = self._write(name, tokens)
            self._characters += len(found)
            while self._characters > _KEPT_CHARACTERS:
                self._characters -= len(self._kept.popitem(last=False)[1])
        return found

    def _write(self, name: str, tokens: int) -> str:
        words = max(0, round(tokens / self.tokens_per_word))
        digest = shake_256(f"{self.seed}/{name}".encode()).digest(words)
        return "".join(map(_SPACED.__getitem__, digest))


_SPACED = tuple(f" {word}" for word in VOCABULARY)


def tokens_per_word(token_count: int) -> float:
    """From how many tokens a tokenizer makes of `sample()`."""
    return token_count / len(VOCABULARY)


def sample() -> str:
    """Every word once."""
    return "".join(_SPACED)
