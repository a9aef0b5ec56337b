"""`push`: the model card, what is listed and pushed, and the round trip by the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest
import yaml

pytest.importorskip("huggingface_hub")

from packforcing.app.reports.card import card_metadata, model_card
from packforcing.origins import UNKNOWN, UNREAD, Origin
from packforcing.presets import model_config
from packforcing.runtime.bundle import read_manifest, write_manifest
from tests.helpers import assert_refused, run, run_without, umt5_bundle
from tests.hub import check_card, local_hub

BUNDLE = Path(__file__).parents[1] / "formats" / "bundle-6"
MANIFEST = read_manifest(BUNDLE)
SOURCE = "gdhe17/Self-Forcing"


def with_origins(*origins: Origin):
    return msgspec.structs.replace(MANIFEST, origins=origins)


def test_a_dry_run_prints_the_card_and_pushes_nothing(tmp_path, monkeypatch):
    with local_hub(monkeypatch, tmp_path) as hub:
        result = run("push", BUNDLE, "team/new", "--dry-run")
    assert result.exit_code == 0, result.output
    assert not hub.repositories
    card = result.stdout[: result.stdout.index("manifest.json  ")]
    assert check_card(card) == []
    data = yaml.safe_load(card.split("---")[1])
    assert data["license"] == ["apache-2.0", "cc-by-nc-sa-4.0"]
    assert data["base_model"] == [SOURCE] and "base_model_relation" not in data
    assert data["pipeline_tag"] == "text-to-video" and data["library_name"] == "packforcing"
    for part in (
        f"| transformer | {SOURCE} | CC-BY-NC-SA-4.0 |",
        "| autoencoder | lightx2v/Autoencoders | Apache-2.0 |",
        "| tensorrt-rtx | tensorrt-rtx 1.7.1.116 | sm86, sm89 |",
        "| model | formats: 96x64 at 8 frames/s, blocks of 12 frames (1.5 s) |",
        'Session.from_pretrained("team/new")',
        "| reserve | 0.12 GiB |",
        MANIFEST.sha256,
    ):
        assert part in card
    listed = {line.split()[0] for line in result.stdout[len(card) :].splitlines()[:-1]}
    engines = {path.relative_to(BUNDLE).as_posix() for path in BUNDLE.glob("engines/*/*")}
    assert listed == {*MANIFEST.files, *engines, "manifest.json", "README.md"}


def test_a_bundle_is_pushed_with_a_card_or_with_its_own(tmp_path, monkeypatch):
    bundle = Path(shutil.copytree(BUNDLE, tmp_path / "bundle"))
    with local_hub(monkeypatch, tmp_path / "cache") as hub:
        result = run("push", bundle, "team/new", "--json")
        assert result.exit_code == 0, result.output
        printed, files = json.loads(result.stdout), hub.repositories["team/new"].files
        assert printed["url"].startswith(f"{hub.url}/team/new/commit/")
        assert files["README.md"].decode() == printed["model_card"]
        assert printed["files"] == {
            name: len(content) for name, content in files.items() if name != ".gitattributes"
        }
        (bundle / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
        assert run("push", bundle, "team/new").exit_code == 0
        assert hub.repositories["team/new"].files["README.md"].endswith(b"Mine.\n")
        (bundle / "README.md").write_text("---\nlicense: nonsense\n---\nMine.\n")
        assert_refused(run("push", bundle, "team/new"), "cannot push to team/new", "README.md")


@pytest.mark.parametrize(
    ("licenses", "metadata"),
    [
        (("Apache-2.0",), {"license": "apache-2.0"}),
        (("cc-by-nc-sa-4.0, says its model card",), {"license": "cc-by-nc-sa-4.0"}),
        (("MIT", "MIT"), {"license": "mit"}),
        (("MIT", UNKNOWN), {"license": ["mit", "unknown"]}),
        ((UNREAD,), {"license": "unknown"}),
        (("Apache-2.0 (the repository's; the weights' was not read here)",),
         {"license": "unknown"}),
        ((), {"license": "unknown"}),
        (("Tencent Hunyuan, says its model card",),
         {"license": "other", "license_name": "tencent-hunyuan",
          "license_link": f"https://huggingface.co/{SOURCE}"}),
    ],
)  # fmt: skip
def test_licenses_are_what_was_read_in_the_terms_of_the_hub(licenses, metadata):
    manifest = with_origins(*(Origin("transformer", SOURCE, name) for name in licenses))
    data = card_metadata(manifest, {})
    assert {name: data[name] for name in data if name.startswith("license")} == metadata
    card = model_card(manifest, {}, "team/new")
    assert check_card(card) == [] or "mit" not in metadata["license"]
    assert all(f"| {name} |".replace("'", "&#39;") in card for name in licenses)


def test_quantized_weights_are_related_to_their_base_and_merged_loras_too():
    config = model_config("self-forcing")
    precision = msgspec.structs.replace(config.precision, compute="fp16", weights="int4")
    config = msgspec.structs.replace(config, precision=precision)
    origins = (
        Origin("transformer", SOURCE, "MIT"),
        Origin("LoRA style.safetensors", "me/style", "MIT"),
        Origin("autoencoder", "lightx2v/Autoencoders", "MIT"),
    )
    manifest = msgspec.structs.replace(MANIFEST, config=config, origins=origins)
    data = card_metadata(manifest, {})
    assert data["base_model"] == [SOURCE, "me/style"]
    assert data["base_model_relation"] == "quantized"
    card = model_card(manifest, {}, "team/new")
    assert "packforcing fetch umt5-xxl" in card and 'load_embedding("prompt.safetensors")' in card
    text_encoder = "| text encoder (umt5-xxl, not in this repository) | Wan-AI/Wan2.1-T2V-1.3B |"
    assert f"{text_encoder} Apache-2.0 |" in card
    assert "Weights and scratch are estimates" in card


def test_a_name_in_a_manifest_writes_no_markup_into_the_card(tmp_path):
    bundle = umt5_bundle(tmp_path)
    manifest = read_manifest(bundle)
    config = msgspec.structs.replace(manifest.config, name="<script>|a\n# b")
    origins = (Origin("model", "", "<img src=x>|\n"),)
    write_manifest(bundle, msgspec.structs.replace(manifest, config=config, origins=origins))
    card = model_card(read_manifest(bundle), {}, "team/new")
    assert "<script" not in card and "<img" not in card and "\n# b" not in card
    assert "&lt;img src=x&gt;\\|" in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((BUNDLE, "new"), "name it user/new"),
        ((BUNDLE, "team/two words"), "no name on the hub"),
        ((BUNDLE.parent, "team/new"), "is not a bundle"),
    ],
)
def test_mistakes_are_told_before_anything_is_pushed(arguments, message, tmp_path, monkeypatch):
    with local_hub(monkeypatch, tmp_path) as hub:
        assert_refused(run("push", *arguments), message)
    assert not hub.repositories


def test_without_the_hubs_package_the_extra_is_named():
    result = run_without("huggingface_hub", "push", BUNDLE, "team/new", "--dry-run")
    assert result.returncode == 2 and "[fetch]" in result.stderr
    assert result.stderr.count("\n") == 1
