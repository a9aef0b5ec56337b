"""Comparisons of policies: pairs, statistics, prompts and the page."""

import html.parser
import importlib
import json
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import psutil
import pytest
import torch
from click.testing import CliRunner

from packforcing import Policy, model_config
from packforcing.app.cli import main
from packforcing.app.reports.compare import MIN_PROMPTS, SAMPLES, write_report
from packforcing.app.reports.plots import measure_plots
from packforcing.errors import ConfigError
from packforcing.evaluation import compare, pairs
from packforcing.evaluation.compare import Comparison, end_values, summarize
from packforcing.evaluation.demo_judge import places
from packforcing.evaluation.intervals import Estimate, estimate_mean
from packforcing.evaluation.measures import Evaluation, Segment, evaluate_video
from packforcing.evaluation.policies import comparison_policies
from packforcing.evaluation.prompt_sets import Prompt, draw_prompts, read_prompts
from packforcing.model import load_model
from packforcing.reference import rollout
from packforcing.runtime import Session, demo_bundle
from packforcing.runtime.allocations import archive_bytes, memory_by_purpose
from packforcing.runtime.cache import Cache
from packforcing.runtime.rollout import Rollout
from packforcing.runtime.video_files import open_video
from packforcing.sampler import draw_noise
from packforcing.selection import affinity, likeness, select
from packforcing.words import encode_words
from tests.helpers import assert_one_line, run_without

NAMES = ("packforcing", "sink-window")
PROMPTS = ("a red circle over plain navy", "a white star over plain sand and teal")
SECONDS = 2.5  # five blocks or six: mid blocks are read from the fifth on
SHORT = 0.25  # one block


def run(folder, seconds=SECONDS, *more):
    options = ["--policies", ",".join(NAMES), "--seconds", seconds, "--out", folder, "--threads", 1]
    options += more
    return CliRunner().invoke(
        main, ["compare", *map(str, options), "--prompts", f"{folder}/prompts.txt"]
    )


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two prompts under two policies of the demo model: the folder and the result."""
    folder = tmp_path_factory.mktemp("compared")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    result = run(folder)
    assert result.exit_code == 0, result.output
    assert all(name in result.stdout for name in NAMES)
    return folder, msgspec.json.decode((folder / "compare.json").read_bytes(), type=Comparison)


def test_every_pair_is_what_render_and_evaluate_give(compared, tmp_path):
    folder, comparison = compared
    assert [(pair.policy, pair.prompt) for pair in comparison.pairs] == [
        (name, prompt) for name in NAMES for prompt in PROMPTS
    ]
    pair = comparison.pairs[3]
    policy = comparison_policies(model_config("demo"))[pair.policy]
    with Session.open(demo_bundle(), policy=policy, threads=1) as session:
        session.render(pair.prompt, SECONDS, tmp_path / "again.mp4", pair.seed)
    again = evaluate_video(tmp_path / "again.mp4", pair.prompt)
    assert again.values == pytest.approx(pair.evaluation.values, nan_ok=True)
    assert again.frames == pair.evaluation.frames == comparison.config.frames(SECONDS)
    assert evaluate_video(folder / pair.video, pair.prompt).segments == pair.evaluation.segments


def test_workers_give_the_same_pairs(compared, tmp_path):
    """Videos and measures are the same; the times and the memory of a process are its own."""
    folder, comparison = compared
    shutil.copy(folder / "prompts.txt", tmp_path)
    for pair in comparison.pairs[::3]:  # the first and the last are there
        (tmp_path / "videos").mkdir(exist_ok=True)
        for path in (folder / "videos").glob(f"{Path(pair.video).stem}.*"):
            shutil.copy(path, tmp_path / "videos")
    result = run(tmp_path, SECONDS, "--workers", 2)
    assert result.exit_code == 0, result.output
    shared = msgspec.json.decode((tmp_path / "compare.json").read_bytes(), type=Comparison)
    for pair, other in zip(comparison.pairs, shared.pairs, strict=True):
        assert (folder / pair.video).read_bytes() == (tmp_path / other.video).read_bytes()
        assert pair.read == other.read and pair.video == other.video
        assert other.evaluation.values == pytest.approx(pair.evaluation.values, nan_ok=True)


def test_every_policy_has_room_before_the_first_one_is_rendered(tmp_path, monkeypatch):
    chosen = {
        name: comparison_policies(model_config("demo"))[name] for name in (NAMES[0], "full-history")
    }
    sizes = [
        sum(memory_by_purpose(config).values())
        + archive_bytes(config, config.blocks(config.frames(600)))
        for config in (
            compare.config_for_video(model_config("demo"), p, 600) for p in chosen.values()
        )
    ]
    assert sizes[0] < sizes[1]
    machine = SimpleNamespace(total=sum(sizes) // 2)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    prompts = [Prompt(PROMPTS[0], PROMPTS[0], 0)]
    with pytest.raises(
        ConfigError, match=r"^full-history: this video needs .* of memory under its policy"
    ):
        compare.run_comparison(demo_bundle(), chosen, prompts, 600, tmp_path)
    assert not any(tmp_path.glob("videos/*"))


def test_engines_refuse_policies_of_other_contexts_before_the_first_is_rendered(tmp_path):
    by_name = comparison_policies(model_config("demo"))
    prompts = [Prompt(PROMPTS[0], PROMPTS[0], 0)]

    class Rendered(Exception):
        pass

    def render(renderer, on_share):
        raise Rendered

    def ask(*names):
        chosen = {name: by_name[name] for name in names}
        compare.run_comparison(
            demo_bundle(), chosen, prompts, 1, tmp_path, backend="tensorrt-rtx", render=render
        )

    for name in ("sliding-window", "packforcing-sink-0", "full-history"):
        with pytest.raises(ConfigError, match=rf"^engines fit .* leave out the policy {name}, or"):
            ask("packforcing", name)
    assert not any(tmp_path.iterdir())
    with pytest.raises(Rendered):
        ask("packforcing", "packforcing-last-step")  # a context of the same size


def test_tokens_read_are_those_the_cache_lays_out(compared):
    _, comparison = compared
    config = model_config("demo")
    for pair in comparison.pairs:
        policy = comparison.costs[pair.policy].policy
        cache = Cache(msgspec.structs.replace(config, policy=policy))
        valid = []
        for read in pair.read:
            if read:
                cache.select_mids(read)
            valid.append(cache.layout().valid)
            cache.commit()
        assert pair.tokens_read == valid
        assert len(valid) == len(pair.block_seconds) == config.blocks(config.frames(SECONDS))


def test_costs_are_the_plans(compared):
    _, comparison = compared
    config = model_config("demo")
    blocks = config.blocks(config.frames(SECONDS))
    for cost in comparison.costs.values():
        config = msgspec.structs.replace(config, policy=cost.policy)
        assert cost.archive == archive_bytes(config, blocks)
        with Session.open(demo_bundle(), policy=cost.policy) as session:
            policy = cost.policy.fit_to_video(blocks, config.policy)
            rollout = Rollout(msgspec.structs.replace(config, policy=policy), session.backend)
            assert cost.buffers > rollout.buffers.context.nbytes > 0
        assert cost.host_peak > cost.buffers


def test_only_what_is_missing_is_rendered_again(tmp_path, monkeypatch):
    rendered = []
    original = Session.render

    def render(self, prompt, seconds, path, *args, **kwargs):
        rendered.append(path.name)
        return original(self, prompt, seconds, path, *args, **kwargs)

    def again(names=NAMES, seed=0):
        rendered.clear()
        chosen = {name: comparison_policies(model_config("demo"))[name] for name in names}
        prompts = [Prompt(text, text, seed) for text in PROMPTS]
        compare.run_comparison(demo_bundle(), chosen, prompts, SHORT, tmp_path, threads=1)
        return rendered, json.loads((tmp_path / "compare.json").read_text())

    monkeypatch.setattr(Session, "render", render)
    first, comparison = again()
    assert len(first) == 4
    assert again() == ([], comparison)
    result, video = sorted((tmp_path / "videos").glob("sink-window-01-*"))
    result.write_text("{")  # damaged
    assert again()[0] == [video.name]
    video.unlink()
    assert again(NAMES[::-1])[0] == [video.name]
    assert len(again(NAMES[:1], seed=9)[0]) == 2
    assert again()[0] == []  # nothing was thrown away
    assert len(list((tmp_path / "videos").iterdir())) == 2 * 6


def test_an_interruption_keeps_what_is_finished(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    calls = []

    def second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate_video(*args)

    monkeypatch.setattr(pairs, "evaluate_video", second)
    result = run(tmp_path, SHORT)
    assert result.exit_code == 130, result.output
    assert not (tmp_path / "compare.json").exists() and not list(tmp_path.rglob(".*"))
    (finished,) = (tmp_path / "videos").glob("*.json")
    before = finished.read_bytes()
    assert run(tmp_path, SHORT).exit_code == 0
    assert len(calls) == 5 and finished.read_bytes() == before


# Statistics


def evaluation(value, count=2.0):
    values = {"flicker": value, "loop_closure": None if count == 0 else value, "returns": count}
    return Evaluation("v.mp4", None, 16, 160, 128, 128, values, [Segment(0, 10, values)])


def pair(policy, number, value, **extra):
    return compare.Pair(policy=policy, number=number, prompt="", seed=0, video="", read=[],
                        evaluation=evaluation(value, **extra), block_seconds=[], tokens_read=[],
                        host_peak=0)  # fmt: skip


def test_an_interval_is_as_wide_as_theory_has_it_and_always_the_same():
    values = np.random.default_rng(3).normal(5, 2, 400).tolist()
    estimate = estimate_mean(values)
    assert estimate == estimate_mean(values)
    half = 1.96 * np.std(values) / len(values) ** 0.5
    assert estimate.mean == pytest.approx(np.mean(values))
    assert (estimate.mean - estimate.low, estimate.high - estimate.mean) == pytest.approx(
        (half, half), rel=0.05
    )
    assert estimate_mean([4.0]) == Estimate(4.0, None, None, 1)
    assert estimate_mean([]) is None


def test_differences_are_taken_prompt_by_prompt():
    """Prompts that differ far more than policies do: only pairs show it."""
    values = np.random.default_rng(4).normal(0, 10, 12)
    change = np.random.default_rng(5).normal(0.5, 0.1, 12)
    pairs = [pair("a", i, values[i]) for i in range(12)]
    pairs += [pair("b", i, values[i] + change[i]) for i in range(12)]
    summary = summarize(pairs, None)
    assert summary["a"]["flicker"].difference is None
    assert summary["b"]["flicker"].value.low < 0 < summary["b"]["flicker"].value.high
    assert (
        0.4 < summary["b"]["flicker"].difference.low < summary["b"]["flicker"].difference.high < 0.6
    )


def test_a_prompt_without_a_value_is_left_out_of_both():
    pairs = [pair("a", 0, 1.0), pair("a", 1, 9.0), pair("b", 0, 2.0), pair("b", 1, 9.0, count=0)]
    summary = summarize(pairs, None)["b"]["loop_closure"]
    assert (summary.value.mean, summary.value.prompts) == (2.0, 1)
    assert (summary.difference.mean, summary.difference.prompts) == (1.0, 1)


def test_the_end_is_weighted_by_length_and_returns():
    segments = [
        Segment(0, 10, {"flicker": 9.0, "loop_closure": 0.9, "returns": 5.0}),
        Segment(10, 20, {"flicker": 1.0, "loop_closure": 0.1, "returns": 3.0}),
        Segment(20, 25, {"flicker": 4.0, "loop_closure": 0.5, "returns": 1.0}),
    ]
    end = end_values(segments, 15)
    assert end == pytest.approx({"flicker": 2.0, "loop_closure": 0.2, "returns": 4.0})
    assert end_values(segments, 1000)["returns"] == 9
    nothing = {"flicker": None, "loop_closure": None, "returns": 0.0}
    assert end_values([Segment(0, 9, nothing)], 20) == nothing


# Prompts


def test_made_up_prompts_are_the_demo_models_and_every_second_one_a_tour():
    config = model_config("demo")
    prompts = draw_prompts(config, 8, seed=3)
    assert prompts == draw_prompts(config, 8, seed=3) != draw_prompts(config, 8, seed=4)
    assert [len(places(prompt.text)) for prompt in prompts] == [1, 2] * 4
    assert [prompt.seed for prompt in prompts] == list(range(3, 11))
    for prompt in prompts:
        encode_words(prompt.text, config)
    with pytest.raises(ConfigError, match="made up for the demo model alone"):
        draw_prompts(model_config("wan-1.3b"), 2, 0)


def test_a_line_may_name_an_embedding(tmp_path):
    from packforcing.embeddings import Embedding, save_embedding

    text = np.ones((3, model_config("demo").text_dim), np.float32)
    save_embedding(tmp_path / "fox.safetensors", Embedding(text, "a fox", "umt5", "0" * 64))
    (tmp_path / "prompts.txt").write_text("a red star\nfox.safetensors\n")
    plain, fox = read_prompts(tmp_path / "prompts.txt", seed=1)
    assert (plain.content, plain.seed, fox.text, fox.seed) == ("a red star", 1, "a fox", 2)
    assert np.array_equal(fox.content, text)


# The page


def test_the_page_shows_all_of_it_and_loads_nothing(compared):
    folder, comparison = compared
    text = (folder / "compare.html").read_text()
    assert re.findall(r"url\((?!#)|@import|<script [^>]|<link|<iframe", text) == []
    addresses = re.findall(r'(?:src|href)="([^"]*)"', text)
    beside = {pair.video for pair in comparison.pairs}
    assert {a for a in addresses if not a.startswith(("data:", "#"))} == beside
    assert all((folder / video).is_file() for video in beside)
    choices = [json.loads(urls) for urls in re.findall(r"<option value='([^']*)'", text)]
    assert [url for urls in zip(*choices) for url in urls] == [p.video for p in comparison.pairs]
    assert text.count('src="data:image/jpeg') == SAMPLES * len(comparison.pairs)
    assert text.count('class="chart reads"') == 1  # of the policy that has an archive
    for name in (*NAMES, *PROMPTS, "flicker", "loop closure", "ms per block"):
        assert name in text
    assert "stroke: var(--line-1)" in text and "#0102" not in text  # colors are the page's
    assert text.index("<video") < text.index("Verdict") < text.index("<img") < text.index("<table")
    assert f"A verdict takes {MIN_PROMPTS} prompts" in text

    class Balanced(html.parser.HTMLParser):
        open: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag, attributes):
            if tag not in ("meta", "img", "input", "use", "path"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            if tag not in ("path", "use"):
                assert self.open.pop() == tag

    parser = Balanced()
    parser.feed(text)
    assert parser.open == []


def with_values(comparison, values):
    """The comparison as if it were of many prompts, with these values by policy."""
    pairs = [
        msgspec.structs.replace(pair, number=number, evaluation=evaluation(value))
        for pair in comparison.pairs if pair.number == 0
        for number, value in enumerate(values[pair.policy])
    ]  # fmt: skip
    summary = summarize(pairs, None)
    return msgspec.structs.replace(comparison, pairs=pairs, end=summary, whole=summary)


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (0.5, "worse by 0.5 (0.5 to 0.5)"),
        (-25.0, "better by 25 (25 to 25)"),
        (0.0, "No measure of the last 2.5 seconds differs clearly from packforcing"),
    ],
)
def test_the_verdict_is_of_intervals_that_exclude_zero(compared, tmp_path, change, verdict):
    folder, comparison = compared
    shutil.copytree(folder / "videos", tmp_path / "videos")
    values = [float(number) for number in range(MIN_PROMPTS)]
    others = [value + change for value in values]
    result = with_values(comparison, dict(zip(NAMES, (values, others))))
    page = write_report(tmp_path, result).read_text()
    page = html.unescape(page[page.index("<h2>Verdict") : page.index("<h2>Frames")])
    rows = ["flicker", "loop closure"] if change else []  # returns are as many
    assert re.findall(r"<tr><th>(\w[^<]*) \S", page) == rows
    assert verdict in page


def test_flat_lines_are_a_sentence_instead_of_a_plot(compared):
    flat, differing = [2.0] * 3, [2.0, 2.0, 2.1]
    for other, titles in ((flat, []), (differing, ["flicker", "loop closure"])):
        result = with_values(compared[1], dict(zip(NAMES, (flat, other))))
        plots, constants = measure_plots(result)
        assert [plot["title"] for plot in plots[:-2]] == titles  # the last two are of costs
        left = [f"{title} 2.000" for title in ("flicker", "returns", "loop closure")]
        assert constants == [text for text in left if text.removesuffix(" 2.000") not in titles]


def test_videos_play_in_step_on_a_phone(compared, open_on_phone):
    folder, comparison = compared
    page = open_on_phone(folder / "compare.html")
    page.evaluate("""() => {
      window.videos = [...document.querySelectorAll("video")];
      window.apart = () => {
        const times = videos.map((video) => video.currentTime);
        return Math.max(...times) - Math.min(...times);
      };
      window.distances = [];
      const record = () => { distances.push(apart()); requestAnimationFrame(record); };
      record();
    }""")
    passes = "videos.every((video) => video.currentTime > {} && video.currentTime < {})".format
    page.wait_for_function("videos.length == 2 && videos.every((video) => video.readyState == 4)")
    page.get_by_role("button", name="Play").click()
    page.wait_for_function(passes(1, 9))
    page.locator("input").press("Home")
    page.wait_for_function(passes(0, 1))
    distances = sorted(page.evaluate("distances"))
    assert distances[len(distances) * 95 // 100] < 0.1  # but for a picture that came late
    # one is too early: it waits for the other, and not at its end
    in_step = page.evaluate("""() => new Promise((resolve) => {
      videos[0].currentTime = 1.3;
      const look = () => {
        if (apart() < 0.05) resolve(videos[0].currentTime);
        else requestAnimationFrame(look);
      };
      requestAnimationFrame(look);
    })""")
    assert 1.2 < in_step < 2
    page.locator("input").press(" ")
    page.wait_for_function("videos.every((video) => video.paused)")
    frame = int(page.locator("input").input_value())
    page.locator("input").press("ArrowLeft")
    times = page.evaluate("videos.map((video) => video.currentTime)")
    assert times == pytest.approx([(frame - 0.5) / comparison.config.fps] * 2)
    page.locator("select").select_option(index=1)
    page.wait_for_function("videos.every((video) => video.readyState == 4)")
    sources = page.evaluate("videos.map((video) => video.getAttribute('src'))")
    assert sources == [pair.video for pair in comparison.pairs if pair.number == 1]
    page.locator("video").first.click()
    page.wait_for_function(passes(0.2, 9))


# Mistakes


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--policies", "packforcing,forget"], "unknown policy 'forget'; known policies: packforc"),
        (["--prompts", "0"], "--prompts takes 1 to"),
        (["--prompts", "none.txt"], "cannot read prompts from none.txt: No such file"),
        (["--seconds", "0"], "seconds must be above 0"),
        (["--seed", "-1"], "seed must be from 0"),
    ],
)
def test_mistakes_are_explained_before_anything_is_rendered(args, message, tmp_path):
    result = CliRunner().invoke(main, ["compare", "--out", str(tmp_path / "out"), *args])
    assert_one_line(result.exit_code, result.stdout, result.stderr, message)
    assert not list(tmp_path.rglob("*.mp4"))


def test_prompt_files_are_checked(tmp_path):
    for data, message in (
        (b"", "holds no prompt"), (b"\x80 star", "UTF-8"), (b"a fox", "does not know 'fox'"),
        (b"x.safetensors", "cannot read an embedding"),
    ):  # fmt: skip
        (tmp_path / "prompts.txt").write_bytes(data)
        result = run(tmp_path)
        assert_one_line(result.exit_code, result.stdout, result.stderr, message)


def test_a_missing_matplotlib_is_said_before_anything_is_rendered(tmp_path):
    result = run_without("matplotlib", "compare", "--out", tmp_path / "out")
    assert_one_line(result.returncode, result.stdout, result.stderr, r"matplotlib.*,plot\]")
    assert not (tmp_path / "out").exists()


# The runtime and the reference


@pytest.mark.full
def test_the_reference_measures_as_the_runtime_does(tmp_path):
    """Videos of the same prompts and seeds by PyTorch, whose rollouts part from the runtime's with
    time: every measure's mean lies in the interval over prompts that the runtime's has, which is
    taken a percent wider, as where all prompts agree it has no width."""
    config, count, seconds = model_config("demo"), MIN_PROMPTS, 20
    model = load_model(config, demo_bundle().parent / "model.safetensors")
    frames, measured = config.frames(seconds), {"runtime": [], "reference": []}
    with Session.open(demo_bundle()) as session:
        for prompt in draw_prompts(config, count, seed=11):
            session.render(prompt.text, seconds, tmp_path / "runtime.mkv", prompt.seed)
            text = torch.from_numpy(encode_words(prompt.text, config))
            noise = partial(draw_noise, config, prompt.seed)
            size = config.width, config.height, config.fps
            with open_video(tmp_path / "reference.mkv", *size) as video:
                left, skip = frames, config.trimmed_frames
                for block in rollout(model, text, config.blocks(frames), noise, seed=prompt.seed):
                    fresh = block.frames[skip:][:left].permute(0, 2, 3, 1)
                    video.write((fresh * 255).round().byte().numpy())
                    left, skip = left - len(fresh), 0
            assert left == 0
            for name, values in measured.items():
                values.append(evaluate_video(tmp_path / f"{name}.mkv", prompt.text).values)
    apart = {}
    for name in measured["runtime"][0]:
        runtime, reference = (
            estimate_mean([video[name] for video in videos if video[name] is not None])
            for videos in measured.values()
        )
        print(f"{name}: runtime {runtime}, reference {reference}")
        if runtime is None or reference is None or runtime.low is None:
            continue  # of too few prompts, like loop closure where no camera came back
        slack = abs(runtime.mean) / 100
        if not runtime.low - slack <= reference.mean <= runtime.high + slack:
            apart[name] = runtime, reference
    assert not apart


# What selection is for


def retrieved(selection, queries, keys, same, made):
    """How often a selected block shows what the block just made shows: same(block, old), for each
    block of `made`."""
    policy = Policy(sink=1, mid=2, recent=2, selection=selection)
    hits = []
    for block in made:
        candidates = np.arange(policy.sink, block + 1 - policy.recent)
        if selection == "likeness":
            scores = likeness(keys[block], keys[candidates])
        else:
            scores = affinity(queries[block], keys[candidates])
        hits += [same(block, old) for old in select(policy, candidates, scores, 0, block)]
    return np.mean(hits)


SELECTIONS = ("affinity", "likeness", "recency", "random")


def test_affinity_retrieves_the_place_that_is_shown():
    """Five places, each with a direction of its own in every head, in noise as large."""
    rng = np.random.default_rng(0)
    shape = (2, 3, 16)
    shown = rng.integers(5, size=80)
    places = rng.standard_normal((5, *shape))
    keys, queries = (places[shown] + rng.standard_normal((80, *shape)) for _ in range(2))
    shares = {
        name: retrieved(name, queries, keys, lambda a, b: shown[a] == shown[b], range(20, 80))
        for name in SELECTIONS
    }
    ours = min(shares["affinity"], shares["likeness"])
    assert ours > 0.9 > 0.4 > max(shares["recency"], shares["random"])


def test_only_likeness_is_blind_to_what_all_blocks_share():
    """The same, with a large part that all keys and queries have in common, in some blocks more
    than in others."""
    rng = np.random.default_rng(0)
    shape = (2, 3, 16)
    shown = rng.integers(5, size=80)
    places, common = rng.standard_normal((5, *shape)), 8 * rng.standard_normal(shape)
    keys, queries = (
        places[shown]
        + common * rng.uniform(0.9, 1.1, (80, 1, 1, 1))
        + 0.5 * rng.standard_normal((80, *shape))
        for _ in range(2)
    )
    shares = {
        name: retrieved(name, queries, keys, lambda a, b: shown[a] == shown[b], range(20, 80))
        for name in ("affinity", "likeness")
    }
    assert shares["affinity"] < 0.5 < 0.75 < shares["likeness"]


@pytest.mark.full
def test_affinity_retrieves_matching_landmarks_on_tours(monkeypatch):
    """Drawn tours, encoded by the demo model's autoencoder and committed through `start`: a block
    selected by affinity shows the place that the newest block shows more often than one in random
    does (exactly, the share of all candidates), and than the newest outside the window; one by
    likeness, more often still. Blocks amid a pan show neither place, and do not count."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "demo_model")
    world = importlib.import_module("world")
    config = model_config("demo")
    blocks, size = 28, config.block_pixel_frames
    by_selection: dict[str, list[float]] = {name: [] for name in SELECTIONS}
    select_all = Rollout.select
    with Session.open(demo_bundle(), threads=1) as session:
        for seed in range(48):
            tour = world.make_tour(np.random.default_rng(seed), blocks * size - 3)
            camera = np.pad(tour.camera, (3, 0), "edge").reshape(blocks, size).mean(1)
            queries = []

            def record_query(self, block, candidates, queries=queries):
                queries.append(self.buffers.denoiser["q_pool"].host.copy())
                return select_all(self, block, candidates)

            monkeypatch.setattr(Rollout, "select", record_query)
            seconds = len(tour.frames) / config.fps
            list(session.stream(tour.prompt, seconds, seed, start=tour.frames))
            # sink blocks have no key and are no candidates
            keys = np.pad(
                session.rollout.archive.pooled_keys, ((config.policy.sink, 0), *[(0, 0)] * 3)
            )

            def near(a, b, camera=camera):
                return abs(camera[a] - camera[b]) < world.SIZE / 4

            at_place = abs(camera - world.SIZE / 2) > world.SIZE / 4
            made = [b for b in range(13, blocks) if at_place[b]]  # a round has been seen by then
            for name in ("affinity", "likeness", "recency"):
                by_selection[name].append(retrieved(name, queries, keys, near, made))
            shares = [np.mean([near(block, old) for old in range(1, block - 1)]) for block in made]
            by_selection["random"].append(np.mean(shares))
    for name, shares in by_selection.items():
        print(f"{name}: {np.mean(shares):.3f} of the blocks selected show the place")
    for more, less in (("affinity", "random"), ("affinity", "recency"), ("likeness", "affinity")):
        gain = estimate_mean(np.subtract(by_selection[more], by_selection[less]).tolist())
        print(f"{more} over {less}: {gain.mean:.3f} ({gain.low:.3f} to {gain.high:.3f})")
        assert gain.low > 0
