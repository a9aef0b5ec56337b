"""The vocabulary of options: types, older spellings, arguments, environment variables."""

import re

import click
import pytest

from packforcing import model_config
from packforcing.app.cli import main
from packforcing.app.cli.group import COMMANDS
from packforcing.app.cli.options import (
    BUDGETS,
    HISTORY,
    NAMES,
    POLICY_NAMES,
    PRECISION,
    SIZE,
    TARGET_NAMES,
)
from packforcing.presets import policies
from packforcing.runtime.plan import TARGETS
from packforcing.units import GIB
from tests.helpers import assert_refused, run


def parse(command: str, *args: str) -> dict[str, object]:
    """Parse arguments; return the parameters that the command would get."""
    return main.get_command(None, command).make_context(command, list(args)).params


def parse_in_group(*args: str) -> dict[str, object]:
    """Parse a whole command line, environment included."""
    context = main.make_context("packforcing", list(args))
    name, command, rest = main.resolve_command(context, list(args))
    return command.make_context(name, rest, parent=context).params


@pytest.mark.parametrize(
    ("option_type", "text", "value"),
    [
        (SIZE, "832x480", (832, 480)),
        (SIZE, "832X480", (832, 480)),
        (SIZE, " 832 x 480 ", (832, 480)),
        (SIZE, "832\u00d7480", (832, 480)),
        (SIZE, "832*480", (832, 480)),  # Wan's generate.py
        (HISTORY, "2,16,1", (2, 16, 1)),
        (BUDGETS, "8", (8 * GIB,)),
        (BUDGETS, "4GiB, 6.5 gib", (4 * GIB, 13 * GIB // 2)),
        (NAMES, "sm86, sm89", ("sm86", "sm89")),
        (PRECISION, "fp16,int8", ("fp16", "int8")),
        (PRECISION, "fp16", ("fp16", "fp16")),
    ],
)
def test_a_value_is_converted(option_type, text, value):
    assert option_type.convert(text, None, None) == value
    assert option_type.convert(value, None, None) == value


@pytest.mark.parametrize(
    ("option_type", "text"),
    [
        (SIZE, "832"),
        (SIZE, "832x480x1"),
        (SIZE, "-1x2"),
        (SIZE, "\u0663x2"),
        (HISTORY, "1,2"),
        (HISTORY, "1,2,1001"),
        (BUDGETS, "0"),
        (BUDGETS, "nan"),
        (BUDGETS, "inf"),
        (BUDGETS, "4,,6"),
        (NAMES, "sm86,"),
        (PRECISION, "int4,int4"),  # no cache is int4
        (PRECISION, "fp16,int8,int8"),
    ],
)
def test_a_malformed_value_is_refused(option_type, text):
    with pytest.raises(click.BadParameter, match=text):
        option_type.convert(text, None, None)


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        ("build", "b --targets sm86,sm89", "--bundle b --target sm86,sm89"),
        ("plan", "b --budget 4", "--bundle b --budget 4"),
        ("inspect", "b", "--bundle b"),
        ("verify", "b --out o", "--bundle b --out o"),
        (
            "calibrate",
            "b --prompts p.txt --out s.safetensors",
            "--bundle b --prompts p.txt --out s.safetensors",
        ),
        (
            "quantize",
            "b --weights int4 --cache int8 --out o",
            "--bundle b --weight-dtype int4 --cache-dtype int8 --out o",
        ),
        (
            "compare",
            "b --policies packforcing,sink-window",
            "--bundle b --policy packforcing,sink-window",
        ),
        ("export", "--precision fp16 --out o", "--dtype fp16 --out o"),
        ("import-checkpoint", "a.pt --kind causvid --out o", "a.pt --model causvid --out o"),
        ("render", "--prompt star --out a.mp4", "star --out a.mp4"),
        ("demo", "star", "--prompt star"),
        (
            "encode-prompt",
            "fox --encoder e --out f.safetensors",
            "--prompt fox --encoder e --out f.safetensors",
        ),
    ],
)
def test_an_older_spelling_means_the_same_and_is_not_shown(command, old, new):
    assert parse(command, *old.split()) == parse(command, *new.split())
    text = run(command, "--help").stdout
    for spelling in set(old.split()) - set(new.split()):
        if spelling.startswith("--") and command != "render":
            assert f"{spelling} " not in text
    assert "BUNDLE" not in text


def test_help_names_every_policy_and_target():
    assert tuple(policies(model_config("demo"))) == POLICY_NAMES
    assert re.findall(r"sm\d+", TARGET_NAMES) == list(TARGETS)


def test_precision_of_plan_means_both_dtypes(tmp_path):
    old = run("plan", "--model", "demo", "--precision", "fp32,int8", "--json")
    new = run("plan", "--model", "demo", "--weight-dtype", "fp32", "--cache-dtype", "int8",
              "--json")  # fmt: skip
    assert old.exit_code == 0 and old.stdout == new.stdout
    both = run("plan", "--precision", "fp16", "--cache-dtype", "int8")
    assert_refused(both, "choose --weight-dtype and --cache-dtype, or --precision")


def test_int8_of_encode_prompt_means_its_weight_dtype():
    args = "fox", "--encoder", "e", "--out", "f.safetensors"
    assert parse("encode-prompt", *args, "--int8")["int8"]
    assert parse("encode-prompt", *args, "--weight-dtype", "int8")["weight_dtype"] == "int8"


def test_a_bundle_named_twice_is_refused():
    assert_refused(run("inspect", "a", "--bundle", "b"), "--bundle is set twice", "'a'")


@pytest.mark.parametrize("command", ["calibrate", "quantize", "build"])
def test_a_command_that_needs_a_bundle_asks_for_the_option(command):
    required = {"calibrate": ["--prompts", "p", "--out", "o"], "quantize": ["--out", "o"]}
    assert_refused(run(command, *required.get(command, [])), "Missing option '--bundle'")


def test_an_environment_variable_is_named_like_its_option(monkeypatch):
    monkeypatch.setenv("PACKFORCING_BUILD_TARGET", "sm89")
    monkeypatch.setenv("PACKFORCING_BUILD_JSON", "1")
    monkeypatch.setenv("PACKFORCING_BUILD_BUNDLE", "from-variable")
    params = parse_in_group("build")
    assert params["target"] == ("sm89",) and params["as_json"]
    assert params["bundle"].name == "from-variable"
    assert parse_in_group("build", "from-argument")["bundle"].name == "from-argument"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_the_variable_that_the_documentation_says(name, monkeypatch):
    """PACKFORCING_COMMAND_OPTION, and no other; hidden spellings have none."""
    command = main.get_command(None, name)
    prefix = f"PACKFORCING_{name.replace('-', '_').upper()}"
    context = click.Context(command, info_name=name, auto_envvar_prefix=prefix)
    options = [entry for entry in command.params if isinstance(entry, click.Option)]
    for option in options:
        spelling = max(option.opts, key=len).removeprefix("--").replace("-", "_").upper()
        with monkeypatch.context() as environment:
            environment.setenv(f"{prefix}_{spelling}", "text")
            followers = {o.opts[0] for o in options if o.resolve_envvar_value(context) == "text"}
        assert followers == (set() if option.hidden else {option.opts[0]})


def test_one_spelling_has_one_metavar_in_all_commands():
    """A word means one thing: apart from what a command writes or how it counts prompts."""
    metavars: dict[str, set[str | None]] = {}
    for name in COMMANDS:
        for parameter in main.get_command(None, name).params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                metavars.setdefault(parameter.opts[0], set()).add(parameter.metavar)
    several = {option for option, shown in metavars.items() if len(shown) > 1}
    assert several <= {"--out", "--prompts", "--policy", "--backend"}
