"""A run in which every text tries to be markup."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from kolotune.chats.tokens.tokenizer import load_tokenizer
from kolotune.fidelity.comparison import (
    ComparedAnswer,
    Comparison,
    Count,
    Failure,
    MatrixSurvival,
    QuantizationFigures,
    StageCheck,
)
from kolotune.fidelity.general_figures import GeneralAnswer, GeneralFigures
from kolotune.run_folder.layout import RunFolder

HOSTILE = (
    "</span></style><script>window.hurt = 1</script><img src=x onerror='window.hurt=1'>\"'&amp; "
    "{{ 7 * 7 }} {% raw %} <svg onload=window.hurt=1> \x1b[31mred\x07 \u202eabc\u2066 日本 🎉 " + "long" * 120
)


def comparison(text: str) -> Comparison:
    """Return a comparison with every field set, and `text` wherever there is a text."""
    checked = (
        StageCheck("adapter on base", "train", "adapter", 100, "", Count(9, 9), None, None, None, 2.1, Count(9, 9)),
        StageCheck(
            "merged", "merge", text, 200, text, Count(9, 9), 1.0, 8e-7, 6e-6, 2.1, Count(9, 9), {"kl_mean": 1e-4}
        ),
        StageCheck(text, "quantize", "q", 50, "merged", Count(8, 9), 0.5, 1.5, 9.0, 4.0, Count(0, 9), {}, (text, text)),
        StageCheck("served", "modelfile"),
    )
    return Comparison(
        chats=9, positions=312, held_out=True, base_loss=3.5, tuned_loss=2.1, recorded_base_loss=None,
        recorded_tuned_loss=None, checked=checked,
        answers=(ComparedAnswer(text, text, text, text), ComparedAnswer("plain", None, "")), not_kept=(text,),
        notes=(text,), quantizations=(
            QuantizationFigures(
                "Q8_0", 80, 2.1, 0.001, 0.99, True, True, 0.97, 0.01, (MatrixSurvival(text, text, 0.9),)
            ),
        ),
        recommended="Q8_0", recommended_because=text, failure=Failure("quantize", text, text),
        general=GeneralFigures(4000, 3.25, 3.375, 0.0625, (GeneralAnswer(text, text, text, text, True, False),)),
    )  # fmt: skip


@pytest.fixture
def hostile_run(run_copy: RunFolder, tmp_path: Path) -> RunFolder:
    """Return the finished run with `HOSTILE` in every text that the report shows."""
    import numpy as np
    from safetensors.numpy import save_file

    root = tmp_path / "<b>run&quot;"
    run_copy.root.rename(root)
    run = RunFolder(root)
    ids = load_tokenizer(run.tokenizer)(HOSTILE, add_special_tokens=False)["input_ids"]
    for part in ("train", "held_out"):
        labelled = [at > 20 for at in range(len(ids))]
        tensors = {"ids": np.array(ids, np.int32), "labelled": np.array(labelled, np.uint8)}
        save_file({**tensors, "offsets": np.array([0, len(ids)], np.int64)}, run.prepared / f"{part}.safetensors")
    comparison(HOSTILE).write(run.comparison)
    record = json.loads(run.record("prepare").read_text())
    record["facts"] |= {"bad": [HOSTILE] * 3, "duplicates": 2, "shortened": 1, "turns_left_out": 4}
    record["facts"]["findings"] = {HOSTILE: 2}
    del record["sha256"]  # of the record as it was
    run.record("prepare").write_text(json.dumps(record))
    values = json.loads(run.manifest.read_text())
    values["artifacts"][run.relative(run.comparison)] = {"stage": "compare", "size": 1, "sha256": "0", "files": {}}
    values["data"]["files"][0]["path"] = f"/data/{HOSTILE}"
    values["config"] |= {"system": HOSTILE, "parameter": [HOSTILE]}
    values["versions"]["python"] = values["machine"]["processor"] = HOSTILE
    values["base"]["name"] = f"/models/{HOSTILE}"
    run.manifest.write_text(json.dumps(values))
    lines = [{"step": 0, "held_out_loss": 4.0, "time": 1.0}]
    for step in range(1, 41):
        lines.append({"step": step, "loss": 4 - step / 15, "learning_rate": 1e-3 / step, "tokens_per_second": 90.0,
                      "memory_mb": 700, "time": 1.0 + step})  # fmt: skip
    lines += [{"step": 20, "held_out_loss": 3.0, "time": 21.0}, {"step": 40, "held_out_loss": 2.5, "time": 41.0}]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def with_changes(comparison: Comparison, **changes: object) -> Comparison:
    return dataclasses.replace(comparison, **changes)  # type: ignore[arg-type]
