"""The base's own answers to general prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kolotune.fidelity import general_chats
from kolotune.fidelity.general_chats import GeneralChatsTask, general_prompts, write_general_chats
from kolotune.fidelity.general_set import general_questions
from kolotune.fidelity.reference_model import WholeModel
from kolotune.foundation import config as configs
from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ConfigError, ModelError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOLOTUNE_CACHE", str(tmp_path / "cache"))


def _task(base: Path, folder: Path, count: int) -> Path:
    task = GeneralChatsTask(str(base), "a", str(base), "b", count, str(folder / "general.jsonl"))
    typed_storage.write(folder / "task.json", task)
    return folder / "task.json"


def test_the_general_set_asks_none_of_the_prompts() -> None:
    prompts, questions = general_prompts(), {each.question for each in general_questions()}
    assert len(set(prompts)) == len(prompts) >= 200
    assert not questions & set(prompts)


def test_more_chats_begin_with_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers in the cache are used; the model, which is missing here, is not asked."""
    batches = list(general_chats._batches(60))
    assert [len(batch) for batch in batches] == [16, 16, 16, 12]
    answers = [[f"To {prompt}" if number % 3 else "" for number, prompt in enumerate(batch)] for batch in batches]
    monkeypatch.setattr(general_chats, "_PACKAGES", ())
    written = []
    for count in (5, 10):
        file = _task(tmp_path / "missing", tmp_path, count)
        task = typed_storage.read(GeneralChatsTask, file)
        cache = general_chats._cache_file(task)
        cache.parent.mkdir(parents=True, exist_ok=True)
        typed_storage.write(cache, {"batches": answers})
        write_general_chats(file)
        written.append((tmp_path / "general.jsonl").read_text("utf-8").splitlines())
    assert [len(lines) for lines in written] == [5, 10] and written[1][:5] == written[0]
    user, assistant = json.loads(written[0][0])["messages"]
    assert user["content"] in general_prompts() and assistant["content"] == f"To {user['content']}"


def test_a_base_that_never_ends_its_answers(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="of 6 answers to general prompts, the base ended 0"):
        write_general_chats(_task(tiny_base, tmp_path, 1))
    assert not (tmp_path / "general.jsonl").exists()


def test_a_seed_decides_what_is_sampled(tiny_base: Path) -> None:
    model = WholeModel(tiny_base)
    first, same, other = (model.sampled_answers([[5, 6], [7]], 2, 8, seed) for seed in (1, 1, 2))
    assert first == same != other
    assert first[0] != model.answers([[5, 6]], 2, 8)[0]


@pytest.mark.parametrize("objective", ["text", "dpo", "kto"])
def test_objectives_without_answers_are_refused(objective: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep-general"):
        configs.resolve(({"keep_general": 10, "objective": objective}, "test", tmp_path))
