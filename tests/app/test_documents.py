"""What README and docs promise: programs, links, commands and options."""

import re
import shlex
from pathlib import Path

import click
import pytest

import packforcing.runtime
from packforcing.app.cli import main
from packforcing.app.cli.group import COMMANDS

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


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OF_OTHER_PROGRAMS = {"--gpus", "--system-site-packages"}  # docker's, venv's


def shown_options(command: str) -> set[str]:
    """Collect the options that `--help` of a command shows."""
    parameters = main.get_command(None, command).params
    options = [p for p in parameters if isinstance(p, click.Option) and not p.hidden]
    return {spelling for option in options for spelling in option.opts} | {"--help"}


def commands_in_blocks(text: str) -> list[list[str]]:
    """Collect the words of every `packforcing` command in a code block."""
    blocks = "\n".join(re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE))
    lines = re.findall(r"^ *(?:\$ )?packforcing (.+)$", blocks.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_commands_of_a_page_parse_in_todays_spelling(page):
    for name, *args in commands_in_blocks(page.read_text(encoding="utf-8")):
        main.get_command(None, name).make_context(name, list(args))  # parses, does not run
        options = {arg.partition("=")[0] for arg in args if arg.startswith("--")}
        assert options <= shown_options(name), (name, args)


def test_the_readme_has_commands():
    assert len(commands_in_blocks(README)) >= 4


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_each_option_named_in_a_page_exists(page):
    """On the command of the same code span; else, where a span is an option alone, on any."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    anywhere = set().union(*map(shown_options, COMMANDS), {"--version"}, OF_OTHER_PROGRAMS)
    for span in re.findall(r"`([^`]+)`", text):
        words = span.removeprefix("packforcing ").split()
        options = set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", span))
        if words and words[0] in COMMANDS:
            assert options <= shown_options(words[0]), span
        elif span.startswith("--"):
            assert options <= anywhere, span
