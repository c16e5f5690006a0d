"""The campaign of `python tests/faults container` in short."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import containers, reliability
from faults.room import Room
from support.docker_engine import Client

pytestmark = [pytest.mark.container, pytest.mark.slow, pytest.mark.timeout(600)]


def test_clients_that_are_killed_leave_nothing_behind(image: Client, tmp_path: Path) -> None:
    file = tmp_path / "container.json"
    room = Room.make(tmp_path / "room", reference=False)
    tally = containers.Tally()
    containers.campaign(image, room, tally, 4, lambda so_far: so_far.write(file))
    assert tally == containers.Tally.read(file)
    assert tally.kills >= 4 and tally.kills == sum(tally.by_verb.values()) and tally.runs >= 1
    assert tally.orphans == 0 and tally.broken == [] and 0 < tally.longest < 30
    page = reliability.page(tmp_path)
    assert f"| {tally.kills}: " in page and "| processes left behind in the container (orphans) | 0 |" in page
