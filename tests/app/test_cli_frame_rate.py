"""`packforcing plan --fps`: tables, JSON, refusals, and commands that the CLI itself accepts."""

import json
import shlex

import click
import msgspec
import pytest
from click.testing import CliRunner

from packforcing import model_config
from packforcing.app.cli import main
from packforcing.app.cli.settings import with_shape
from packforcing.app.reports.realtime import commands
from packforcing.config import Config
from packforcing.runtime.gpus import known_gpus
from packforcing.runtime.realtime import candidates

WAN = model_config("wan-1.3b")
CANDIDATES = candidates(WAN, unmeasured=True)
SHAPE = (
    "size", "block_frames", "history", "policy", "vae", "steps", "first_steps", "shift",
    "commit", "dtype",
)  # fmt: skip


def plan(*arguments):
    """Run `packforcing plan`; return stdout, stderr and the exit code."""
    result = CliRunner().invoke(main, ["plan", *arguments])
    return result.stdout, result.stderr, result.exit_code


def parse(line):
    """The name and the values of a printed command, as the CLI's own parser reads them."""
    program, name, *arguments = shlex.split(line)
    assert program == "packforcing"
    context = click.Context(main)
    command = main.get_command(context, name)
    assert command is not None, name
    return name, command.make_context(name, arguments, context).params


@pytest.mark.parametrize("config", [one.config for one in CANDIDATES[:: len(CANDIDATES) // 9]])
def test_the_commands_make_what_was_chosen(config):
    """Every option exists, and the exported and quantized bundle is the candidate."""
    parsed = [parse(line) for line in commands(config, "sm120")]
    names = [name for name, _ in parsed]
    assert names[-2:] == ["build", "verify"]
    options = dict(parsed)
    assert options["build"]["target"] == ("sm120",)
    exported = options["export"]
    if exported["weights"]:
        assert names[:3] == ["fetch", "fetch", "import-checkpoint"]
        assert options["import-checkpoint"]["out"] == str(exported["weights"]) == config.name
    else:
        assert exported["model"] == config.name and exported["random_weights"]
    plain = with_shape(model_config(config.name), **{name: exported[name] for name in SHAPE})
    assert plain.precision == WAN.precision
    bundle, stored = exported["out"], {}
    if "quantize" in options:
        quantized = options["quantize"]
        assert str(quantized["bundle"]) == str(options["calibrate"]["bundle"]) == bundle
        assert str(quantized["calibration"]) == options["calibrate"]["out"]
        dtypes = {"weights": "weight_dtype", "cache": "cache_dtype", "attention": "attention_dtype"}
        stored = {name: quantized[key] for name, key in dtypes.items() if quantized.get(key)}
        bundle = quantized["out"]
    assert str(options["build"]["bundle"]) == str(options["verify"]["bundle"]) == bundle
    precision = msgspec.structs.replace(plain.precision, **stored)
    assert msgspec.structs.replace(plain, precision=precision) == config


def test_the_table_of_one_gpu():
    out, _, code = plan("--gpu", "4090", "--fps", "16")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and "RTX 4090 (sm89): 16 fps or more within 23.61 GiB" in out
    (chosen,) = [line for line in lines if line[:1] == ["chosen"]]
    assert "832x480" in chosen and sum(line[:1] == ["or"] for line in lines) >= 2
    assert ["packforcing", "verify", "--bundle", "fast"] in lines


def test_json_has_the_configs_and_the_commands():
    out, _, code = plan("--gpu", "RTX 4060", "--fps", "10", "--efficiency", "0.5", "--json")
    result = json.loads(out)
    assert code == 0 and result["goal"] == 10 and result["efficiency"] == 0.5
    (gpu,) = result["gpus"]
    assert gpu["name"] == "RTX 4060" and len(gpu["candidates"]) > 1
    for one in gpu["candidates"]:
        msgspec.convert(one["config"], Config)
        assert one["fps"] == pytest.approx(0.5 * one["fps_at_peak"]) and one["fps"] >= 10
        assert one["total"] <= 8 * 2**30 and one["commands"][-1].startswith("packforcing verify")


def test_without_a_gpu_all_are_listed():
    out, _, code = plan("--realtime", "--size", "480x272")
    assert code == 0 and "16 fps or more" in out
    for name in known_gpus():
        assert f"\n{name} " in out
    assert "832x480" not in out and "480x272" in out and "nothing reaches it" in out


def test_what_is_left_out_is_named_with_the_option_that_allows_it():
    fixed = ("--size", "832x480", "--history", "2,16,1", "--model", "wan-1.3b")
    options = ("--gpu", "4090", "--fps", "5", *fixed)
    out, _, code = plan(*options)
    assert code == 0 and "4090 (sm89)" in out
    (line,) = [line for line in out.splitlines() if "has not been measured" in line]
    assert line.endswith("--unmeasured allows them")
    assert "fp8 weights" in line and "fp8 attention" in line and "nvfp4" not in line
    assert json.loads(plan(*options, "--json")[0])["left_out"] != []
    faster = ("--gpu", "4090", "--fps", "11", *fixed)  # beyond what fp16 reaches
    assert plan(*faster)[2] == 2
    out, _, code = plan(*faster, "--unmeasured")
    assert code == 0 and "has not been measured" not in out and " fp8 " in out
    out, _, _ = plan("--gpu", "4090", "--fps", "5", "--weight-dtype", "fp8")  # named: no question
    assert "has not been measured" not in out


def test_figures_in_place_of_a_name():
    rates = "fp16=30,int8=120,fp8=60,bandwidth=272"
    out, _, code = plan("--fps", "8", "--target", "sm89", "--budget", "7", "--rates", rates)
    assert code == 0 and "a GPU for sm89 (sm89): 8 fps or more within 7.00 GiB" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fps", "16", "--realtime"], "choose one of --fps and --realtime"),
        (["--fps", "0"], "--fps must be above 0 and at most 1000; it is 0"),
        (["--fps", "nan"], "--fps must be above 0 and at most 1000; it is nan"),
        (["--fps", "900", "--gpu", "4060"], "nothing is predicted to reach 900 fps on RTX 4060"),
        (["--fps", "16", "--gpu", "4060", "--budget", "0.5"], "nothing fits into 0.50 GiB"),
        (["--fps", "16", "--gpu", "4061"], "did you mean"),
        (["--fps", "16", "--target", "sm89"], "--fps needs a --gpu, or one --target"),
        (["--fps", "16", "--gpu", "4060", "--budget", "4,8"], "--fps takes one --budget"),
        (["--fps", "16", "--gpu", "4060", "--target", "sm89"], "choose --gpu, or --target"),
        (["--fps", "16", "--gpu", "3060", "--weight-dtype", "fp8"], "sm86 has no fp8"),
        (["--fps", "16", "--picture", "a.png"], "without --bundle and --picture"),
        (["--efficiency", "0.5"], "--efficiency, --rates and --unmeasured are for --fps"),
        (["--unmeasured"], "--efficiency, --rates and --unmeasured are for --fps"),
        (
            ["--fps", "60", "--gpu", "4060"],
            "or allow int8 weights, w8a8 weights, fp8 ",
        ),
        (["--fps", "16", "--efficiency", "2"], "--efficiency must be above 0 and at most 1"),
        (
            ["--fps", "1", "--target", "sm89", "--budget", "8", "--rates", "fp16=30"],
            "--rates needs fp16 and bandwidth",
        ),
    ],
)
def test_mistakes_end_in_one_line(arguments, message):
    _, err, code = plan(*arguments)
    assert code == 2 and message in err and err.count("\n") == 1
