"""Figures of the documents: they are those of docs/figures.json, and a run fills them anew."""

import json
import re
import sys

import msgspec
import pytest

from benchmarks import figure_plans as plans
from benchmarks import figure_values as values
from benchmarks import figures
from benchmarks.ablate_cache import SCHEMES
from benchmarks.figure_runs import RUNS, Run
from packforcing import model_config
from packforcing.app.cli import main
from packforcing.calibration.recipes import OutputLoss
from packforcing.errors import ConfigError
from packforcing.evaluation.compare import Comparison, Costs, Pair, summarize
from packforcing.evaluation.fidelity import Fidelity
from packforcing.evaluation.intervals import Estimate
from packforcing.evaluation.measures import ALL_MEASURES, Evaluation, Segment
from packforcing.files import file_sha256

TITLES = {measure.title: name for name, measure in ALL_MEASURES.items()}


def test_documents_show_the_values_of_the_record():
    records = figures.read_records()
    shown = set()
    for path in figures.documents():
        text = path.read_text(encoding="utf-8")
        assert figures.fill(text, records) == text, f"{path}: python -m benchmarks.figures --write"
        shown |= set(figures.markers(text))
    assert shown == {(run, name) for run, record in records.items() for name in record.values}


def test_markers_are_invisible():
    """A line that begins with a comment is HTML to Markdown, whatever follows in it."""
    for path in figures.documents():
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r"^ *<!-- figure:\S+ -->.+", text, re.MULTILINE), path
        assert text.count("<!-- figure:") == text.count("<!-- /figure -->"), path


def test_every_picture_is_one_of_the_record():
    recorded = {
        name: digest
        for record in figures.read_records().values()
        for name, digest in record.pictures.items()
    }
    pictures = {
        path.relative_to(figures.ROOT).as_posix(): file_sha256(path)
        for path in (figures.ROOT / "docs").rglob("*.png")
    }
    assert pictures == recorded
    assert set(recorded) == {target for run in RUNS.values() for target in run.pictures}


def test_the_record_names_the_commands_of_every_run():
    records = figures.read_records()
    assert list(records) == list(RUNS)
    for name, run in RUNS.items():
        assert records[name].commands == [figures.readable(command) for command in run.commands]
        assert records[name].status in ("measured", figures.NOT_REPEATED)
        assert set(run.needs) <= RUNS.keys()


def test_a_run_is_measured_once_for_the_same_code(tmp_path, monkeypatch):
    count = tmp_path / "count"
    script = f"open({str(count)!r}, 'a').write('x'); print(len(open({str(count)!r}).read()))"
    runs = {"calls": Run((("-c", script),), 0.1, lambda results: {"n": results.text().strip()})}
    (tmp_path / "docs").mkdir()
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "a.py").write_text("1")
    page = tmp_path / "docs" / "page.md"
    page.write_text("Called <!-- figure:calls.n -->?<!-- /figure --> times.")
    (tmp_path / "README.md").write_text("")
    (tmp_path / "docs" / "figures.json").write_text("{}")
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "FIGURES", tmp_path / "docs" / "figures.json")
    monkeypatch.setattr(figures, "RUNS", runs)

    def called(*options):
        monkeypatch.setattr(sys, "argv", ["figures", *options])
        figures.main()
        return page.read_text()

    once = "Called <!-- figure:calls.n -->1<!-- /figure --> times."
    assert called() == once
    assert called() == once  # it is not called again
    assert called("--below", "0.01", "--anew") == once
    assert ">2<" in called("--anew")
    (tmp_path / "runtime" / "a.py").write_text("2")
    assert ">3<" in called()
    record = figures.read_records()["calls"]
    assert (record.status, record.values) == ("measured", {"n": "3"})


def test_an_interrupted_run_continues_where_its_commands_do(tmp_path, monkeypatch):
    marks = tmp_path / "first", tmp_path / "second"
    first = f"open({str(marks[0])!r}, 'a').write('x')"
    second = f"import sys; sys.exit(not open({str(marks[1])!r}).close())"
    run = Run((("-c", first), ("-c", f"open({str(marks[1])!r})")), 0.1, lambda results: {})
    monkeypatch.setattr(figures, "RUNS", {"two": run})
    folders = {"two": tmp_path / "out"}
    with pytest.raises(ConfigError, match=r"'two' failed; its log is .*1\.log"):
        figures.measure("two", folders)
    marks[1].write_text("")
    assert figures.measure("two", folders).status == "measured"
    assert marks[0].read_text() == "x", second


# What is read from a comparison


def comparison(means, seconds=20.0, prompts=6):
    """A comparison whose policies have these values by title, a little apart by prompt."""
    config = model_config("demo")
    pairs = []
    for policy, titles in means.items():
        for number in range(prompts):
            named = {TITLES[title]: value + 1e-3 * number for title, value in titles.items()}
            evaluation = Evaluation("v", "p", 16, 320, 128, 128, named, [Segment(0, 20, named)])
            pairs.append(
                Pair(policy=policy, number=number, prompt="p", seed=0, video="v",
                     evaluation=evaluation, block_seconds=[0.1] * 12, tokens_read=[8],
                     read=[], host_peak=0)
            )  # fmt: skip
    cost = Costs(
        policy=config.policy, precision=config.precision, bundle=0, buffers=8_900_000,
        archive=6_600_000, host_peak=243_000_000, device=0, tokens_read=408,
        block_seconds=0.235, last_block_seconds=0.232,
    )  # fmt: skip
    return Comparison(
        bundle="b", config=config, seconds=seconds, costs=dict.fromkeys(means, cost),
        whole=summarize(pairs, None), end=summarize(pairs, 20), pairs=pairs,
        fidelity={}, snr={}, outputs={}, unmeasured="",
    )  # fmt: skip


@pytest.fixture
def results(tmp_path):
    """Results of a comparison; called with what `comparison` takes."""

    def write(*args, **options):
        data = msgspec.json.encode(comparison(*args, **options))
        (tmp_path / "compare.json").write_bytes(data)
        return values.Results(tmp_path)

    return write


def policy_means(**changes):
    means = dict.fromkeys(TITLES, 0.5)
    return {**means, **{name.replace("_", " "): value for name, value in changes.items()}}


def test_policies_are_read_with_their_differences(results):
    names = RUNS["policies"].commands[0][-1].split(",")
    means = {name: policy_means() for name in names}
    means["packforcing"] = policy_means(color=0.9965, loop_closure=0.307)
    means["sliding-window"] = policy_means(color_drift=2.5, loop_closure=0.717)
    texts = values.policy_values(results(means))
    assert texts.keys() == figures.read_records()["policies"].values.keys()
    assert (texts["color"], texts["loop"], texts["window"]) == ("99.9%", "31%", "72%")
    assert texts["window-loop"] == "0.41 (0.41 to 0.41)"
    assert (texts["window-drift"], texts["window-drift-range"]) == ("2.0", "2.0 to 2.0")
    assert texts["window-tours"] == "six" and texts["buffers"] == "8.9 MB and 408 tokens"
    rows = [line.split("|")[1].strip() for line in texts["table"].splitlines()]
    assert rows == ["", "---", *names]


@pytest.mark.parametrize("run", ["last-step", "spans", "ten-minutes"])
def test_every_value_of_a_comparison_is_read(run, results):
    names = RUNS[run].commands[0][-1].split(",")
    texts = RUNS[run].extract(results({name: policy_means() for name in names}))
    assert texts.keys() == figures.read_records()[run].values.keys()
    assert all(texts.values())


def test_a_difference_is_in_points_of_the_frames(results):
    means = {"fp16": policy_means(color=0.9965), "fp16-cache8": policy_means(color=0.9925)}
    texts = values.cache_values(results(means))
    assert texts.keys() == figures.read_records()["cache"].values.keys()
    assert texts["color"] == "-0.4" and texts["shape"] == "0.0"
    assert "| color | 99.9 | 99.5 | -0.4 (-0.4 to -0.4) |" in texts["table"].splitlines()


def test_quantized_bundles_are_read_with_their_fidelity(tmp_path):
    names = ["fp32", *values.QUANTIZED]
    result = comparison({name: policy_means() for name in names})
    close = [Fidelity(30.0 + number, 0.9 + number / 100, 0.1) for number in range(6)]
    result = msgspec.structs.replace(
        result,
        fidelity=dict.fromkeys(values.QUANTIZED, close),
        outputs={"int8": {"flow": OutputLoss(40.0, 0.01)}},
    )
    (tmp_path / "compare.json").write_bytes(msgspec.json.encode(result))
    texts = values.quantized_values(values.Results(tmp_path))
    assert texts.keys() == figures.read_records()["quantized"].values.keys()
    assert texts["int8"] == "32.5 dB"
    (row,) = (line for line in texts["table"].splitlines() if "int8 weights |" in line)
    assert row.endswith("| 32.5 | 30.0 | 0.925 | 0.900 | 40.0 |")


def test_quantized_products_are_read_with_their_mean(tmp_path):
    names = ("fp32", "w8a8", "nvfp4")
    result = comparison({name: policy_means() for name in names})
    close = [Fidelity(30.0 + number, 0.9, 0.1) for number in range(6)]
    result = msgspec.structs.replace(result, fidelity=dict.fromkeys(names[1:], close))
    (tmp_path / "compare.json").write_bytes(msgspec.json.encode(result))
    texts = values.product_values(values.Results(tmp_path))
    assert texts.keys() == figures.read_records()["products"].values.keys()
    assert texts["w8a8"] == "32.5 dB"


# What is read from other results

PARTS = ("time_embedding", "time_projection", *(f"blocks.{n}" for n in range(6)), "head")
LAYERS = [
    {"part": part, "matrices": 8, "errors": {"int8": 1e-3 * (n + 1), "int4": 1e-2 * (n + 1)}}
    for n, part in enumerate(PARTS)
]
COST = {"db": [44.5, 42.2, 39.8, 38.6], "psnr": [32.8, 16.1], "prompts": 32}
SCHEME_COSTS = [{**COST, "scheme": scheme._asdict()} for scheme in SCHEMES]
TOOLS = [
    {"kind": kind, "tool": tool, "mean": 45.384, "worst": 41.5, "matrix": "blocks.1.q"}
    for kind in ("int8", "int4")
    for tool in ("ours", "onnxruntime")
]
ATTENTION = [
    {"channels": "mixed", "scales": "fixed, per tensor", "softmax": "exact", "rounded": "k",
     "flow": 37.84, "psnr": [20.0, 30.0], "blocks": [43.2, 30, 21.9]},
    {"channels": "-", "scales": "-", "softmax": "-", "rounded": "none; off by 0.01", "flow": 51.1},
]  # fmt: skip
HOUR = {
    "frames": 57600, "archive_mb": 199.01, "resident_mb_beyond_archive_per_10_minutes": -0.3,
    "ms_per_block_early": 166.2, "ms_per_block_late": 131.4, "largest_packed_position": 18.0,
    "last_minute": {TITLES["color and shape"]: 0.968, "speed": 17.62},
}  # fmt: skip
CHECKPOINTS = {
    "percent_of_render_time": 1.02,
    "seconds": {"save": 0.3, "join": 0.2},
    "seconds_total": 50.1,
}
BENCH = {"milliseconds": {"runtime": 109.2}, "over_runtime": {"eager": 2.04}}
RETRIEVAL = """.
affinity: 0.467 of the blocks selected show the place
likeness: 0.849 of the blocks selected show the place
recency: 0.375 of the blocks selected show the place
random: 0.379 of the blocks selected show the place
affinity over random: 0.088 (0.041 to 0.135)
affinity over recency: 0.092 (0.041 to 0.135)
likeness over affinity: 0.382 (0.319 to 0.444)
"""
REFERENCE = "\n".join(
    f"{name}: runtime {Estimate(mean, 0, 1, 6)}, reference {Estimate(other, 0, 1, 6)}"
    for name, mean, other in (
        ("shape", 0.984, 0.982),
        ("ground", 0.952, 0.952),
        ("speed", 18.01, 18.09),
        ("loop_closure", 0.0007, 0.0007),
    )
)
BUILDER = (
    "4 layers: bytes per quantized weight {'int8': 9}, scratch {}\nweights {}\n"
    "30 layers: bytes per quantized weight {'int8': 1.001, 'int4': 0.516, 'fp8': 1.0}, scratch "
    f"{dict.fromkeys(plans.BUILT, 320_200_000)}\n"
    f"weights {dict.fromkeys(plans.BUILT, 2_537_293_952)}\n"
)


@pytest.mark.parametrize(
    ("run", "file", "content", "expected"),
    [
        ("layers", "layers.json", LAYERS, "| layers 1 to 4, each | 8 | 4.0e-3 to 7.0e-3 |"),
        ("cache-choices", "schemes.json", [*SCHEME_COSTS, SCHEME_COSTS[0]],
         "| **before RoPE** | **pair, channel** | **static** | **least squares** | 44.5 (42.2) |"),
        ("quantizers", "tools.json", TOOLS, "| `quantize` | 45.38 | 41.50 | 45.38 | 41.50 |"),
        ("attention", "attention.json", ATTENTION,
         "| k | mixed | fixed, per tensor | exact | 37.8 | 25.0 (20.0) | 0% | 43, 22 |"),
        ("hour", "0.log", f".\n{json.dumps(HOUR, indent=1)}\n", "shrank by 0.3 MB"),
        ("checkpoints", "bench.json", {"checkpoints": CHECKPOINTS}, "0.5 of 50 s"),
        ("bench", "bench.json", {"blocks": BENCH}, "4.6"),
        ("stop", "stop.json", {"stops": 9, "ratio_median": 0.5, "ratio_longest": 0.987}, "0.99"),
        ("filters", "filters.json", {"all": {"color": 1}, "half": {"psnr": 38.04, "color": 0.5}},
         "| half | 38.0 | | | 0.500 | | | | |"),
        ("retrieval", "0.log", RETRIEVAL, "| 0.849 | 0.467 | 0.379 | 0.375 |"),
        ("reference", "0.log", REFERENCE, "0.984 and 0.982"),
        ("builder", "0.log", BUILDER, "| int8 | 2,537.3 MB | 1.001 | 320.2 MB |"),
    ],
)  # fmt: skip
def test_values_are_read_from_what_the_commands_leave(run, file, content, expected, tmp_path):
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / file).write_text(text)
    texts = RUNS[run].extract(values.Results(tmp_path))
    assert texts.keys() == figures.read_records()[run].values.keys()
    assert any(expected in value for value in texts.values()), texts


@pytest.mark.parametrize("run", RUNS)
def test_every_option_of_the_commands_exists(run):
    for module, program, *words in RUNS[run].commands:
        if (module, program) == ("-m", "packforcing.app.cli"):
            command = main.get_command(None, words[0])
            with command.make_context(words[0], words[1:]):
                pass
