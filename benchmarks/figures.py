"""Measure the numbers and pictures of README.md and docs/, and write them there.

    python -m benchmarks.figures                # every run that is missing or out of date: days
    python -m benchmarks.figures --below 5      # those expected to take less than 5 minutes
    python -m benchmarks.figures --only plan    # one of them
    python -m benchmarks.figures --list         # runs, their duration and their state
    python -m benchmarks.figures --write        # nothing is measured; the documents are filled

`benchmarks/figure_runs.py` lists the runs: commands, and what is read from their results. Values
go to docs/figures.json, and from there into the documents, between markers that no reader sees:
`<!-- figure:RUN.VALUE -->109 ms<!-- /figure -->`. A run counts as done for the code, the shipped
weights and the commands that it was made with. An interrupted run continues where its commands
do. Results and logs lie in out/figures/.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec

from benchmarks.figure_runs import ROOT, RUNS, Run
from benchmarks.figure_values import Results
from packforcing.errors import ConfigError, PackForcingError
from packforcing.files import file_sha256, write_file
from packforcing.machine import cpu_cores, processor_name

FIGURES = ROOT / "docs" / "figures.json"
ROOMS = "packforcing", "runtime", "export", "calibration", "evaluation", "app"
MARKER = re.compile(r"<!-- figure:([\w-]+)\.([\w.-]+) -->(.*?)<!-- /figure -->", re.DOTALL)
NOT_REPEATED = "not re-run with this code"  # status of values from before this script


class Record(msgspec.Struct):
    """A run's entry in docs/figures.json.

    Attributes:
        commands: The commands, as a reader would type them.
        minutes: How long they take on the machine of the last run, about.
        status: "measured", or why it is not.
        key: Hash of code, weights and commands; "" where the values are older than this script.
        values: Text by name, as it stands in the documents.
        pictures: SHA-256 by path.
    """

    commands: list[str]
    minutes: float
    status: str
    key: str = ""
    date: str = ""
    commit: str = ""
    machine: str = ""
    values: dict[str, str] = {}
    pictures: dict[str, str] = {}


def documents() -> list[Path]:
    """Return the files that may hold figures."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def read_records() -> dict[str, Record]:
    """Return the entries of docs/figures.json, by run."""
    return msgspec.json.decode(FIGURES.read_bytes(), type=dict[str, Record])


def write_records(records: Mapping[str, Record]) -> None:
    """Write docs/figures.json, runs in the order of `RUNS`."""
    ordered = {name: records[name] for name in RUNS if name in records}
    write_file(FIGURES, msgspec.json.format(msgspec.json.encode(ordered), indent=1) + b"\n")


def fill(text: str, records: Mapping[str, Record]) -> str:
    """Return a document with the values of its markers.

    Args:
        text: The document.
        records: Entries by run.

    Raises:
        ConfigError: A marker names no value.
    """

    def value_of(match: re.Match[str]) -> str:
        run, name, old = match.groups()
        if run not in records or name not in records[run].values:
            raise ConfigError(f"docs/figures.json has no value for the marker {run}.{name}")
        value = records[run].values[name]
        margin = "\n\n" if old.startswith("\n") else ""  # a table or a listing
        return f"<!-- figure:{run}.{name} -->{margin}{value}{margin}<!-- /figure -->"

    return MARKER.sub(value_of, text)


def markers(text: str) -> Iterator[tuple[str, str]]:
    """Yield the names of a document's figures, run and value."""
    return ((match[1], match[2]) for match in MARKER.finditer(text))


def write_documents() -> None:
    """Fill every document from docs/figures.json."""
    records = read_records()
    for path in documents():
        text = path.read_text(encoding="utf-8")
        filled = fill(text, records)
        if filled != text:
            write_file(path, filled.encode())
            print(f"{path.relative_to(ROOT)} has new figures")


def code_digest(*folders: str) -> hashlib._Hash:
    """Return a hash of the code and the weights in folders of the repository."""
    digest = hashlib.sha256()
    for folder in map(ROOT.joinpath, folders):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".safetensors", ".onnx", ".data", ".json", ".toml"):
                digest.update(f"{path.relative_to(ROOT)} {file_sha256(path)}\n".encode())
    return digest


def run_key(run: Run) -> str:
    """Return a hash of all that decides about a run's values: code, weights and commands."""
    digest = code_digest(*ROOMS)
    for name in (*run.needs, None):
        digest.update(msgspec.json.encode((RUNS[name] if name else run).commands))
    return digest.hexdigest()[:16]


def measure(name: str, folders: Mapping[str, Path]) -> Record:
    """Execute the commands of a run and read its values.

    Args:
        name: One of `RUNS`.
        folders: A folder of results for this run and for those that it needs.

    Raises:
        ConfigError: A command failed; its log is named.
    """
    run, folder = RUNS[name], folders[name]
    folder.mkdir(parents=True, exist_ok=True)
    places = {"out": folder, **{need: folders[need] for need in run.needs}}
    began = time.monotonic()
    for number, command in enumerate(run.commands):
        words = [sys.executable, *(_placed(word, places) for word in command)]
        log, cost_file = folder / f"{number}.log", folder / f"{number}.json"
        if cost_file.exists():  # done before an interruption
            continue
        print(f"{name}: {' '.join(words[1:])}", flush=True)
        started = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
            _, code, usage = os.wait4(process.pid, 0)
        if code:
            raise ConfigError(f"a command of the run '{name}' failed; its log is {log}")
        cost = {"seconds": time.monotonic() - started, "peak_bytes": usage.ru_maxrss * 1024}
        write_file(cost_file, msgspec.json.encode(cost))
    values, pictures = run.extract(Results(folder)), {}
    for target, draw in run.pictures.items():
        draw(folder, ROOT / target)
        pictures[target] = file_sha256(ROOT / target)
    return Record(
        commands=[readable(command) for command in run.commands],
        minutes=round((time.monotonic() - began) / 60, 1),
        status="measured",
        key=run_key(run),
        date=datetime.date.today().isoformat(),
        commit=_git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--short") else ""),
        machine=machine(),
        values=values,
        pictures=pictures,
    )


def _placed(word: str, folders: Mapping[str, Path]) -> str:
    """A word of a command with the folders that it names in braces."""
    for name, folder in folders.items():
        word = word.replace(f"{{{name}}}", str(folder))
    return word


def readable(command: Iterable[str]) -> str:
    """Return a command as a reader would type it."""
    text = " ".join(f'"{word}"' if re.search(r"[\s;]", word) else word for word in command)
    text = text.replace("-m packforcing.app.cli ", "packforcing ").replace("-m pytest ", "pytest ")
    return text if text.startswith(("packforcing ", "pytest ")) else f"python {text}"


def machine() -> str:
    """Describe this machine in a few words."""
    return f"{cpu_cores()} cores, {processor_name()}, Python {platform.python_version()}"


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--only", action="append", choices=RUNS, metavar="RUN", help="these alone")
    options.add_argument("--below", type=float, metavar="MINUTES", help="shorter ones alone")
    options.add_argument("--anew", action="store_true", help="repeat what is done, too")
    options.add_argument("--list", action="store_true", help="print the runs and their state")
    options.add_argument("--write", action="store_true", help="fill the documents, measure nothing")
    args = options.parse_args()
    records = read_records()
    keys = {name: run_key(run) for name, run in RUNS.items()}
    if args.list:
        for name, run in RUNS.items():
            record = records.get(name)
            state = "never run" if record is None else record.status
            if record is not None and record.key not in ("", keys[name]):
                state = "measured with other code or weights"
            print(f"{name:20}{run.minutes:8g} min  {state}")
        return
    if not args.write:
        folders = {name: ROOT / "out" / "figures" / f"{name}-{keys[name][:8]}" for name in RUNS}
        chosen = [
            name
            for name, run in RUNS.items()
            if (not args.only or name in args.only)
            and (args.below is None or run.minutes < args.below)
            and (args.anew or name not in records or records[name].key != keys[name])
        ]
        for name in dict.fromkeys(need for one in chosen for need in (*RUNS[one].needs, one)):
            if args.anew:
                shutil.rmtree(folders[name], ignore_errors=True)
            records[name] = measure(name, folders)
            write_records(records)
            write_documents()
    write_documents()


if __name__ == "__main__":
    try:
        main()
    except PackForcingError as error:
        sys.exit(f"error: {error}")
