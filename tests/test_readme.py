import re
from pathlib import Path

import pytest

from easi3r.config import OPTIONS, load_settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_ci_runs_the_test_command_of_the_readme() -> None:
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if "-m pytest" in line]
    assert len(commands) == 1
    assert commands[0] in README.splitlines()


def test_the_readme_names_every_option() -> None:
    assert [name for name in OPTIONS if f"--{name.replace('_', '-')}" not in README] == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_loads_and_gives_a_reason_for_every_value(path: Path) -> None:
    load_settings(path)
    values = [line for line in path.read_text().splitlines() if re.match(r"\s*\w+: \S", line)]
    assert values
    assert all("#" in line for line in values)


def test_every_file_that_the_readme_links_to_exists() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
