"""The commands that make and check bundles."""

import json
from pathlib import Path

import pytest

from packforcing import MODELS
from tests.helpers import PROMPT, assert_one_line, run, run_without

PUBLISHED = Path(__file__).parents[1] / "formats" / "fetched-1" / "lighttaew2_1.safetensors"


def test_export_writes_a_bundle_that_inspect_shows(tiny_config, out, monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", tiny_config)
    result = run("export", "--model", "tiny", "--random-weights", "--out", out / "b", "--json",
                 "--steps", "1000,400", "--first-steps", "1000 700 400", "--shift", 3,
                 "--commit", "last-step")  # fmt: skip
    assert (result.exit_code, result.stderr) == (0, "")
    exported = json.loads(result.stdout)
    assert exported["bytes"] == sum(path.stat().st_size for path in (out / "b").glob("*.onnx"))

    bundle_json = json.loads(run("inspect", out / "b", "--json").stdout)
    assert bundle_json["files"] == exported["files"]
    assert bundle_json["config"]["name"] == "tiny"
    assert bundle_json["config"]["timesteps"] == [1000, 400]
    assert bundle_json["config"]["first_timesteps"] == [1000, 700, 400]
    assert bundle_json["config"]["shift"] == 3
    assert (bundle_json["differences"], bundle_json["switch_history"]) == ([], "keep")
    assert bundle_json["tokens"]["of context"] == tiny_config.context_tokens
    assert bundle_json["memory"]["context"] > 0
    text = run("inspect", out / "b").stdout
    assert "tiny: 96x64 at 8 frames/s" in text and "all intact" in text
    assert "renoise at 1000 400 (the first block generated at 1000 700 400), shift 3" in text


def test_the_license_of_the_weights_reaches_the_bundle_and_what_is_made_of_it(out):
    model = Path(__file__).parents[1] / "formats" / "model-1"
    assert run("export", "--weights", model, "--out", out / "b").exit_code == 0
    license = json.loads(run("inspect", out / "b", "--json").stdout)["license"]
    # files fetched before this release recorded no license of the autoencoder
    assert license.startswith(
        "transformer: CC-BY-NC-SA-4.0; autoencoder: unknown: nothing recorded"
    )
    assert "CC-BY-NC-SA-4.0" in run("inspect", out / "b").stdout


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody can write to")
def test_an_unwritable_export_is_refused(tiny_config, monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", tiny_config)
    result = run("export", "--model", "tiny", "--random-weights", "--out", "/proc/bundle")
    assert_one_line(result.exit_code, result.stdout, result.stderr, "cannot write")


def test_a_damaged_bundle_is_refused(bundle, out):
    data = bytearray((bundle / "denoiser.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / "denoiser.onnx").write_bytes(data)
    for command in (
        ("inspect", bundle),
        ("render", PROMPT, "--bundle", bundle, "--out", out / "a.mp4"),
    ):
        result = run(*command)
        assert_one_line(
            result.exit_code, result.stdout, result.stderr, r"denoiser\.onnx is damaged"
        )
    assert not any(out.iterdir())


def test_an_incomplete_bundle_is_refused(bundle):
    (bundle / "vae_decoder.onnx").unlink()
    result = run("inspect", bundle)
    assert_one_line(result.exit_code, result.stdout, result.stderr, r"lacks .*vae_decoder\.onnx")


def test_a_bundle_of_another_release_is_refused(bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["schema_version"] = 99
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    result = run("inspect", bundle)
    assert_one_line(result.exit_code, result.stdout, result.stderr, "schema version 99.*export")


def test_a_damaged_manifest_is_refused(bundle):
    text = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(text[: len(text) // 2])
    result = run("inspect", bundle)
    assert_one_line(result.exit_code, result.stdout, result.stderr, r"manifest\.json is damaged")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "wan-13b"], "unknown model 'wan-13b'; known models: demo, wan-1.3b"),
        (["--model", "wan-1.3b"], "no weights of 'wan-1.3b' are bundled: pass a file"),
        (["--weights", "missing.safetensors"], r"cannot read weights from missing\.safetensors"),
        (["--weights", __file__], "cannot read weights from .*test_cli_bundles.py.*imported first"),
        (["--weights", PUBLISHED], "not hold the weights of model 'demo' .*import-checkpoint"),
        (["--weights", "a", "--random-weights"], "choose one of"),
    ],
)
def test_export_refuses_what_cannot_work(out, args, message):
    result = run("export", "--out", out / "bundle", *args)
    assert_one_line(result.exit_code, result.stdout, result.stderr, message)
    assert not any(out.iterdir())


def test_export_replaces_only_bundles(tiny_config, out, monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", tiny_config)
    (out / "notes.txt").touch()
    result = run("export", "--model", "tiny", "--random-weights", "--out", out)
    assert_one_line(result.exit_code, result.stdout, result.stderr, "not an empty folder")
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_exporting_without_torch_names_the_extra(out):
    result = run_without("torch", "export", "--out", out / "bundle", "--random-weights")
    message = r"exporting needs torch, which is not installed: pip install .*\[export\]"
    assert_one_line(result.returncode, result.stdout, result.stderr, message)
    assert not any(out.iterdir())
