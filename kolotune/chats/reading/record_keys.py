"""The names that data sets give to the parts of a chat: every key of a record that is read, as tables.

Names are compared in canonical form (`canonical`), so that "System Prompt" and "system_prompt" are one name.
"""

from __future__ import annotations

from enum import StrEnum
from functools import lru_cache


class RecordPart(StrEnum):
    """A part of a chat that a record may have a key for; the value is its name for ``--map``."""

    TURNS = "messages"
    QUESTION = "question"
    ANSWER = "answer"
    CONTEXT = "context"
    SYSTEM = "system"
    REASONING = "reasoning"
    TOOLS = "tools"
    HISTORY = "history"
    CHOICES = "choices"
    DOCUMENTS = "documents"
    CHOSEN = "chosen"
    REJECTED = "rejected"
    LABEL = "label"
    TEXT = "text"


TURN_LISTS = (
    "messages", "conversations", "conversation", "chat", "dialog", "dialogue", "turns", "contents", "items", "data",
    "chat_messages",
)  # fmt: skip
"""Keys of a list of turns, or of a text with turns; the first that is filled is read."""

PAIRS = {
    "instruction": ("output", "response", "answer", "completion"),
    "prompt": ("completion", "response", "output", "answer", "llm_response"),
    "question": (
        "answer", "response", "solution", "generated_solution", "answerkey", "answers", "output", "correct_answer",
        "reference_answer",
    ),
    "query": ("response", "answer", "answers", "output"),
    "problem": ("solution", "generated_solution", "answer", "response"),
    "input": ("output", "response", "target"),
    "input_text": ("output_text",),
    "inputs": ("targets", "outputs"),
    "user": ("assistant",),
    "human": ("assistant", "bot", "gpt"),
    "message_1": ("message_2",),
}  # fmt: skip
"""Keys of a question, each with the keys of its answer; the first pair that is filled is read."""

COMPANIONS = {
    RecordPart.SYSTEM: (
        "system", "system_prompt", "system_message", "system_instruction", "systeminstruction", "systemprompt",
        "sys_prompt", "meta_instruction",
    ),
    RecordPart.CONTEXT: ("input", "context"),
    RecordPart.REASONING: (
        "reasoning_content", "reasoning", "thinking", "thought", "thoughts", "think", "chain_of_thought", "cot",
        "complex_cot", "rationale",
    ),
    RecordPart.TOOLS: ("tools", "functions", "available_tools"),
    RecordPart.HISTORY: ("history", "chat_history"),
    RecordPart.CHOICES: ("choices", "options"),
    RecordPart.DOCUMENTS: ("documents",),
}  # fmt: skip
"""Keys beside a question and its answer. Beside a list of turns, `SYSTEM` and `TOOLS` are read."""

PREFERRED = {
    "chosen": "rejected", "preferred_output": "non_preferred_output", "chosen_response": "rejected_response",
    "response_chosen": "response_rejected", "response_j": "response_k",
}  # fmt: skip
"""Keys of a preferred answer, or of a chat with it, each with the key of the rejected one."""

PROMPTS = (
    "prompt", "instruction", "question", "query", "problem", "input", "user", "messages", "conversations",
    "conversation", "trajectory",
)  # fmt: skip
"""Keys of the prompt beside two answers, as a text or as turns; the first that is filled is read."""

REJECTED_BESIDE = ("rejected_response", "rejected_messages")
"""Keys of a rejected answer, or chat, beside a chat with the preferred one."""

LABELS = ("label", "kto_tag", "desirable")
"""Keys that say whether an answer is good."""

LOSS_KEYS = {
    "weight": True, "weights": True, "loss": True, "loss_mask": True, "loss_masks": True, "loss_weight": True,
    "loss_scale": True, "train": True, "training": True, "trainable": True, "is_trained": True, "train_mask": True,
    "train_on_turn": True, "kto_tag": True, "mask": False, "masked": False,
}  # fmt: skip
"""Keys that say whether a turn or a record is trained on, and whether a true value says so."""

WEIGHT_KEYS = frozenset({"weight", "weights", "loss_mask", "loss_masks", "loss_weight", "loss_scale"})
"""Those of `LOSS_KEYS` whose value may be a fraction."""

MEDIA = frozenset({"image", "images", "video", "videos", "audio", "audios"})
"""Keys of what is no text; a filled one can't be trained on."""

METADATA = frozenset({
    "id", "_id", "idx", "index", "uid", "uuid", "hash", "prompt_id", "message_id", "conversation_id", "chat_id",
    "source", "source_dataset", "dataset", "data_source", "subset", "split", "category", "categories", "topic",
    "topics", "sub_topic", "subtopic", "tag", "tags", "type", "task", "task_type", "domain", "subject",
    "language", "lang", "url", "link", "title", "author", "license", "model", "model_name", "generator",
    "created", "created_at", "updated", "updated_at", "create_time", "update_time", "timestamp", "name", "account",
    "user_id", "question_id", "problem_id", "date", "version", "score", "rating", "quality", "difficulty",
    "level", "length", "num_turns", "n_turns", "num_tokens", "token_count", "views", "avatarurl", "temperature",
    "top_p", "max_tokens", "seed", "stream", "tool_choice", "parallel_tool_calls", "score_chosen", "score_rejected",
    "chosen_score", "rejected_score", "chosen_rating", "rejected_rating", "chosen_avg_rating", "rejected_avg_rating",
    "chosen_model", "rejected_model", "margin", "", "unnamed:_0", "__index_level_0__",
})  # fmt: skip
"""Keys that describe a record, the row numbers of pandas among them.

They are reported too, but records that differ only there are copies.
"""

ROLE_KEYS = ("role", "from", "speaker", "author", "sender")
CONTENT_KEYS = ("content", "value", "text", "parts", "utterance")
CALL_KEYS = ("tool_calls", "toolcalls", "function_call", "functioncall")
TURN_KEYS = frozenset({
    *ROLE_KEYS, *CONTENT_KEYS, *CALL_KEYS, *LOSS_KEYS, *COMPANIONS[RecordPart.REASONING], "tool_call_id",
})  # fmt: skip
"""Keys of a turn that are read; `name` is read in turns of tools, tool definitions in system turns."""


@lru_cache(4096)
def canonical(key: str) -> str:
    """Return a key as it is compared: in lower case, with underscores."""
    return key.strip().lower().replace(" ", "_").replace("-", "_")


READ_KEYS = frozenset({
    *TURN_LISTS, *PAIRS, *(answer for answers in PAIRS.values() for answer in answers),
    *(key for keys in COMPANIONS.values() for key in keys), *LOSS_KEYS, *MEDIA, *PREFERRED,
    *PREFERRED.values(), *REJECTED_BESIDE, *LABELS,
})  # fmt: skip
"""Keys of a record that may be read."""
