"""What README and docs promise: programs, links, commands and options."""

import re
import shlex
from pathlib import Path

import packforcing.runtime
from packforcing.app.cli import main

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_program_of_the_readme_runs(tiny_bundle, tmp_path, monkeypatch, capsys):
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.setattr(packforcing.runtime, "demo_bundle", lambda: tiny_bundle)
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    assert "16 frames in" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["circle.mp4"]


def test_the_readme_is_filled_in_and_its_links_lead_somewhere():
    assert "<MEASURE" not in README
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]
    assert len(links) >= 3
    root = Path(__file__).parents[2]
    assert [link for link in links if not (root / link).exists()] == []


def test_the_readmes_commands_exist():
    lines = re.findall(r"^packforcing (.+)$", README, re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        name, *args = shlex.split(line)
        main.get_command(None, name).make_context(name, args)  # parses, does not run
