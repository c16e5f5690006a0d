"""The loss of a preference objective and its gradient, as TRL's own trainer computes them.

python trl_preferences.py TASK

It runs in TRL's environment (`trl.txt`). The task is JSON: ``base`` and ``adapter`` are folders; ``objective``,
``beta``, ``gamma``, ``desirable_weight`` and ``undesirable_weight`` as kolotune has them; ``chats`` is a list of
objects with the token ids ``prompt``, ``chosen`` and ``rejected``, or for kto ``prompt``, ``completion``, ``label``,
and ``kl_prompt`` and ``kl_completion``, the mismatched ones. ``out`` receives the gradients, as safetensors, and beside
it the loss, as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

_IGNORED = -100


def main(task: dict[str, Any]) -> None:
    """Compute one loss and its gradient."""
    torch.set_num_threads(1)
    base = transformers.AutoModelForCausalLM.from_pretrained(task["base"], dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, task["adapter"], is_trainable=True)
    words = Tokenizer(WordLevel({str(index): index for index in range(base.config.vocab_size)}, unk_token="0"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="0", eos_token="2", bos_token="1", unk_token="0"
    )
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": folder, "beta": task["beta"], "use_cpu": True, "report_to": [], "bf16": False,
            "per_device_train_batch_size": len(task["chats"]), "remove_unused_columns": False,
            "gradient_checkpointing": False, "max_length": 4096,
        }  # fmt: skip
        loss = _LOSSES[task["objective"]](model, tokenizer, task, common)
    loss.backward()
    gradients = {
        name.replace(".default", ""): each.grad for name, each in model.named_parameters() if each.grad is not None
    }
    save_file(gradients, task["out"])
    Path(task["out"]).with_suffix(".json").write_text(json.dumps({"loss": float(loss.detach())}), encoding="utf-8")


def _dpo(model: Any, tokenizer: Any, task: dict[str, Any], common: dict[str, Any]) -> torch.Tensor:
    class WithTokens(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    rows = [{f"{name}_ids": chat[name] for name in ("prompt", "chosen", "rejected")} for chat in task["chats"]]
    loss_type = {"dpo": "sigmoid", "ipo": "ipo"}[task["objective"]]
    trainer = WithTokens(
        model, args=DPOConfig(loss_type=loss_type, **common), train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    return _with_base_as_reference(trainer, rows)


def _kto(model: Any, tokenizer: Any, task: dict[str, Any], common: dict[str, Any]) -> torch.Tensor:
    class WithTokens(KTOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    rows = [
        {
            "prompt_ids": chat["prompt"],
            "completion_ids": chat["completion"],
            "KL_completion_ids": chat["kl_completion"],
            "label": chat["label"],
        }
        for chat in task["chats"]
    ]
    weights = {name: task[name] for name in ("desirable_weight", "undesirable_weight")}
    trainer = WithTokens(
        model, args=KTOConfig(**weights, **common), train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    return _with_base_as_reference(trainer, rows)


def _with_base_as_reference(trainer: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Return the loss; of an adapter that it is given, TRL keeps a copy as the reference."""
    trainer.model.delete_adapter("ref")
    trainer.model.eval()
    loss: torch.Tensor = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    return loss


def _simpo(model: Any, tokenizer: Any, task: dict[str, Any], common: dict[str, Any]) -> torch.Tensor:
    config = CPOConfig(loss_type="simpo", cpo_alpha=0.0, simpo_gamma=task["gamma"], **common)
    trainer = _with_rows(CPOTrainer)(
        model, args=config, train_dataset=Dataset.from_list(_rows(task)), processing_class=tokenizer
    )
    trainer.model.eval()
    return trainer.get_batch_loss_metrics(trainer.model, _padded(task))[0]


def _orpo(model: Any, tokenizer: Any, task: dict[str, Any], common: dict[str, Any]) -> torch.Tensor:
    """Its own loss covers the answers alone, as the paper's; TRL's covers the prompts, too."""
    trainer = _with_rows(ORPOTrainer)(
        model, args=ORPOConfig(**common), train_dataset=Dataset.from_list(_rows(task)), processing_class=tokenizer
    )
    trainer.model.eval()
    batch = _padded(task)
    chosen, rejected, logits, *_ = trainer.concatenated_forward(trainer.model, batch)
    ratios = trainer.odds_ratio_loss(chosen, rejected)[0]
    labels = batch["chosen_labels"][:, 1:]
    own = torch.nn.functional.cross_entropy(
        logits[:, : labels.shape[1]].reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=_IGNORED
    )
    return own - ratios.mean()


def _with_rows(trainer: type) -> type:
    class WithTokens(trainer):  # type: ignore[misc]  # one of two classes
        def tokenize_row(self, feature: Any, model: Any = None) -> Any:
            return feature

    return WithTokens


def _rows(task: dict[str, Any]) -> list[dict[str, str]]:
    """Return rows that nothing is read from: the batch is given."""
    return [{"prompt": "1", "chosen": "2", "rejected": "3"} for _ in task["chats"]]


def _padded(task: dict[str, Any]) -> dict[str, torch.Tensor]:
    batch = {}
    pad = torch.nn.utils.rnn.pad_sequence
    for side in ("chosen", "rejected"):
        ids = [torch.tensor(chat["prompt"] + chat[side]) for chat in task["chats"]]
        labels = [torch.tensor([_IGNORED] * len(chat["prompt"]) + chat[side]) for chat in task["chats"]]
        batch[f"{side}_input_ids"] = pad(ids, batch_first=True)
        batch[f"{side}_attention_mask"] = pad([torch.ones_like(each) for each in ids], batch_first=True)
        batch[f"{side}_labels"] = pad(labels, batch_first=True, padding_value=_IGNORED)
    return batch


_LOSSES = {"dpo": _dpo, "ipo": _dpo, "kto": _kto, "simpo": _simpo, "orpo": _orpo}

if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
