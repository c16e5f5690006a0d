"""TRL's preparation of chats, to token ids with labels on the answers. Runs in TRL's environment.

    python trl_preparing.py CHATS MODEL PROCESSES

The trainer's constructor prepares the chats; it gets the smallest model with this vocabulary. TRL labels only answers
that the template marks, so it gets the model's ChatML template with such marks.
"""

from __future__ import annotations

import sys
import tempfile

from datasets import disable_caching, load_dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|im_start|>assistant\n{% generation %}"
    "{{ message['content'] }}<|im_end|>{% endgeneration %}\n{% else %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    """Prepare the chats, and print how many there are."""
    chats, model, processes = sys.argv[1], sys.argv[2], int(sys.argv[3])
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    disable_caching()
    with tempfile.TemporaryDirectory() as folder:
        data = load_dataset("json", data_files=chats, split="train", cache_dir=folder)
        trainer = SFTTrainer(
            model=LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)),
            args=SFTConfig(
                output_dir=folder, max_length=1024, assistant_only_loss=True, dataset_num_proc=processes,
                report_to=[], use_cpu=True,
            ),
            train_dataset=data,
            processing_class=tokenizer,
        )  # fmt: skip
        print(len(trainer.train_dataset), "chats")


if __name__ == "__main__":
    main()
