"""How the program begins and ends: standard streams that are missing or fail, and signals."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from packforcing.app.cli import main
from packforcing.app.cli.group import COMMANDS, WRITING
from packforcing.checkpoints.published import PARTS
from packforcing.errors import BackendError
from packforcing.runtime import demo_bundle
from packforcing.runtime.rollout import Rollout
from tests.helpers import PROMPT, run

PROGRAM = [sys.executable, "-m", "packforcing.app.cli"]
posix = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell and its devices")
NO_READER = 141

# What a shell does with the streams of a command, and whether its standard output arrives.
REDIRECTIONS = {
    "no stderr": ("2>&-", True),
    "no streams": ("<&- >&- 2>&-", False),
    "full, no stdin": (">/dev/full 2>&1 <&-", False),
}


def start(redirection: str, *args: object) -> subprocess.Popen[bytes]:
    """Start a command in a shell that redirects its streams."""
    words = ["sh", "-c", f'exec "$@" {redirection}', "sh", *PROGRAM, *map(str, args)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def plain_video(tiny_bundle, tmp_path_factory) -> bytes:
    """What `render` writes to an .mp4 whose streams are all there."""
    path = tmp_path_factory.mktemp("plain") / "a.mp4"
    assert run("render", PROMPT, "--bundle", tiny_bundle, "--seconds", 1, "--out", path)
    return path.read_bytes()


@posix
@pytest.mark.parametrize(("redirection", "arrives"), REDIRECTIONS.values(), ids=REDIRECTIONS)
def test_the_exit_code_is_of_the_result_whatever_the_streams(
    tiny_bundle, out, plain_video, redirection, arrives
):
    """The video is the result of `render`; the words are that of `models` and of --json."""
    video = "--bundle", tiny_bundle, "--seconds", 1, "--threads", 1, "--out"
    processes = [
        start(redirection, "render", PROMPT, *video, out / "a.mp4"),
        start(redirection, "render", PROMPT, *video, out / "b.mp4", "--json"),
        start(redirection, "models"),
        start(redirection, "render", "--help"),
        start(redirection, "render", "xyz", *video, out / "c.mp4"),
    ]
    errors = [process.communicate()[1] for process in processes]
    words = 0 if arrives else 2
    assert [process.returncode for process in processes] == [0, words, words, words, 2], errors
    assert not any(b"Traceback" in text or b"Exception" in text for text in errors)
    # nothing that a library printed is in a video: descriptors 0 to 2 were not free for it
    assert (out / "a.mp4").read_bytes() == (out / "b.mp4").read_bytes() == plain_video
    assert sorted(path.name for path in out.iterdir()) == ["a.mp4", "b.mp4"]


def full() -> io.TextIOWrapper:
    return open("/dev/full", "w")


def no_reader() -> io.TextIOWrapper:
    read, write = os.pipe()
    os.close(read)
    return open(write, "w")


def ascii_only() -> io.TextIOWrapper:
    return open(os.devnull, "w", encoding="ascii")


STREAMS = {  # a stream, and the exit code of a command whose result are its words
    "missing": (lambda: None, 2),
    "full": (full, 2),
    "no reader": (no_reader, NO_READER),
    "ascii": (ascii_only, 0),
}


@pytest.fixture
def arguments(tiny_bundle, out, tmp_path):
    """Arguments of commands that take a second at most."""
    source = tmp_path / "source"
    for path in PARTS["taew2_1"].files:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(b"weights")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT}\n")
    video = "--bundle", tiny_bundle, "--seconds", 1
    return {
        "demo": (*video, "--out", out),
        "render": (PROMPT, *video, "--out", out / "\u8996.mp4"),
        "models": (),
        "fetch": ("taew2_1", "--from", source, "--out", out),
        "export": ("--model", "demo", "--out", out / "bundle"),
        "calibrate": (*video, "--prompts", prompts, "--out", out / "a.safetensors"),
        "quantize": ("--bundle", demo_bundle(), "--weight-dtype", "int8", "--out", out / "small"),
        "inspect": ("--bundle", tiny_bundle),
        "verify": ("--bundle", tiny_bundle, "--out", out),
        "doctor": (),
        "plan": ("--picture", out / "plan.png"),
        "compare": (*video, "--prompts", prompts, "--policy", "sink-window", "--out", out),
    }


@posix
@pytest.mark.parametrize(("stream", "words_code"), STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize(
    "name",
    ("demo", "render", "models", "fetch", "calibrate", "quantize", "inspect", "doctor", "plan"),
)
def test_no_stream_ends_a_command(arguments, monkeypatch, name, stream, words_code):
    monkeypatch.setattr(sys, "stdout", stream())
    monkeypatch.setattr(sys, "stderr", stream())
    before = sys.stdout, sys.stderr
    with pytest.raises(SystemExit) as ended:
        main.main([name, *map(str, arguments[name])])
    assert (ended.value.code or 0) == (0 if name in WRITING else words_code)
    assert (sys.stdout, sys.stderr) == before


def test_json_is_ascii_and_no_command_is_forgotten(arguments, tiny_bundle):
    assert COMMANDS.keys() > WRITING
    result = run("render", *arguments["render"], "--json")
    assert result.stdout.isascii() and json.loads(result.stdout)["path"].endswith("\u8996.mp4")


# Signals at a known point


SIGNALS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "terminal closed"}
MOMENTS = {  # the first call that a command makes when a part of its result is on the disk
    "fetch": "packforcing.checkpoints.fetch._matches",
    "export": "packforcing.export.exporter.save_graph",
    "calibrate": "packforcing.files.flush",
    "quantize": "packforcing.calibration.quantizer.lint",
    "verify": "packforcing.app.reports.verify.write_file",
    "plan": "packforcing.files.flush",
    "compare": "packforcing.evaluation.compare.write_file",
}


def raise_when_called(monkeypatch, function: str, number: int) -> None:
    monkeypatch.setattr(function, lambda *args, **options: signal.raise_signal(number))


@pytest.mark.parametrize("name", MOMENTS)
def test_a_signal_ends_a_command_in_one_line_and_removes_what_is_unfinished(
    arguments, out, monkeypatch, name
):
    number = list(SIGNALS)[len(name) % 3]
    if not hasattr(signal, number):
        pytest.skip(f"there is no {number} here")
    handler = signal.getsignal(getattr(signal, number))
    with monkeypatch.context() as patch:
        raise_when_called(patch, MOMENTS[name], getattr(signal, number))
        result = run(name, *arguments[name])
    assert result.exit_code == 128 + getattr(signal, number), result.output
    last = f"{SIGNALS[number]}: no unfinished file has its final name"
    assert result.stderr.splitlines()[-1] == last and "Traceback" not in result.stderr
    assert signal.getsignal(getattr(signal, number)) is handler
    assert not list(out.rglob("*.partial-*"))
    assert not {path.name for path in out.iterdir()} & {"a.safetensors", "bundle", "small"}


@pytest.mark.parametrize("number", SIGNALS)
def test_a_demo_that_is_stopped_resumes_with_the_same_command(
    tiny_bundle, out, monkeypatch, number
):
    if not hasattr(signal, number):
        pytest.skip(f"there is no {number} here")
    command = "demo", "--bundle", tiny_bundle, "--out", out, "--seconds", 6
    commit, blocks = Rollout.commit, []

    def patched(rollout: Rollout, **how: bool) -> None:
        blocks.append(rollout)
        if len(blocks) == 3:
            signal.raise_signal(getattr(signal, number))
        commit(rollout, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Rollout, "commit", patched)
        result = run(*command)
    assert result.exit_code == 128 + getattr(signal, number)
    assert re.fullmatch(
        r"stopped after 2 of 5 blocks; .*: resume it with the same command\n", result.stderr
    )
    assert run(*command).exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == ["demo.html", "demo.mp4"]


@posix
def test_ignored_signals_stay_ignored(arguments, out):
    """As under `nohup`, which ignores SIGHUP."""
    code = """if True:
        import signal, sys
        from packforcing import files
        from packforcing.app.cli import main
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        flush = files.flush
        files.flush = lambda path: signal.raise_signal(signal.SIGHUP) or flush(path)
        main()"""
    command = [sys.executable, "-c", code, "plan", *map(str, arguments["plan"])]
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert (out / "plan.png").is_file()


# Ctrl-C while modules are imported

HOOK = """
import os, signal, sys

class Interrupt:  # at the import with this number
    imports = 0

    def find_spec(self, name, path=None, target=None):
        Interrupt.imports += name.startswith("packforcing.app.cli.") or Interrupt.imports > 0
        if Interrupt.imports == int(os.environ["INTERRUPTED_IMPORT"]):
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
from packforcing.app.cli import main
main()
"""


@posix
def test_an_interrupt_of_any_import_is_one_line(arguments):
    """From the first module after the program's own name; before it, Python answers."""
    grid = [1, 2, 4, 6, 15, 40, 90, 140, 200, 260]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOOK, "plan", "--json"],
            env={**os.environ, "INTERRUPTED_IMPORT": str(number)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in grid
    ]  # fmt: skip
    for number, process in zip(grid, processes):
        printed, errors = process.communicate()
        assert process.returncode == 130 and not printed, (number, errors)
        lines = ["", "interrupted: no unfinished file has its final name"]
        assert errors.strip() in lines[number > 4 :], number


def test_an_interrupt_in_a_callback_that_drops_exceptions_is_not_lost(monkeypatch, capfd):
    """As in those of weak references, of which every import has one."""

    class Dropping:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def diagnose(folder: object) -> None:
        Dropping()
        while True:
            pass

    monkeypatch.setattr("packforcing.runtime.doctor.diagnose", diagnose)
    result = run("doctor")
    assert result.exit_code == 128 + signal.SIGTERM
    last = "terminated: no unfinished file has its final name"
    assert result.stderr.strip() == last and capfd.readouterr() == ("", "")


def test_an_interrupt_that_a_library_turns_into_an_error_is_an_interrupt(monkeypatch):
    """As ONNX Runtime does while it is loaded: "initialization failed"."""

    def diagnose(folder: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise BackendError("initialization failed") from None

    monkeypatch.setattr("packforcing.runtime.doctor.diagnose", diagnose)
    result = run("doctor")
    assert result.exit_code == 130
    assert result.stderr == "interrupted: no unfinished file has its final name\n"
