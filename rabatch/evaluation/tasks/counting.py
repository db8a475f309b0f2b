"""Common and frequent words (RULER, arXiv 2404.06654, section 3.3): answers that depend on the whole context."""

from __future__ import annotations

from itertools import count
from random import Random

from rabatch.demo.grammar import ALL_WORDS, SYLLABLES
from rabatch.evaluation.tasks.base import Request, Task, TaskQuestion

COMMON, COMMON_TIMES, OTHER_TIMES = 10, 30, 3
FREQUENT, ALPHA = 3, 2.0


def _common(request: Request) -> tuple[str, tuple[TaskQuestion, ...]]:
    """A numbered list of words, ten of which come thirty times and the others three times."""
    rng = request.rng
    plain = sorted({word for word in ALL_WORDS if word.isalpha() and word.islower()})
    rng.shuffle(plain)
    common, others = plain[:COMMON], plain[COMMON:]
    times = COMMON_TIMES
    while times > OTHER_TIMES + 1 and _listed(request, common * times) > request.tokens * 0.8:
        times -= 1  # a short context has no room for thirty
    listed = common * times
    for number in count():
        word = others[number] if number < len(others) else _coined(rng, 3)
        if _listed(request, listed) + OTHER_TIMES * request.count_tokens(f" 999. {word}") > request.tokens:
            break
        listed += [word] * OTHER_TIMES
    rng.shuffle(listed)
    text = " ".join(f"{number}. {word}" for number, word in enumerate(listed, start=1))
    asked = f"Which {COMMON} words are the most common in the list?"
    return text, (TaskQuestion(asked, tuple(common), ", ".join(common), max_new_tokens=120),)


def _listed(request: Request, listed: list[str]) -> int:
    """Tokens of a list, by its length so far: numbering every word anew would be slow."""
    per_word = request.count_tokens(" 999. " + " 999. ".join(listed[:50])) / max(1, len(listed[:50]))
    return round(per_word * len(listed))


def _frequent(request: Request) -> tuple[str, tuple[TaskQuestion, ...]]:
    """Coined words whose number falls with the square of their rank (zeta distribution with exponent 2)."""
    rng = request.rng
    ranked: list[str] = []
    while len(ranked) < 200:
        word = _coined(rng, 2)
        if word not in ranked:
            ranked.append(word)
    per_word = request.count_tokens(" " + " ".join(ranked)) / len(ranked)
    total = max(1, int(request.tokens / per_word))
    scale = sum((rank + 1) ** -ALPHA for rank in range(len(ranked)))
    drawn = [word for rank, word in enumerate(ranked) for _ in range(round(total * (rank + 1) ** -ALPHA / scale))]
    rng.shuffle(drawn)
    best = ranked[:FREQUENT]
    asked = "Which three words are the most frequent in the text?"
    return " ".join(drawn), (TaskQuestion(asked, tuple(best), ", ".join(best), max_new_tokens=50),)


def _coined(rng: Random, syllables: int) -> str:
    return "".join(rng.choice(SYLLABLES) for _ in range(syllables)).lower()


COUNTING = (
    Task("cwe", _common, "the ten most common words of a list", 1),
    Task("fwe", _frequent, "the three most frequent coined words", 1),
)
