"""Findings about the chats as a whole: all are by_kind, and ordinary chats have none."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kolotune.chats import Chat, Message
from kolotune.chats.dataset.findings import Finding, FindingKind
from kolotune.chats.dataset.near_duplicates import SimilarityReport
from kolotune.chats.dataset.shingles import ChatFeatures
from kolotune.chats.reading.files import read_chats

REPOSITORY = Path(__file__).resolve().parents[4]
SOURCE = Path("chats.jsonl")
WORDS = [f"{first}{second}" for first in "bdfgklmnprst" for second in ("a", "ebo", "imu", "orun", "ula", "yte")]


def chat(question: str, answer: str, line: int = 1, system: str = "") -> Chat:
    turns = (Message("user", question), Message("assistant", answer))
    return Chat((Message("system", system), *turns) if system else turns, SOURCE, line)


def prose(seed: int, count: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def findings(train: list[Chat], held_out: list[Chat] | None = None) -> dict[str, Finding]:
    report = SimilarityReport()
    for each in train:
        report.add(ChatFeatures.of(each), False)
    for each in held_out or []:
        report.add(ChatFeatures.of(each), True)
    return {each.kind: each for each in report.findings()}


def ordinary(count: int, first_line: int = 1) -> list[Chat]:
    return [
        chat(prose(first_line + at, 20), prose(100_000 + first_line + at, 40), first_line + at) for at in range(count)
    ]


def share_of(one: str, other: str) -> float:
    """Return the Jaccard index of the triples of words, in the simplest way."""

    def triples(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return set(zip(words, words[1:], words[2:], strict=False))

    return len(triples(one) & triples(other)) / len(triples(one) | triples(other))


def test_ordinary_chats_and_the_samples_have_no_findings() -> None:
    assert findings(ordinary(300), ordinary(30, 1001)) == {}
    for name in ("examples/lighthouse/chats.jsonl", "kolotune/chats/starter/chats.jsonl"):
        chats = read_chats([REPOSITORY / name]).chats
        assert findings(list(chats[::2]), list(chats[1::2])) == {}


def test_near_duplicates_are_reported_with_both_lines() -> None:
    chats = ordinary(200)
    messages = chats[49].messages
    changed = messages[1].content.upper().replace(" ", ",  ") + "! indeed"
    chats.append(chat(messages[0].content, changed, 201))
    by_kind = findings(chats)
    assert set(by_kind) == {"near_duplicates"}
    assert by_kind["near_duplicates"].count == 1
    assert re.fullmatch(r"chats\.jsonl:201 is nearly chats\.jsonl:50 \(9\d%\)", by_kind["near_duplicates"].locations[0])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 25)), min_size=5, max_size=40))
def test_only_similar_pairs_are_reported(changes: list[tuple[int, int]]) -> None:
    chats = []
    for line, (seed, changed) in enumerate(changes, 1):
        words = prose(seed, 60).split()
        for at in range(changed):
            words[(7 * at) % 60] = f"{line}x{at}"
        chats.append(chat(" ".join(words[:20]), " ".join(words[20:]), line))
    similar = findings(chats).get("near_duplicates", Finding(FindingKind.NEAR_DUPLICATES, 0, 0)).locations
    texts = [[message.content for message in each.messages] for each in chats]
    for line in similar:
        later, earlier = (int(number) - 1 for number in re.findall(r"jsonl:(\d+)", line))
        question, answer = (share_of(texts[later][part], texts[earlier][part]) for part in (0, 1))
        assert max(question, answer) >= 0.8
    identical = {line for line, pair in enumerate(changes) if pair[1] == 0 and pair in changes[:line]}
    assert identical <= {int(re.findall(r"jsonl:(\d+)", line)[0]) - 1 for line in similar}


def test_chats_of_one_pattern_are_not_near_duplicates() -> None:
    """A long instruction before each question, and a system prompt, are common to all and do not count."""
    instruction = prose(1, 80)
    train = [
        chat(f"{instruction} {prose(10 + at, 8)}", prose(5000 + at, 12), at + 1, system=prose(2, 50))
        for at in range(200)
    ]
    held_out = [
        chat(f"{instruction} {prose(7000 + at, 8)}", prose(9000 + at, 12), at + 301, system=prose(2, 50))
        for at in range(20)
    ]
    assert findings(train, held_out) == {}


def test_the_time_stays_linear_when_all_chats_are_nearly_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    exact = SimilarityReport._similarity
    monkeypatch.setattr(SimilarityReport, "_similarity", lambda *args: compared.append(args) or exact(*args))
    groups = [prose(seed, 60) for seed in range(30)]
    chats = [chat(f"{prose(500 + at, 3)}", f"{groups[at % 30]} {at}", at + 1) for at in range(900)]
    by_kind = findings(chats)["near_duplicates"]
    assert by_kind.count == 870
    assert len(compared) < 3 * len(chats)


def test_leaks_are_reported_with_both_lines() -> None:
    train, held_out = ordinary(100), ordinary(10, 501)
    question, answer = train[6].messages[0].content, train[8].messages[1].content
    held_out[2] = chat(question.capitalize() + "?", "Something else altogether.", 503)
    held_out[4] = chat("What then?", answer + " and so on", 505)
    held_out[6] = chat(question + " please say", "No.", 507)
    by_kind = findings(train, held_out)["leaks"]
    assert by_kind.count == 3
    assert by_kind.locations[0] == "chats.jsonl:503 asks the same as chats.jsonl:7"
    assert re.fullmatch(r"chats\.jsonl:505 answers nearly the same \(9\d%\) as chats\.jsonl:9", by_kind.locations[1])
    assert re.fullmatch(r"chats\.jsonl:507 asks nearly the same \(\d\d%\) as chats\.jsonl:7", by_kind.locations[2])


def test_short_answers_on_both_sides_are_no_leak() -> None:
    train = [chat(prose(at, 20), ("yes", "no", "it depends on it")[at % 3], at + 1) for at in range(90)]
    held_out = [chat(prose(2000 + at, 20), "it depends on it", at + 200) for at in range(10)]
    assert "leaks" not in findings(train, held_out)


@pytest.mark.parametrize(
    ("answers", "kind", "count"),
    [
        (lambda at: "I do not know that." if at % 5 == 0 else prose(at, 30), "same_answers", 20),
        (lambda at: f"As a helpful model {prose(at, 9)}" if at % 3 == 0 else prose(at, 9), "same_openings", 34),
        (lambda at: ("positive", "negative")[at % 2], "few_answers", 2),
        (lambda at: f"{prose(at, 2)} {prose(1, 40)} {prose(3 * at, 2)}", "phrased_alike", 100),
    ],
)  # fmt: skip
def test_answers_without_variety(answers: object, kind: str, count: int) -> None:
    chats = [chat(prose(at, 20), answers(at), at + 1) for at in range(100)]  # type: ignore[operator]
    by_kind = findings(chats)
    assert set(by_kind) == {kind}
    assert by_kind[kind].count == count
    if kind == "same_answers":
        assert (by_kind[kind].total, by_kind[kind].example) == (100, "I do not know that.")
        assert "20 of 100 answers (20%)" in by_kind[kind].text
        assert by_kind[kind].locations[:2] == ("chats.jsonl:1", "chats.jsonl:6")


def test_languages_without_spaces_are_compared_too() -> None:
    text = "今日は天気がいいので公園を散歩してから友達と昼ご飯を食べましたそれから図書館で本を三冊借りて家に帰りました"
    by_kind = findings([*ordinary(50), chat("何をしましたか", text, 51), chat("何をしたのですか", text + "。はい", 52)])
    assert by_kind["near_duplicates"].locations[0].startswith("chats.jsonl:52 is nearly chats.jsonl:51")


def test_odd_texts_are_accepted() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    odd = [
        Chat((Message("user", "!!!"), Message("assistant", "…")), SOURCE, 1),
        Chat((Message("user", ""), Message("assistant", "", tool_calls=(call,)), Message("tool", "7")), SOURCE, 2),
        Chat((Message("user", "a\nb"), Message("assistant", "\x1b[31mred\n")), SOURCE, 3),
    ]
    assert findings(odd) == {}
    assert findings([]) == {}


def test_a_chat_takes_a_few_hundred_bytes_of_memory() -> None:
    import tracemalloc

    chats = ordinary(2000)
    report = SimilarityReport()
    report.add(ChatFeatures.of(chats[0]), False)
    report._file.rollover()  # the shingles are on disk, as those of large data
    tracemalloc.start()
    for each in chats[1:]:
        report.add(ChatFeatures.of(each), False)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 200 * len(chats)
