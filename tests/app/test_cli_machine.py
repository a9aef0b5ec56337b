"""The commands about this machine: plans as table, detail, JSON and picture; refusals."""

import json
import shutil
import sys
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from packforcing import Policy, model_config
from packforcing.app.cli import main
from packforcing.runtime.engine_records import encode_record, read_record, record_file
from packforcing.runtime.plan import choose_plan, estimates, make_plan
from packforcing.units import GIB
from tests.emulated import build_engines
from tests.helpers import TINY

WAN = model_config("wan-1.3b")


def plan(*arguments):
    """Run `packforcing plan`; return stdout, stderr and the exit code."""
    result = CliRunner().invoke(main, ["plan", *arguments])
    return result.stdout, result.stderr, result.exit_code


def test_the_table_of_what_fits():
    out, _, code = plan("--budget", "2,4,8,12", "--target", "sm86,sm120")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    (least,) = [line[-1] for line in lines if line[:4] == ["2.00", "sm86", "nothing", "fits"]]
    assert choose_plan(WAN, "sm86", int(float(least) * GIB)).total <= float(least) * GIB
    twelve = next(line for line in lines if line[:2] == ["12.00", "sm120"])
    assert twelve[2:10] == ["2", "+", "16", "+", "1", "fp16", "fp16", "-"] and twelve[-1] == "-"
    four = next(line for line in lines if line[:2] == ["4.00", "sm86"])
    assert "quantize" in four and "16" in four
    assert "predicted" in out


def test_json_is_complete_and_adds_up():
    out, _, code = plan("--budget", "4GiB,6.5", "--target", "sm89", "--seconds", "10", "--json")
    assert code == 0
    result = json.loads(out)
    assert [planned["budget"] for planned in result["plans"]] == [4 * GIB, 13 * GIB // 2]
    for planned in result["plans"]:
        assert sum(planned["device"].values()) == planned["total"] <= planned["budget"]
        config = msgspec.convert(planned["config"], type(WAN))
        assert make_plan(config, "sm89", seconds=10).host["archive"] == planned["host"]["archive"]


@pytest.fixture
def built_bundle(tiny_bundle, tmp_path):
    """A bundle with engines, whose builder had other figures than the estimates."""
    directory = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    build_engines(directory, weights=10**6, scratch=10**8)
    return directory


def test_a_bundles_built_figures_replace_the_estimates(built_bundle):
    result = json.loads(plan(str(built_bundle), "--json")[0])
    device = result["plans"][0]["device"]
    assert device["weights.denoiser"] == device["weights.vae_decoder"] == 10**6
    assert device["scratch"] == 10**8
    assert result["plans"][0]["estimates"] == estimates(TINY)
    assert result["engines"]["loaded"] == {} and result["engines"]["not_loaded"]
    lines = [line.split() for line in plan(str(built_bundle))[0].splitlines()]
    estimate = f"{estimates(TINY)['weights.denoiser']:,}"
    assert ["weights.denoiser", estimate, "1,000,000", "-"] in lines
    _, err, code = plan(str(built_bundle), "--budget", "0.1")
    assert code == 2 and "give --budget" in err
    assert plan(str(built_bundle), "--budget", "0.3")[2] == 0


def test_engines_of_another_graph_do_not_count(built_bundle):
    path = record_file(built_bundle, "tensorrt-rtx", "denoiser")
    record = read_record(built_bundle, "tensorrt-rtx", "denoiser")
    key = msgspec.structs.replace(record.key, graph={"denoiser.onnx": "0"})
    path.write_bytes(encode_record(msgspec.structs.replace(record, key=key)))
    result = json.loads(plan(str(built_bundle), "--json")[0])
    device = result["plans"][0]["device"]
    assert device["weights.denoiser"] == estimates(TINY)["weights.denoiser"]
    assert device["weights.compressor"] == 10**6


def test_a_gpu_by_name_has_its_memory_less_the_context():
    out, _, code = plan("--gpu", "rtx 4060", "--json")
    result = json.loads(out)
    assert code == 0 and result["plans"][0]["budget"] == 8 * GIB - result["cuda_context"]
    assert result["plans"][0]["target"] == "sm89"


def test_one_plan_in_detail():
    out, _, code = plan("--size", "640x368", "--block-frames", "3", "--history", "2,4,1",
                       "--precision", "fp16,int8")  # fmt: skip
    assert code == 0 and "640x368, blocks of 3" in out and "2 sink, 4 mid and 1 recent" in out
    config = msgspec.structs.replace(
        WAN, width=640, height=368, block_frames=3, policy=Policy(sink=2, mid=4, recent=1),
        precision=msgspec.structs.replace(WAN.precision, cache="int8"),
    )  # fmt: skip
    assert f"{make_plan(config, 'sm86').total:,}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "1"], "does not fit into 1.00 GiB on sm86: the least it can take is"),
        (["--budget", "much"], "'--budget': 'much' is not GiB, like 8 or 4,6.5,12"),
        (["--budget", "-1"], "'-1' is not GiB"),
        (["--target", "sm90"], "unknown target 'sm90'"),
        (["--target", "sm86", "--gpu", "RTX 3060"], "choose one of --gpu and --target"),
        (["--gpu", "GTX 1"], "no figures for a GPU 'GTX 1'"),
        (
            ["--policy", "sink-window", "--history", "2,16,1"],
            "the policy sink-window has no mid blocks: use --policy packforcing, or 0 for MID",
        ),
        (
            ["--model", "self-forcing", "--history", "2,16,1"],
            "the policy that self-forcing was published with has no mid blocks",
        ),
        (["--policy", "full-history", "--history", "0,0,6"], "full-history reads every block"),
        (["--precision", "int5"], "'int5' is not WEIGHTS,CACHE, like fp16,int8"),
        (["--precision", "fp32,fp16"], "precision.weights is fp32"),
        (["--precision", "fp8", "--target", "sm86"], "sm86 has no fp8 for the weights"),
        (["--model", "none"], "unknown model 'none'"),
        (["--picture", "no/such/folder/a.png"], "cannot write no/such/folder/a.png"),
        (["nowhere"], "nowhere is not a bundle"),
        (["nowhere", "--model", "demo"], "a bundle has its model"),
        (["--seconds", "nan"], "seconds must be"),
        (["--seconds", "1e308"], "seconds must be above 0 and at most 86400"),
        (
            ["--history", "2,1000000000,1", "--budget", "4"],
            "has more than 1000 blocks",
        ),
    ],
)
def test_mistakes_end_in_one_line(arguments, message):
    _, err, code = plan(*arguments)
    assert code == 2 and message in err and err.count("\n") == 1


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    assert plan("--budget", "3,6,12", "--picture", str(path))[2] == 0
    assert path.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [path]


def test_a_picture_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    _, err, code = plan("--picture", str(tmp_path / "plan.png"))
    assert code == 2 and "pip install" in err and "[plot]" in err and not list(tmp_path.iterdir())
