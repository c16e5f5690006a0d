"""The model card of a result, in the hub's format: what it is, how it was trained, how to use it."""

from __future__ import annotations

from typing import Literal

from kolotune.base_models import catalog
from kolotune.foundation.formatting import format_size
from kolotune.run_folder.manifest import Manifest
from kolotune.run_folder.records import FileHash
from kolotune.stages.prepare import noun_of

ResultKind = Literal["adapter", "merged", "gguf"]
# For each kind: the library that loads it, its relation to the base model, and a description.
_KINDS: dict[ResultKind, tuple[str, str, str]] = {
    "adapter": ("peft", "adapter", "A LoRA adapter in PEFT format"),
    "merged": ("transformers", "finetune", "Base model and adapter merged, in transformers format"),
    "gguf": ("gguf", "quantized", "Base model and adapter merged, as GGUF for llama.cpp and Ollama, with Modelfiles"),
}


def make_model_card(manifest: Manifest, repository: str, kind: ResultKind, files: dict[str, FileHash]) -> str:
    """Return the README.md of a repository; it contains no chats and no path of this machine.

    Args:
        manifest: of the run.
        repository: its name on the hub, ``owner/name``.
        kind: the result in it.
        files: size and sha256 of the other files, by name.
    """
    from huggingface_hub import ModelCardData

    library, relation, _ = _KINDS[kind]
    name = manifest.base.name
    known = catalog.find_known(name)
    base = catalog.hub_id(name) or None
    data = ModelCardData(
        base_model=base,
        base_model_relation=relation if base else None,
        library_name=library,
        license=known.license if known else None,
        pipeline_tag="text-generation",
        tags=["kolotune", "lora", "sft", "conversational", *(["gguf", "ollama"] if kind == "gguf" else [])],
    )
    sections = [_title(manifest, repository, kind), _training(manifest), _usage(repository, kind, base, files)]
    return "\n".join([f"---\n{data.to_yaml()}\n---\n", *sections, _files(files)])


def _title(manifest: Manifest, repository: str, kind: ResultKind) -> str:
    base = catalog.hub_id(manifest.base.name)
    base_link = f"[{base}](https://huggingface.co/{base})" if base else "a model that is not on the hub"
    texts = "plain text" if manifest.config.get("objective") == "text" else "chats"
    version = manifest.versions.get("kolotune", "")
    return (
        f"# {repository.partition('/')[2]}\n\n"
        f"{_KINDS[kind][2]}. The base model is {base_link}, fine-tuned on {texts} with kolotune {version}.\n"
    )


def _training(manifest: Manifest) -> str:
    counts, config = manifest.data.counts, manifest.config
    facts = manifest.facts_of("train")
    if not facts:
        return "## Training\n\nThe adapter was trained elsewhere.\n"
    where = "are in answers and " if noun_of(counts) == "chat" else ""
    rows = [
        (f"{noun_of(counts)}s", f"{counts.get('chats')}, and {counts.get('held_out_chats')} held out"),
        (
            "tokens",
            f"{counts.get('tokens')}, of which {counts.get('labelled_tokens')} {where}count in the loss",
        ),
        ("epochs, steps", f"{config.get('epochs')}, {facts.get('steps')}"),
        (
            "LoRA",
            f"rank {config.get('lora_rank')}, alpha {config.get('lora_alpha')}, dropout {config.get('lora_dropout')}"
            + (", rank-stabilised" if config.get("use_rslora") else "")
            + (", with magnitudes (DoRA)" if config.get("use_dora") else "")
            + (f", started by {start}" if (start := config.get("init_lora_weights", "default")) != "default" else ""),
        ),
        ("layers", ", ".join(modules) if isinstance(modules := config.get("target_modules"), list) else ""),
        ("objective", str(config.get("objective", "sft"))),
        ("learning rate", f"{config.get('learning_rate')}, {config.get('scheduler_type')}"),
        ("longest chat", f"{config.get('max_seq_length')} tokens"),
        ("dtype, device", f"{config.get('dtype')} base model, {facts.get('device')}"),
        ("seed", str(config.get("seed"))),
    ]
    if "held_out_loss" in facts:
        rows.append(
            ("held-out loss", f"{facts.get('first_held_out_loss', 0):.4f} before, {facts['held_out_loss']:.4f} after")
        )
    if "held_out_accuracy" in facts:
        before, after = facts.get("first_held_out_accuracy", 0), facts["held_out_accuracy"]
        rows.append(("held-out accuracy", f"{before:.0%} before, {after:.0%} after"))
    if "held_out_loss" not in facts and "final_loss" in facts:
        rows.append(("loss at the last step", f"{facts['final_loss']:.4f}"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"## Training\n\n| | |\n|---|---|\n{table}\n"


def _usage(repository: str, kind: ResultKind, base: str | None, files: dict[str, FileHash]) -> str:
    if kind == "gguf":
        modelfile = next((name for name in sorted(files, reverse=True) if name.startswith("Modelfile")), "Modelfile")
        return (
            "## Use with Ollama\n\n```\n"
            f"hf download {repository} --local-dir model\n"
            f"cd model && ollama create my-model -f {modelfile}\n"
            "ollama run my-model\n```\n\n"
            "The Modelfile contains the chat template that was used in training, and its stop sequences.\n"
        )
    if kind == "merged":
        code = (
            "from transformers import pipeline\n\n"
            f'chat = pipeline("text-generation", "{repository}")\n'
            'print(chat([{"role": "user", "content": "Hello!"}])[0]["generated_text"][-1]["content"])'
        )
    else:
        code = (
            "from peft import PeftModel\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{base or "the base model"}")\n'
            f'model = PeftModel.from_pretrained(base, "{repository}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{repository}")'
        )
    ollama = f"hf download {repository} --local-dir model && kolotune export model"
    if kind == "adapter" and base:
        ollama += f" --base {base}"
    return (
        f"## Use\n\n```python\n{code}\n```\n\n"
        f"## Use with Ollama\n\n```\n{ollama}\n"
        "cd outputs && ollama create my-model -f ModelfileQ4_K_M\nollama run my-model\n```\n"
    )


def _files(files: dict[str, FileHash]) -> str:
    rows = "\n".join(
        f"| `{name}` | {format_size(file.size)} | `{file.sha256}` |" for name, file in sorted(files.items())
    )
    return f"## Files\n\n| file | size | sha256 |\n|---|---|---|\n{rows}\n"
