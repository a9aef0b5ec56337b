"""Read the file of a batch: JSONL, CSV with a header, or text with a prompt a line.

A job has a prompt, or the file of an embedding or of a schedule; paths are relative to the file of
the batch. All that can be wrong with a job is found here, before anything is loaded.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from packforcing.config import Config, Policy
from packforcing.embeddings import SUFFIX, Embedding, load_embedding
from packforcing.errors import ConfigError, PackForcingError, PromptError
from packforcing.files import check_name
from packforcing.prompts import (
    Switch,
    Timeline,
    plan_prompts,
    plan_switches,
    prompt_words,
    read_schedule,
)
from packforcing.runtime.request import check_memory, check_seconds, check_seed, check_start
from packforcing.runtime.start_clip import StartClip, load_video_start
from packforcing.text_files import decode_text

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")  # a safe name of files on every system
_SLUG_LENGTH = 40
_MAX_FILE_BYTES = 1 << 28


@dataclass(frozen=True)
class BatchJob:
    """A job of a batch, checked.

    Attributes:
        id: Names its files.
        prompts: The schedule, words or embeddings.
        seconds: Length of the video.
        seed: Of the noise.
        policy: Which history blocks read; None: the bundle's.
        start: The picture or clip that the video begins with.
    """

    id: str
    prompts: list[Switch]
    seconds: float
    seed: int
    policy: Policy | None
    start: Path | None


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """What a line says."""

    id: str | None = None
    prompt: str | None = None
    embedding: str | None = None
    schedule: str | None = None
    seconds: float | None = None
    seed: int | None = None
    seeds: list[int] | None = None
    start: str | None = None
    policy: str | None = None


class BatchFile:
    """Checks the lines of a file, one after the other.

    Attributes:
        jobs: The jobs that can be rendered.
        mistakes: A line of text for each line of the file that cannot.
    """

    def __init__(
        self,
        path: Path,
        config: Config,
        policies: Mapping[str, Policy],
        *,
        seconds: float,
        seed: int,
        policy: str | None,
        encoding: bool,
        one_policy: bool,
    ) -> None:
        """Read a file.

        Args:
            path: The file.
            config: Of the bundle.
            policies: By name.
            seconds: Of jobs that state none; as are `seed` and the name `policy`.
            encoding: Whether words are encoded later, so that they are not looked at here.
            one_policy: Whether the backend's engines fit the bundle's policy alone.

        Raises:
            PromptError: The file cannot be read, or has no job.
        """
        self.jobs: list[BatchJob] = []
        self.mistakes: list[str] = []
        self._config, self._policies = config, policies
        self._folder = path.absolute().parent
        self._defaults = _Entry(seconds=seconds, seed=seed, policy=policy)
        self._encoding, self._one_policy = encoding, one_policy
        self._lines: dict[str, int] = {}  # by ID in lower case
        self._embedding = cache(load_embedding)
        self._start: tuple[Path, StartClip] | None = None  # the latest: jobs often share theirs
        unnamed: list[tuple[int, BatchJob]] = []
        for line, entry in _read_entries(path):
            try:
                if isinstance(entry, str):
                    raise PromptError(entry)
                job = self._check(entry)
                if entry.id is None:
                    unnamed += [(line, job) for job in _with_seeds(job, entry)]
                else:
                    self._add(line, entry.id, [*_with_seeds(job, entry)])
            except PackForcingError as error:
                self.mistakes.append(f"{path}, line {line}: {error}")
        for line, job in unnamed:  # after those whose IDs are fixed
            if job.id.lower() in self._lines:
                job = replace(job, id=f"{job.id}-{line}")
            try:
                self._add(line, job.id, [job])
            except PackForcingError as error:
                self.mistakes.append(f"{path}, line {line}: {error}")
        if not (self.jobs or self.mistakes):
            raise PromptError(f"{path} has no job: write one in each line")

    def _add(self, line: int, name: str, jobs: list[BatchJob]) -> None:
        for job in jobs:
            if not ID.fullmatch(job.id):
                raise ConfigError(
                    f"the id {name!r:.60} is no safe file name: use up to 100 letters, digits, - "
                    "and _, a letter or digit first"
                )
            check_name(Path(f"{job.id}.mp4"))
            if other := self._lines.get(job.id.lower()):
                raise ConfigError(
                    f"the id '{job.id}' is that of line {other} as well: IDs name files, and "
                    "differ by more than upper case"
                )
        self._lines |= {job.id.lower(): line for job in jobs}
        self.jobs += jobs

    def _check(self, entry: _Entry) -> BatchJob:
        """Check all of a line but its ID, and return a job with its first seed."""
        sources = [entry.prompt, entry.embedding, entry.schedule]
        if sum(source is not None for source in sources) != 1:
            raise PromptError("a job has one of prompt, embedding and schedule")
        if entry.seed is not None and entry.seeds is not None:
            raise ConfigError("a job has seed or seeds, not both")
        seeds = entry.seeds
        if seeds is not None and (not seeds or len({*seeds}) < len(seeds)):
            raise ConfigError("seeds lists different numbers, one at least")
        for seed in seeds or [_either(entry.seed, self._defaults.seed)]:
            check_seed(seed)
        seconds = check_seconds(self._config, _either(entry.seconds, self._defaults.seconds))
        policy = self._policy(entry.policy or self._defaults.policy)
        prompts = self._prompts(entry)
        config = msgspec.structs.replace(self._config, policy=policy or self._config.policy)
        frames = config.frames(seconds)
        blocks, switches = plan_switches(prompts, config, frames)
        if not self._encoding:
            plan_prompts(prompts, config, frames)
        check_memory(self._config, config.policy, blocks)
        start = None if entry.start is None else self._folder / entry.start
        if start is not None:
            if self._start is None or self._start[0] != start:
                self._start = start, load_video_start(start, config)
            check_start(config, self._start[1].frames, Timeline(blocks, switches, {}, {}))
        words = prompt_words(prompts[0].prompt)
        name = entry.id or _slug(words) or _slug(Path(entry.embedding or "job").stem)
        seed = seeds[0] if seeds else _either(entry.seed, self._defaults.seed)
        return BatchJob(name, prompts, seconds, seed, policy, start)

    def _policy(self, name: str | None) -> Policy | None:
        if name is None:
            return None
        if name not in self._policies:
            raise ConfigError(
                f"unknown policy '{name}'; known policies: {', '.join(self._policies)}"
            )
        policy = self._policies[name]
        if self._one_policy and policy != self._config.policy:
            raise ConfigError(
                f"the engines fit the bundle's policy alone, {self._config.policy}: leave out "
                f"the policy {name}"
            )
        return policy

    def _prompts(self, entry: _Entry) -> list[Switch]:
        if entry.schedule is not None:
            return read_schedule(self._folder / entry.schedule)
        if entry.embedding is not None:
            return [Switch(0, self._embedding(self._folder / entry.embedding))]
        if not (entry.prompt or "").strip():
            raise PromptError("the prompt is empty")
        return [Switch(0, entry.prompt or "")]


def words_of(jobs: list[BatchJob]) -> list[str]:
    """Return the prompts of jobs that are words, each once."""
    prompts = (switch.prompt for job in jobs for switch in job.prompts)
    return [*dict.fromkeys(prompt for prompt in prompts if isinstance(prompt, str))]


def with_embeddings(job: BatchJob, embeddings: Mapping[str, Embedding]) -> BatchJob:
    """Replace the words of a job by their embeddings, under the words as they were written."""
    prompts = [
        replace(switch, prompt=replace(embeddings[switch.prompt], prompt=switch.prompt))
        if isinstance(switch.prompt, str)
        else switch
        for switch in job.prompts
    ]
    return replace(job, prompts=prompts)


def _read_entries(path: Path) -> Iterator[tuple[int, _Entry | str]]:
    """Yield the number of each line with its entry, or with what is wrong with it."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ValueError("it is larger than any list of jobs")
        text = decode_text(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PromptError(f"cannot read jobs from {path}: {reason}") from error
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            yield from _read_jsonl(text)
        case ".csv":
            yield from _read_csv(text, path)
        case _:
            yield from _read_prompts(text)


def _read_jsonl(text: str) -> Iterator[tuple[int, _Entry | str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, msgspec.json.decode(line, type=_Entry)
            except (ValueError, RecursionError) as error:
                yield number, _explain(error)


def _read_csv(text: str, path: Path) -> Iterator[tuple[int, _Entry | str]]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    head: list[str] = []
    try:
        for cells in rows:
            if not any(map(str.strip, cells)):
                continue
            if not head:
                head = [cell.strip().lower() for cell in cells]
                unknown = [name for name in head if name not in _Entry.__struct_fields__]
                if unknown or len({*head}) < len(head):
                    names = ", ".join(_Entry.__struct_fields__)
                    raise PromptError(
                        f"{path}, line {rows.line_num}: a CSV file begins with the names of its "
                        f"columns, each once, out of {names}"
                    )
            elif len(cells) > len(head):
                yield rows.line_num, f"{len(cells)} cells under {len(head)} names of columns"
            else:
                yield rows.line_num, _row_entry(dict(zip(head, map(str.strip, cells))))
    except csv.Error as error:
        yield rows.line_num, f"no CSV: {error}"


def _row_entry(row: dict[str, str]) -> _Entry | str:
    fields: dict[str, Any] = {name: cell for name, cell in row.items() if cell}
    if "seeds" in fields:
        fields["seeds"] = re.split(r"[\s,;]+", fields["seeds"])
    try:
        return msgspec.convert(fields, _Entry, strict=False)
    except ValueError as error:
        return _explain(error)


def _read_prompts(text: str) -> Iterator[tuple[int, _Entry | str]]:
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if line.endswith(SUFFIX):
            yield number, _Entry(embedding=line)
        elif line.endswith(".toml"):
            yield number, _Entry(schedule=line)
        elif line:
            yield number, _Entry(prompt=line)


def _explain(error: Exception) -> str:
    return f"{error}; a job has {', '.join(_Entry.__struct_fields__)}"


def _with_seeds(job: BatchJob, entry: _Entry) -> Iterator[BatchJob]:
    """Yield a job for each seed of a line."""
    if entry.seeds is None:
        yield job
    for seed in entry.seeds or ():
        yield replace(job, id=f"{job.id}-s{seed}", seed=seed)


def _either(value: Any, default: Any) -> Any:
    return default if value is None else value


def _slug(words: str) -> str:
    """Return words as a part of a file name; "" where no ASCII letter or digit is left."""
    letters = unicodedata.normalize("NFKD", words).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", letters)[: _SLUG_LENGTH + 1].strip("-")
