"""The fields of requests: which of them llama.cpp's server reads. It says nothing about those that it does not."""

from __future__ import annotations

from collections.abc import Mapping

NOT_SUPPORTED = {
    "functions": " (use tools)",
    "function_call": " (use tool_choice)",
    "audio": "",
    "web_search_options": "",
}
"""Fields without which a response would not be what the request asks for, and what to use instead."""

_GENERATION = frozenset(
    [
        "adaptive_decay", "adaptive_target", "backend_sampling", "cache_prompt", "dry_allowed_length", "dry_base",
        "dry_multiplier", "dry_penalty_last_n", "dry_sequence_breakers", "dynatemp_exponent", "dynatemp_range",
        "frequency_penalty", "grammar", "grammar_lazy", "grammar_triggers", "id_slot", "ignore_eos", "json_schema",
        "logit_bias", "logprobs", "lora", "max_completion_tokens", "max_tokens", "min_keep", "min_p", "mirostat",
        "mirostat_eta", "mirostat_tau", "model", "n", "n_cmpl", "n_discard", "n_indent", "n_keep", "n_predict",
        "n_probs", "post_sampling_probs", "presence_penalty", "preserved_tokens", "repeat_last_n", "repeat_penalty",
        "response_fields", "return_progress", "return_tokens", "samplers", "seed", "sse_ping_interval", "stop",
        "stream", "stream_options", "t_max_predict_ms", "temperature", "timings_per_token", "top_k",
        "top_n_sigma", "top_p", "typical_p", "xtc_probability", "xtc_threshold",
    ]
)  # fmt: skip
_CHAT = frozenset(
    [
        "add_generation_prompt", "chat_template_kwargs", "continue_final_message", "messages", "parallel_tool_calls",
        "parse_tool_calls", "reasoning_budget_message", "reasoning_budget_tokens", "reasoning_format",
        "response_format", "thinking_budget_tokens", "tool_choice", "tools", "top_logprobs",
    ]
)  # fmt: skip
_READ = {
    "/v1/chat/completions": _GENERATION | _CHAT,
    "/v1/completions": _GENERATION | {"prompt", "echo", "best_of", "suffix"},  # the last are refused
    "/v1/embeddings": frozenset(["input", "content", "model", "encoding_format", "embd_normalize"]),
    "/apply-template": _GENERATION | _CHAT,
    "/tokenize": frozenset(["content", "add_special", "parse_special", "with_pieces", "model"]),
    "/detokenize": frozenset(["tokens", "model"]),
}
# Of OpenAI's API, about an account or the speed of its servers: no answer would be another one.
_WITHOUT_MEANING = frozenset(
    [
        "metadata", "modalities", "prediction", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
        "service_tier", "store", "user",
    ]
)  # fmt: skip


def unused_fields(path: str, request: Mapping[str, object]) -> list[str]:
    """Return the fields of a request that have no effect, although its author may believe so.

    Args:
        path: where it goes.
        request: its JSON object.
    """
    known = _READ[path] | _WITHOUT_MEANING
    return [name for name, value in request.items() if value is not None and name not in known]
