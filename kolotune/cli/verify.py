"""The verb `verify`: does a run still match its manifest?"""

from __future__ import annotations

from kolotune.foundation.config import DEFAULT_OUTPUT_DIR
from kolotune.foundation.errors import ManifestError
from kolotune.foundation.formatting import format_size
from kolotune.run_folder.layout import RunFolder

from .options import reporter
from .parameters import Json, Run


def verify(run: Run = DEFAULT_OUTPUT_DIR, json: Json = False) -> int:
    """Read every byte of a run and check it against its manifest."""
    from kolotune.runs import verify as verifying

    say = reporter(json)
    say.doing(f"reading {run}")
    findings = verifying.verify(RunFolder(run.absolute()))
    for name in findings.unchecked:
        say.note(f"not checked, because it is not here: {name}")
    for difference in findings.differences:
        say.warning(str(difference))
    if findings.differences:
        count = len(findings.differences)
        raise ManifestError(f"{run}: {count} difference{'s' if count > 1 else ''} from its manifest")
    say.success(f"{run}: {findings.files} files, {format_size(findings.bytes)}, match the manifest")
    return 0
