"""What the process that leads a run holds while the engine trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.runs import config_of

from kolotune.foundation import config as configs
from kolotune.foundation.config import Config
from kolotune.run_folder.layout import RunFolder


def test_it_never_loads_pytorch(finished: Config, tmp_path: Path) -> None:
    config = config_of(RunFolder(finished.output_dir), output_dir=tmp_path / "run", epochs=2, compare=True)
    file = tmp_path / "kolotune.yaml"
    file.write_text(configs.dump(config), encoding="utf-8")
    command = [sys.executable, "-X", "importtime", "-m", "kolotune", "run", "--config", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "kolotune.pipeline.run" in imported
    assert not imported & {"torch", "transformers.modeling_utils"}
