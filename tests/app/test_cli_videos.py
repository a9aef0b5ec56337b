"""The commands that make videos: results, refusals, signals and resuming."""

import json
import re
import shlex
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import av
import msgspec
import numpy as np
import pytest
from PIL import Image

from packforcing.app.cli import main
from packforcing.runtime import demo_bundle
from packforcing.runtime.bundle import contract, read_manifest, write_manifest
from packforcing.runtime.resume import RenderFolder
from packforcing.runtime.rollout import Rollout
from tests.helpers import PROMPT, assert_one_line, assert_refused, run, run_without


def test_render_writes_the_requested_frames_and_reports_them(tiny_bundle, tiny_config, out):
    result = run("render", PROMPT, "--bundle", tiny_bundle, "--out", out / "a.mkv",
                 "--seconds", 2.5, "--json")  # fmt: skip
    assert (result.exit_code, result.stderr) == (0, "")
    summary = json.loads(result.stdout)
    assert summary["path"] == str(out / "a.mkv")
    assert summary["frames"] == round(2.5 * tiny_config.fps)
    assert summary["seconds_graphs"].keys() >= {"prompt", "denoiser", "vae_decoder"}
    with av.open(out / "a.mkv") as container:
        frames = list(container.decode(video=0))
    assert len(frames) == summary["frames"]
    assert (frames[0].width, frames[0].height) == (tiny_config.width, tiny_config.height)


def test_render_prints_its_speed(tiny_bundle, out):
    result = run("render", PROMPT, "--bundle", tiny_bundle, "--out", out / "a.mp4", "--seconds", 1)
    assert result.exit_code == 0, result.stderr
    assert re.fullmatch(r".*a\.mp4: 8 frames, 1\.0 s of video in .*real time\n", result.stdout)


def test_render_takes_other_steps_and_says_so(tiny_bundle, out):
    ask = "render", PROMPT, "--bundle", tiny_bundle, "--out", out / "a.mkv", "--seconds", 1
    result = run(*ask, "--steps", "1000,500", "--shift", 8)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[1:] == [
        "denoising: renoise at 1000 500, shift 8; the bundle's: renoise at 1000 750 500 250, "
        "shift 5"
    ]
    for steps, message in (
        (("--steps", "1000,500,0"), "end in 0"),
        (("--steps", "500,1000"), "do not decrease"),
        (("--first-steps", "1000,2000"), "not all from 1 to 1000"),
        (("--steps", "four"), "'four' is not STEP,STEP,..."),
        (("--shift", "0"), "shift must be above 0"),
        (("--steps", "2"), "tiny takes 4 steps, .* no published weights of these sizes were"),
        (("--first-steps", "2"), "--first-steps takes a list of steps"),
    ):
        result = run(*ask, *steps)
        assert_one_line(result.exit_code, result.stdout, result.stderr, message)


def test_render_names_a_bundle_of_another_size_or_the_commands_that_make_it(out):
    """The commands are commands: each of them parses."""
    ask = "render", PROMPT, "--out", out / "a.mkv", "--seconds", "0.1", "--size"
    result = run(*ask, "192x128", "--bundle", demo_bundle())
    assert_refused(result, "makes frames of 128x128, not 192x128", "--size 192x128 --out fast")
    assert "packforcing build" not in result.stderr
    commands = result.stderr.strip().partition("'fast': ")[2].split(" && ")
    assert [command.split()[1] for command in commands] == ["export", "verify"]
    for command in commands:
        name, *words = shlex.split(command)[1:]
        with main.get_command(None, name).make_context(name, words):
            pass
    result = run(*ask, "192x128", "--backend", "tensorrt-rtx")
    assert_refused(result, "packforcing build --bundle fast --target sm86,sm89,sm120")
    assert_refused(run(*ask, "130x128"), "must be multiples of 16", "nearest: 128x128")

    manifest = read_manifest(demo_bundle())
    sized = msgspec.structs.replace(manifest.config, width=192)
    for name, config in (("own", manifest.config), ("wide", sized)):
        (out / name).mkdir()
        graphs = contract(config)
        write_manifest(out / name, msgspec.structs.replace(manifest, config=config, graphs=graphs))
    result = run(*ask, "192x128", "--bundle", out / "own")
    assert_refused(result, f"not 192x128: use --bundle {(out / 'wide').resolve()}")


def test_one_seed_gives_one_video(tiny_bundle, out):
    for name, seed in (("a/", 3), ("b/", 3), ("c/", 4)):
        result = run("render", PROMPT, "--bundle", tiny_bundle, "--out", f"{out}/{name}",
                     "--seconds", 1, "--seed", seed)  # fmt: skip
        assert result.exit_code == 0, result.stderr
    first, same, other = ((out / name / "frame_000007.png").read_bytes() for name in "abc")
    assert first == same != other


@pytest.mark.parametrize("policy", ["packforcing", "sliding-window", "sink-window", "full-history"])
def test_render_takes_every_policy_by_name(tiny_bundle, out, policy):
    result = run("render", PROMPT, "--bundle", tiny_bundle, "--out", out / "a.mp4",
                 "--seconds", 8, "--policy", policy, "--threads", 1)  # fmt: skip
    assert result.exit_code == 0, result.stderr


def test_render_starts_from_a_picture(tiny_bundle, tmp_path, out):
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(tmp_path / "start.png")
    videos = {}
    for name, start in (("without", ()), ("with", ("--start", tmp_path / "start.png"))):
        result = run("render", PROMPT, "--bundle", tiny_bundle, "--out", f"{out}/{name}/",
                     "--seconds", 2, *start)  # fmt: skip
        assert result.exit_code == 0, result.stderr
        videos[name] = [path.read_bytes() for path in sorted((out / name).iterdir())]
    assert len(videos["with"]) == len(videos["without"]) == 16
    assert videos["with"] != videos["without"]


def test_demo_writes_a_video_and_a_page_that_loads_nothing(tiny_bundle, out):
    result = run("demo", "--bundle", tiny_bundle, "--out", out / "new" / "folder",
                 "--prompt", "a <b>red</b> star", "--seconds", 6)  # fmt: skip
    assert result.exit_code == 2  # 'b' is no word of the model; < and > are not read
    result = run("demo", "--bundle", tiny_bundle, "--out", out / "new" / "folder",
                 "--prompt", "a <red> star", "--seconds", 6)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    video, page = out / "new" / "folder" / "demo.mp4", out / "new" / "folder" / "demo.html"
    assert str(video) in result.stdout and str(page) in result.stdout
    assert sorted(path.name for path in page.parent.iterdir()) == ["demo.html", "demo.mp4"]
    text = page.read_text()
    assert "a &lt;red&gt; star" in text and "<red>" not in text
    loaded = re.findall(r'(?:src|href)="([^"]{5})|url\(|@import|<script|<link', text)
    assert set(loaded) == {"data:", "demo."}  # the link to the video is not loaded
    assert text.count("<figure>") == 12


def test_a_page_that_cannot_be_written_leaves_the_video_alone(tiny_bundle, out):
    (out / "demo.html").mkdir()
    result = run("demo", "--bundle", tiny_bundle, "--out", out, "--seconds", 1)
    assert_one_line(result.exit_code, result.stdout, result.stderr, r"cannot write .*demo\.html")
    assert sorted(path.name for path in out.iterdir()) == ["demo.html", "demo.mp4"]


def test_a_prompt_that_is_not_utf8_is_rendered_and_shown(tiny_bundle, out):
    result = run("demo", "--bundle", tiny_bundle, "--out", out, "--seconds", 1,
                 "--prompt", "a red star \udcff")  # as Python reads a byte 0xFF  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in out.iterdir()) == ["demo.html", "demo.mp4"]
    assert "<h1>a red star ?</h1>" in (out / "demo.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", "a red stra over the see"], r"'stra' \(did you mean 'star'\?\), 'see'"),
        (["--prompt", "the"], "names nothing to draw"),
        (["--seconds", "0"], "seconds must be above 0.*it is 0"),
        (["--seconds", "-3"], "seconds must be above 0.*it is -3"),
        (["--seconds", "nan"], "seconds must be above 0.*it is nan"),
        (["--seconds", "inf"], "seconds must be above 0.*it is inf"),
        (["--seconds", "1e9"], r"seconds must be above 0.*it is 1e\+09"),
        (["--seconds", "0.01"], "at least one frame"),
        (["--seconds", "ten"], "'ten' is not a valid float"),
        (["--seed", "-1"], "seed must be from 0"),
        (["--threads", "0"], "'--threads': 0 is not in the range"),
        (["--threads", "3000000000"], "'--threads': 3000000000 is not in the range"),
        (["--policy", "forget"], "unknown policy 'forget'; known policies: packforcing, sliding"),
        (["--start", "missing.png"], r"cannot start from missing\.png: No such file"),
        (["--sekonds", "3"], r"No such option.*--sekonds.*packforcing render --help"),
        (["--bundle", "missing"], "missing is not a bundle.*packforcing export"),
    ],
)
def test_render_refuses_what_cannot_work(tiny_bundle, out, args, message):
    changes = dict(zip(args[::2], args[1::2]))
    prompt = changes.pop("--prompt", PROMPT)
    options = {"--bundle": str(tiny_bundle), "--seconds": "1", "--out": f"{out}/a.mp4", **changes}
    result = run("render", prompt, *(word for pair in options.items() for word in pair))
    assert_one_line(result.exit_code, result.stdout, result.stderr, message)
    assert not any(out.iterdir())


def test_demo_makes_no_folder_for_a_refused_request(tiny_bundle, out):
    result = run("demo", "--prompt", "zzz", "--bundle", tiny_bundle, "--out", out / "new")
    assert_one_line(result.exit_code, result.stdout, result.stderr, "does not know 'zzz'")
    assert not any(out.iterdir())


def test_render_without_a_prompt_or_an_output_is_refused():
    result = run("render", "--out", "a.mp4")
    assert_one_line(result.exit_code, result.stdout, result.stderr, "Missing argument 'PROMPT'")
    result = run("render", PROMPT)
    assert_one_line(result.exit_code, result.stdout, result.stderr, "Missing option '--out'")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.avi", r"'\.avi' is not a kind of video"),
        ("missing/a.mp4", "there is no folder"),
        ("taken.mp4", "a folder has that name"),
        ("full/", "not empty"),
        (".mp4", "a suffix without a name"),
        ("x" * 300 + ".mp4", "File name too long"),
    ],
)
def test_an_impossible_output_is_refused(tiny_bundle, tmp_path, name, message):
    (tmp_path / "taken.mp4").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    result = run("render", PROMPT, "--bundle", tiny_bundle, "--out", f"{tmp_path}/{name}")
    assert_one_line(result.exit_code, result.stdout, result.stderr, message)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody can write to")
@pytest.mark.parametrize(
    "command",
    [
        ("render", PROMPT, "--out", "/proc/a.mp4"),
        ("demo", "--out", "/proc/demo"),
        ("demo", "--out", "/proc"),
    ],
)
def test_an_unwritable_output_is_refused(tiny_bundle, command):
    result = run(*command, "--bundle", tiny_bundle)
    assert_one_line(result.exit_code, result.stdout, result.stderr, "cannot (write|make)")


def test_a_full_disk_is_refused_before_rendering(tiny_bundle, out, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    result = run("render", PROMPT, "--bundle", tiny_bundle, "--out", out / "a.mp4")
    assert_one_line(result.exit_code, result.stdout, result.stderr, r"has 1\.0 MB left")
    assert not any(out.iterdir())


def test_rendering_without_onnxruntime_names_the_package(tiny_bundle, out):
    result = run_without("onnxruntime", "render", PROMPT, "--bundle", tiny_bundle,
                         "--out", out / "a.mp4")  # fmt: skip
    message = "onnxruntime, which is not installed: pip install"
    assert_one_line(result.returncode, result.stdout, result.stderr, message)
    assert not any(out.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a red stra", "--out", "a.mp4"], "did you mean 'star'"),
        ([PROMPT, "--out", "a.avi"], "is not a kind of video"),
        ([PROMPT, "--out", "a.mp4", "--seconds", "0"], "seconds must be above 0"),
        ([PROMPT, "--out", "a.mp4", "--policy", "forget"], "unknown policy"),
        ([PROMPT, "--out", "a.mp4", "--start", "missing.png"], "cannot start from missing"),
    ],
)
def test_render_is_refused_before_a_graph_is_loaded(tiny_bundle, args, message):
    # were a graph loaded first, the missing library would be the complaint
    result = run_without("onnxruntime", "render", "--bundle", tiny_bundle, *args)
    assert_one_line(result.returncode, result.stdout, result.stderr, message)


def call_in_block(monkeypatch, number: int, action) -> None:
    """Calls `action` in the middle of a block."""
    commit, blocks = Rollout.commit, []

    def patched(rollout: Rollout, **how: bool) -> None:
        blocks.append(rollout)
        if len(blocks) == number:
            action()
        commit(rollout, **how)

    monkeypatch.setattr(Rollout, "commit", patched)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "frames/"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_in_the_middle_of_a_block_and_resume_finishes(
    tiny_bundle, out, monkeypatch, name, number
):
    call_in_block(monkeypatch, 3, lambda: signal.raise_signal(number))
    handler = signal.getsignal(number)
    command = "render", PROMPT, "--bundle", tiny_bundle, "--out", f"{out}/{name}", "--seconds", 6
    result = run(*command)
    assert (result.exit_code, result.stdout) == (128 + number, "")
    assert re.fullmatch(
        r"stopped after 2 of 5 blocks; finished blocks are in .*\.render: resume it with the same "
        r"command and --resume\n",
        result.stderr,
    )
    assert signal.getsignal(number) is handler
    assert [path.name for path in out.iterdir()] == [f"{name.rstrip('/')}.render"]
    result = run(*command)
    assert_one_line(result.exit_code, result.stdout, result.stderr, "unfinished render.*--resume")
    result = run(*command, "--resume")
    assert result.exit_code == 0, result.stderr
    assert [path.name for path in out.iterdir()] == [name.rstrip("/")]


@pytest.mark.parametrize("name", ["a.mp4", "frames/"])
def test_a_second_signal_stops_at_once(tiny_bundle, out, monkeypatch, name):
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    call_in_block(monkeypatch, 3, twice)
    result = run("render", PROMPT, "--bundle", tiny_bundle, "--out", f"{out}/{name}")
    assert result.exit_code == 130
    assert result.stderr.strip() == "interrupted: no unfinished file has its final name"
    assert [path.name for path in out.iterdir()] == [f"{name.rstrip('/')}.render"]


@pytest.mark.parametrize(
    ("moment", "earlier_frames"),
    [("add_latents", 0), ("segments", 48), ("remove", 48)],
    ids=["before a block", "before the segments are joined", "when the video has its name"],
)
def test_demo_resumes_and_reports_what_it_generated(
    tiny_bundle, out, monkeypatch, moment, earlier_frames
):
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    command = "demo", "--bundle", tiny_bundle, "--out", out, "--seconds", 6
    with monkeypatch.context() as patch:
        patch.setattr(RenderFolder, moment, interrupt)
        assert run(*command).exit_code == 130
    result = run(*command)
    assert result.exit_code == 0, result.stderr
    page = (out / "demo.html").read_text(encoding="utf-8")
    speed = "48 frames, all from an earlier run" if earlier_frames else "48 frames, 6.0 s of video"
    assert f"demo.mp4 ({speed}" in result.stdout
    resumed = f"after {earlier_frames} frames; none is new"
    assert (resumed in page, "real time" in page) == (bool(earlier_frames), not earlier_frames)
    assert sorted(path.name for path in out.iterdir()) == ["demo.html", "demo.mp4"]
