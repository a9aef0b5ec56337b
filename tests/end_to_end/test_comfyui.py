"""The ComfyUI nodes, run as ComfyUI runs them, with the few of its functions that they call.

`examples/comfyui/prove_on_server.py` runs them on its own server.
"""

import importlib
import inspect
import json
import sys
import tomllib
import types
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from packforcing.errors import BundleError, PackForcingError, PromptError
from packforcing.prompts import Switch
from packforcing.runtime import Session, demo_bundle
from packforcing.runtime.bundle import MANIFEST
from packforcing.runtime.start_clip import read_start
from packforcing.words import encode_words
from tests.helpers import run as run_command

FOLDER = Path(__file__).parents[2] / "examples" / "comfyui"
SCHEDULE = [
    Switch(0, "a red star over navy stripes"),
    Switch(0.5, "a blue circle over sand dots", "recompute", 2),
]
SECONDS, SEED = 1.5, 7


class Interrupted(Exception):
    """ComfyUI's InterruptProcessingException."""


class ComfyUI:
    """What the nodes import of ComfyUI 0.3.48 and later.

    Attributes:
        models: Its folder of models.
        output: Its output folder.
        progress: What each update of a progress bar says: value, total, preview.
        on_progress: Called with each.
        interrupted: Whether the user has interrupted.
        bar_looks: Whether progress bars look at that, as ComfyUI's do.
    """

    def __init__(self, root, monkeypatch):
        self.models, self.output = root / "models", root / "output"
        self.progress, self.interrupted, self.bar_looks = [], False, True
        self.on_progress = lambda value, preview: None
        roots: dict[str, list[str]] = {}
        comfy = self

        class ProgressBar:
            def __init__(self, total):
                self.total = total

            def update_absolute(self, value, total=None, preview=None):
                assert isinstance(value, int)  # the page refuses other numbers
                if comfy.bar_looks:
                    comfy.check_interrupt()
                comfy.progress.append((value, self.total, preview))
                comfy.on_progress(value, preview)

        def save_path(prefix, folder, width, height):
            path = Path(folder, prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            return str(path.parent), path.name, 1, str(Path(prefix).parent), prefix

        modules = {
            "cv2": None,  # what is not there cannot conflict with what other nodes bring
            "comfy": {},
            "comfy.utils": {"ProgressBar": ProgressBar},
            "comfy.model_management": {
                "processing_interrupted": lambda: self.interrupted,
                "throw_exception_if_processing_interrupted": self.check_interrupt,
            },
            "comfy_api": {},
            "comfy_api.latest": {
                "InputImpl": types.SimpleNamespace(
                    VideoFromComponents=lambda components: components,
                    VideoFromFile=lambda path: path,
                ),
                "Types": types.SimpleNamespace(VideoComponents=types.SimpleNamespace),
            },
            "folder_paths": {
                "models_dir": str(self.models),
                "add_model_folder_path": lambda name, path: roots.setdefault(name, []).append(path),
                "get_folder_paths": roots.get,
                "get_output_directory": lambda: str(self.output),
                "get_save_image_path": save_path,
            },
        }
        for name, contents in modules.items():
            module = None if contents is None else types.ModuleType(name)
            if module:
                vars(module).update(contents)
                parent, _, child = name.rpartition(".")
                if parent:
                    setattr(sys.modules[parent], child, module)
            monkeypatch.setitem(sys.modules, name, module)

    def check_interrupt(self):
        if self.interrupted:
            self.interrupted = False
            raise Interrupted

    def add_bundle(self, name):
        """Link the demo model's files into the folder of models."""
        folder = self.models / "packforcing" / name
        folder.mkdir(parents=True)
        for file in demo_bundle().iterdir():
            folder.joinpath(file.name).symlink_to(file)
        return folder


@pytest.fixture
def comfy(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == FOLDER.name]:
        monkeypatch.delitem(sys.modules, name)
    comfy = ComfyUI(tmp_path, monkeypatch)
    monkeypatch.syspath_prepend(FOLDER.parent)
    comfy.nodes = importlib.import_module(FOLDER.name)
    yield comfy
    for name in [name for name in sys.modules if name.partition(".")[0] == FOLDER.name]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def run(comfy):
    """Run a node as ComfyUI does; return its outputs, and what it shows where it shows something.

    The defaults of inputs are the page's matter: a workflow names every value.
    """

    def run(name, **inputs):
        node = comfy.nodes.NODE_CLASS_MAPPINGS[name]
        declared = node.INPUT_TYPES()
        assert declared["required"].keys() <= inputs.keys()
        assert inputs.keys() <= {*declared["required"], *declared.get("optional", ())}
        with torch.inference_mode():  # as ComfyUI runs nodes
            return getattr(node(), node.FUNCTION)(**inputs)

    return run


@pytest.fixture
def bundle(run):
    (opened,) = run("PackForcingBundle", bundle="demo", backend="onnxruntime", device=0)
    return opened


@pytest.fixture
def prompts(run):
    chain = {}
    for switch in SCHEDULE:
        history = switch.history or "as published"
        (listed,) = run(
            "PackForcingPrompt", prompt=switch.prompt, time=float(switch.time), history=history,
            over=switch.over, **chain,
        )  # fmt: skip
        chain = {"before": listed}
    return listed


@pytest.fixture(scope="module")
def reference():
    with Session.open(demo_bundle()) as session:
        yield session


@pytest.fixture(scope="module")
def blocks(reference):
    """The blocks of the schedule's video, uint8 [n, H, W, 3]."""
    return list(reference.stream(SCHEDULE, SECONDS, SEED))


def saved(images):
    """Return frames as ComfyUI's nodes save them: without rounding."""
    return np.clip(255.0 * images.numpy(), 0, 255).astype(np.uint8)


def test_images_and_video_are_the_frames_of_render(run, comfy, bundle, prompts, reference, blocks):
    images, video, fps = run(
        "PackForcingRender", bundle=bundle, prompts=prompts, seconds=SECONDS, seed=SEED
    )
    assert images.dtype == torch.float32 and images.is_contiguous()
    assert np.array_equal(saved(images), np.concatenate(blocks))
    assert video.images is images and video.frame_rate == Fraction(16) and fps == 16.0

    values = [value for value, _, _ in comfy.progress]
    steps = len(reference.config.timesteps)
    assert {total for _, total, _ in comfy.progress} == {len(blocks) * steps} == {values[-1]}
    assert values == sorted(values) and set(values) == set(range(1, values[-1] + 1))
    previews = [preview for _, _, preview in comfy.progress if preview]
    assert [form for form, _, _ in previews] == ["JPEG"] * len(blocks)
    for (_, picture, _), block in zip(previews, blocks, strict=True):
        assert np.array_equal(picture, block[-1])


def test_an_interrupted_file_goes_on_and_is_the_file_of_render(
    run, comfy, bundle, prompts, reference, tmp_path
):
    inputs = {"bundle": bundle, "prompts": prompts, "seconds": SECONDS, "seed": SEED}
    inputs["filename_prefix"] = "video/night"

    def interrupt(value, preview):
        comfy.interrupted = comfy.interrupted or value == 2 * steps + 3  # within block 2

    steps = len(reference.config.timesteps)
    comfy.on_progress = interrupt
    with pytest.raises(Interrupted):
        run("PackForcingRenderToFile", **inputs)
    (unfinished,) = comfy.output.joinpath("video").iterdir()
    assert unfinished.name.endswith(".mp4.render")

    comfy.progress.clear()
    comfy.on_progress = lambda value, preview: None
    shown = run("PackForcingRenderToFile", **inputs)
    assert 2 * steps + 1 in [value for value, _, _ in comfy.progress]
    assert 1 not in [value for value, _, _ in comfy.progress]  # no step of block 0: it was made
    (video, path), (entry,) = shown["result"], shown["ui"]["images"]
    (file,) = comfy.output.joinpath("video").iterdir()
    assert video == path == str(file) and file.name.startswith("night_")
    assert entry == {"filename": file.name, "subfolder": "video", "type": "output"}
    reference.render(SCHEDULE, SECONDS, tmp_path / "render.mp4", SEED)
    assert file.read_bytes() == (tmp_path / "render.mp4").read_bytes()

    comfy.progress.clear()
    assert run("PackForcingRenderToFile", **inputs)["result"][1] == path
    assert not comfy.progress  # it is there
    assert run("PackForcingRenderToFile", **{**inputs, "seed": 8})["result"][1] != path


def test_an_interrupt_is_seen_where_no_step_follows(run, comfy, bundle, prompts, blocks):
    """By the thread that watches. The bundle stays usable."""
    comfy.bar_looks = False

    def interrupt(value, preview):
        comfy.interrupted = value >= 12

    comfy.on_progress = interrupt
    with pytest.raises(Interrupted):
        run("PackForcingRender", bundle=bundle, prompts=prompts[:1], seconds=600.0, seed=SEED)
    assert not comfy.interrupted
    comfy.on_progress = lambda value, preview: None
    images, _, _ = run(
        "PackForcingRender", bundle=bundle, prompts=prompts, seconds=SECONDS, seed=SEED
    )
    assert np.array_equal(saved(images), np.concatenate(blocks))


def test_a_start_image_of_any_size_is_fitted_as_render_does(
    run, bundle, prompts, reference, tmp_path
):
    pixels = np.random.default_rng(0).integers(0, 256, (150, 260, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "start.png")
    start = read_start(tmp_path / "start.png", 128, 128, 16, 1)
    images, _, _ = run(
        "PackForcingRender", bundle=bundle, prompts=prompts[:1], seconds=0.8, seed=SEED,
        start=torch.from_numpy(pixels)[None] / 255.0,
    )  # fmt: skip
    expected = np.concatenate(list(reference.stream(SCHEDULE[:1], 0.8, SEED, start=start)))
    assert np.array_equal(saved(images), expected)


def test_a_conditioning_is_a_prompt(run, bundle, reference):
    def prompt(*conditioning):
        return run(
            "PackForcingPrompt", prompt="", time=0.0, history="as published", over=1,
            conditioning=list(conditioning),
        )  # fmt: skip

    encoded = [torch.from_numpy(encode_words(SCHEDULE[0].prompt, reference.config)), {}]
    (prompts,) = prompt(encoded)
    images, _, _ = run("PackForcingRender", bundle=bundle, prompts=prompts, seconds=0.3, seed=SEED)
    expected = np.concatenate(list(reference.stream(SCHEDULE[0].prompt, 0.3, SEED)))
    assert np.array_equal(saved(images), expected)
    with pytest.raises(PromptError, match="several prompts"):
        prompt(encoded, encoded)


def test_what_is_wrong_with_a_bundle_is_one_line(run, comfy):
    node = comfy.nodes.NODE_CLASS_MAPPINGS["PackForcingBundle"]
    good, bad, torn = map(comfy.add_bundle, ("good", "bad", "torn"))
    for folder, name in ((bad, MANIFEST), (torn, "denoiser.onnx")):
        data = folder.joinpath(name).read_bytes()
        folder.joinpath(name).unlink()
        folder.joinpath(name).write_bytes(data[:-100])
    assert node.INPUT_TYPES()["required"]["bundle"][0] == ["demo", "bad", "good", "torn"]

    inputs = {"backend": "onnxruntime", "device": 0}
    for name, words in (
        ("bad", "manifest.json is damaged"), ("torn", "denoiser.onnx is damaged"),
        ("../good", "no bundle"), ("gone", "there are: demo, bad, good, torn"),
    ):  # fmt: skip
        with pytest.raises(BundleError) as error:
            run("PackForcingBundle", bundle=name, **inputs)
        assert words in str(error.value) and "\n" not in str(error.value)

    assert node.IS_CHANGED("good", **inputs) == node.IS_CHANGED("demo", **inputs)
    good.joinpath(MANIFEST).unlink()
    assert "good" not in node.INPUT_TYPES()["required"]["bundle"][0]


def test_a_bundle_is_closed_when_comfyui_drops_it(run):
    (opened,) = run("PackForcingBundle", bundle="demo", backend="onnxruntime", device=0)
    session = opened.session
    session.require_open()
    del opened
    with pytest.raises(PackForcingError, match="closed"):
        session.require_open()


def test_images_that_do_not_fit_into_memory_are_refused(run, bundle, prompts, monkeypatch):
    nodes = sys.modules[f"{FOLDER.name}.nodes"]
    monkeypatch.setattr(nodes, "free_memory", lambda: 1 << 20)
    with pytest.raises(PackForcingError, match="renders to a file"):
        run("PackForcingRender", bundle=bundle, prompts=prompts, seconds=SECONDS, seed=SEED)


def test_the_plan_is_that_of_the_command(run):
    shown = run("PackForcingPlan", bundle="demo", target="sm89", seconds=20.0)
    command = ("plan", "--bundle", demo_bundle(), "--target", "sm89", "--seconds", 20)
    expected = run_command(*command).output.splitlines()
    assert shown["result"][0].splitlines() == expected
    assert shown["ui"]["text"] == shown["result"]


def test_the_example_workflows_fit_the_nodes(comfy):
    """Saved values of widgets go by their order."""
    workflows = sorted(FOLDER.joinpath("example_workflows").glob("*.json"))
    assert workflows
    used = set()
    for path in workflows:
        for node in json.loads(path.read_text())["nodes"]:
            if (kind := comfy.nodes.NODE_CLASS_MAPPINGS.get(node["type"])) is None:
                continue
            used.add(node["type"])
            declared = kind.INPUT_TYPES()
            inputs = {**declared["required"], **declared.get("optional", {})}
            assert {entry["name"] for entry in node.get("inputs", ())} <= inputs.keys()
            widgets = []
            for kind_of_input, *options in inputs.values():
                if isinstance(kind_of_input, list) or kind_of_input in ("STRING", "FLOAT", "INT"):
                    widgets.append(kind_of_input)
                    if options and options[0].get("control_after_generate"):
                        widgets.append(["fixed", "increment", "decrement", "randomize"])
            values = node.get("widgets_values", [])
            for value, widget in zip(values, widgets, strict=True):
                if isinstance(widget, list):
                    assert value in widget
                else:
                    allowed = {"STRING": str, "INT": int, "FLOAT": (int, float)}
                    assert isinstance(value, allowed[widget])
    assert used == comfy.nodes.NODE_CLASS_MAPPINGS.keys()


def test_nodes_declare_what_they_take_and_give(comfy):
    mappings = comfy.nodes.NODE_CLASS_MAPPINGS
    assert mappings.keys() == comfy.nodes.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in mappings.values():
        declared = node.INPUT_TYPES()
        parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters
        required = {name for name, one in parameters.items() if one.default is one.empty}
        assert required - {"self"} == declared["required"].keys()
        assert parameters.keys() - required == declared.get("optional", {}).keys()
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES)


def test_the_registry_file_says_what_the_registry_needs():
    import packforcing

    settings = tomllib.loads(FOLDER.joinpath("pyproject.toml").read_text())
    project, comfy = settings["project"], settings["tool"]["comfy"]
    assert project["version"] == packforcing.__version__
    assert any(one.startswith("packforcing>=") for one in project["dependencies"])
    assert not any("onnxruntime" in one for one in project["dependencies"])  # other nodes have it
    assert {"PublisherId", "DisplayName", "requires-comfyui"} <= comfy.keys()
