"""How many prompts get the tokens of training, and what is wrong with the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .defects import Defect, DefectKind, defect
from .prompt_proof import Outcome, PromptResult

_TRAINED = (Outcome.EQUAL, Outcome.DIFFERENT, Outcome.SERVER_REFUSES)


@dataclass(frozen=True)
class ComparedPrompts:
    """Prompts with the tokens of training, of all; and a defect if they are not all."""

    equal: int = 0
    of: int = 0
    defects: list[Defect] = field(default_factory=list)


def compare_prompts(results: Sequence[PromptResult]) -> ComparedPrompts:
    """Count the prompts that get the trained tokens; describe the first that does not as a defect.

    Those that training refuses do not count.
    """
    trained = [result for result in results if result.outcome in _TRAINED]
    wrong = [result for result in trained if result.outcome is not Outcome.EQUAL]
    equal = len(trained) - len(wrong)
    if not wrong:
        return ComparedPrompts(equal, len(trained))
    mismatch = wrong[0].mismatch
    reason = wrong[0].reason if mismatch is None else f"{mismatch.kind.sentence}: {mismatch}"
    kind = mismatch.kind.value if mismatch is not None else ""
    wrong_prompts = defect(DefectKind.PROMPTS_DIFFER, count=len(wrong), of=len(trained), reason=reason, mismatch=kind)
    return ComparedPrompts(equal, len(trained), [wrong_prompts])
