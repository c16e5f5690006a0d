"""A short form of `python tests/faults container`."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import containers, reliability
from faults.workspace import Workspace
from support.docker_engine import Client

pytestmark = [pytest.mark.container, pytest.mark.slow, pytest.mark.timeout(600)]


def test_killed_clients_leave_no_process_behind(image: Client, tmp_path: Path) -> None:
    file = tmp_path / "container.json"
    workspace = Workspace.make(tmp_path / "workspace", reference=False)
    tally = containers.ClientTally()
    containers.campaign(image, workspace, tally, 4, lambda tally: tally.write(file))
    assert tally == containers.ClientTally.read(file)
    assert tally.kills >= 4 and tally.kills == sum(tally.by_verb.values()) and tally.runs >= 1
    assert tally.orphans == 0 and tally.broken == [] and 0 < tally.longest < 30
    page = reliability.page(tmp_path)
    assert f"| {tally.kills}: " in page and "| processes left behind in the container (orphans) | 0 |" in page
