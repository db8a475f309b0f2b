"""The evaluation's tasks: what a context holds, where, and how answers are scored."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from rabatch.demo.corpus import count_tokens
from rabatch.errors import ConfigError
from rabatch.evaluation.scoring import string_match
from rabatch.evaluation.tasks import TASKS, generate
from rabatch.evaluation.tasks.needles import DEPTHS, SEVERAL
from rabatch.evaluation.tasks.tracing import HOPS

RETRIEVING = [name for name in TASKS if name.startswith(("niah", "kv"))]


@pytest.mark.parametrize("name", TASKS)
def test_a_context_is_as_long_as_asked_and_made_by_rule(name: str) -> None:
    made = generate(name, tokens=1024, index=2, seed=5, n_questions=3)
    assert made == generate(name, tokens=1024, index=2, seed=5, n_questions=3)
    # fwe rounds the number of each word, so that its length is only about what is asked
    low, high = (0.8, 1.25) if name == "fwe" else (0.97, 1.1)
    assert low * 1024 <= count_tokens(made.text) <= high * 1024
    assert len(made.questions) == min(3, TASKS[name].most_questions)
    texts = {generate(name, tokens=1024, index=i, seed=s, n_questions=3).text for i, s in ((2, 5), (3, 5), (2, 6))}
    assert len(texts) == 3


@pytest.mark.parametrize("name", TASKS)
def test_the_expected_answer_scores_full_and_nothing_scores_none(name: str) -> None:
    for question in generate(name, tokens=1024, index=0, n_questions=4).questions:
        assert string_match(question.answers, question.expected, question.match) == 1
        assert string_match(question.answers, None, question.match) == 0
        assert all(not string_match([answer], question.question) for answer in question.answers)


@pytest.mark.parametrize("name", RETRIEVING)
def test_needles_stand_once_and_at_their_depths(name: str) -> None:
    made = generate(name, tokens=2048, index=1, n_questions=4)
    for question in made.questions:
        for answer, depth in zip(question.answers, question.depths, strict=True):
            assert made.text.count(answer) == 1
            assert made.text.index(answer) / len(made.text) == pytest.approx(depth, abs=0.05)


def test_the_grid_takes_every_depth_in_turn() -> None:
    depths = [generate("niah_depth", tokens=512, index=i).questions[0].depths[0] for i in range(DEPTHS + 1)]
    assert depths == [*(i / (DEPTHS - 1) for i in range(DEPTHS)), 0.0]
    first, last = (generate("niah_depth", tokens=512, index=i) for i in (0, DEPTHS - 1))
    assert first.text.startswith("The value of key")
    assert last.text.endswith(f"{last.questions[0].expected}.")


def test_keys_values_and_distractors_are_as_many_as_defined() -> None:
    def keys(name: str, n: int = 1) -> Counter[str]:
        return Counter(
            re.findall(r"key (\S+) (?:value \d )?is", generate(name, tokens=1024, index=0, n_questions=n).text)
        )

    assert len(keys("niah_single_2")) == 1
    assert len(keys("niah_multikey_1")) == SEVERAL
    assert list(keys("niah_multivalue").values()) == [SEVERAL]
    assert len(keys("niah_multiquery")) == SEVERAL
    for name in ("niah_multikey_2", "niah_multikey_3"):
        found = keys(name)
        text = generate(name, tokens=1024, index=0).text
        assert len(found) == text.count(". ") + 1
        assert set(found.values()) == {1}


def test_a_chain_can_be_followed_to_its_end() -> None:
    made = generate("vt", tokens=1024, index=0, n_questions=3)
    copies = dict(re.findall(r"copied from variable (\S+) to (\S+)\.", made.text))
    for question in made.questions:
        value = re.search(r"the value (\d+),", question.question)
        assert value is not None
        first = re.search(rf"The value {value[1]} was first given to variable (\S+)\.", made.text)
        assert first is not None
        chain = [first[1]]
        while chain[-1] in copies:
            chain.append(copies[chain[-1]])
        assert tuple(chain) == question.answers
        assert len(chain) == HOPS + 1


def test_common_and_frequent_words_are_the_most_common() -> None:
    cwe = generate("cwe", tokens=4096, index=0)
    counts = Counter(re.findall(r"\d+\. (\S+)", cwe.text))
    assert {word for word, _ in counts.most_common(10)} == set(cwe.questions[0].answers)
    fwe = generate("fwe", tokens=2048, index=0)
    most = Counter(fwe.text.split()).most_common(4)
    assert [word for word, _ in most[:3]] == list(fwe.questions[0].answers)
    assert most[2][1] > most[3][1]


def test_another_tokenizer_says_when_a_context_is_long_enough() -> None:
    by_words = generate("niah_single_2", tokens=512, index=0, count_tokens=lambda text: len(text.split()))
    assert 512 <= len(by_words.text.split()) < 512 + 40


def test_scores_of_parts_and_of_all() -> None:
    assert string_match(["12", "34"], "It is 12.") == 0.5
    assert string_match(["12", "34"], "It is 12.", "part") == 1
    assert string_match(["Oslo"], "in OSLO, I think") == 1
    assert string_match(["Oslo"], "") == 0


@pytest.mark.parametrize(
    ("arguments", "field"),
    [({"task": "niah"}, "task"), ({"tokens": 10}, "tokens"), ({"n_questions": 0}, "n_questions")],
)
def test_errors_name_the_field(arguments: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        generate(**{"task": "vt", "tokens": 512, "index": 0} | arguments)  # type: ignore[arg-type]
    assert raised.value.field == field
