"""The nodes: open a bundle, write a schedule, render to images or into a file, show the plan.

They are classes in `NODE_CLASS_MAPPINGS`, the form that every release of ComfyUI loads. The newer
schema (`comfy_api.latest.io`) has nothing that they need and may change without notice; of it, the
classes behind VIDEO are used alone.

IMAGE is float32 [frames, height, width, 3] in 0..1, with the 256 values that a video's file has.
ComfyUI's nodes save `255 * value` without rounding: other values would come out darker than
`packforcing render` shows them, by half a level on average.
"""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import folder_paths
import numpy as np
import torch
from comfy import model_management
from comfy.utils import ProgressBar
from comfy_api.latest import InputImpl, Types
from PIL import Image

from packforcing.app.reports.plan import bundle_text
from packforcing.config import Config
from packforcing.errors import BundleError, ConfigError, PromptError, RenderStopped
from packforcing.machine import free_memory
from packforcing.prompts import History, Switch
from packforcing.runtime import Session, StepInfo, Video, demo_bundle
from packforcing.runtime.backends import BACKENDS
from packforcing.runtime.bundle import MANIFEST, read_manifest
from packforcing.runtime.plan import LONGEST, TARGETS
from packforcing.runtime.render import render_video
from packforcing.runtime.request import check_request
from packforcing.runtime.start_clip import fit_frames
from packforcing.units import format_memory

FOLDER = "packforcing"  # of ComfyUI's models
DEMO = "demo"
AS_PUBLISHED = "as published"
BUNDLE, PROMPTS = "PACKFORCING_BUNDLE", "PACKFORCING_PROMPTS"  # types of sockets
LARGEST_INT = 2**64 - 1
_POLL_SECONDS = 0.05  # between two looks at ComfyUI's flag

folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


class OpenBundle:
    """An open bundle; its session is closed when ComfyUI drops it from the cache of outputs.

    Attributes:
        session: Makes the videos.
        backend: The name of what runs its graphs.
    """

    def __init__(self, session: Session, backend: str) -> None:
        self.session, self.backend = session, backend
        weakref.finalize(self, session.close)


class Progress:
    """Shows the steps of a video on its node, with the last frame of each block."""

    def __init__(self, blocks: int, steps: int) -> None:
        self._steps, self._bar = steps, ProgressBar(blocks * steps)

    def after_step(self, info: StepInfo) -> None:
        done = self._steps * (info.step + 1) // info.steps
        self._bar.update_absolute(info.block * self._steps + done)

    def after_block(self, block: int, frame: np.ndarray) -> None:
        """Show a frame, uint8 [H, W, 3]."""
        preview = ("JPEG", Image.fromarray(frame), None)  # None: at its full size
        self._bar.update_absolute((block + 1) * self._steps, preview=preview)


def bundle_folders() -> dict[str, Path]:
    """Return the bundles in ComfyUI's model folders by name, and the demo model's."""
    roots = map(Path, folder_paths.get_folder_paths(FOLDER))
    manifests = [path for root in roots for path in sorted(root.glob(f"*/{MANIFEST}"))]
    named = {path.parent.name: path.parent for path in reversed(manifests)}  # the first root's win
    return {DEMO: demo_bundle(), **dict(sorted(named.items()))}


def bundle_folder(name: str) -> Path:
    """Return the folder of a bundle; raise `BundleError` unless there is one of this name."""
    folders = bundle_folders()
    if name not in folders:
        raise BundleError(
            f"no bundle '{name}' in ComfyUI's models/{FOLDER}; there are: {', '.join(folders)}"
        )
    return folders[name]


def fit_start(images: torch.Tensor, config: Config) -> np.ndarray:
    """Convert an IMAGE of any size to the frames that a video begins with."""
    levels = (images[..., :3].clamp(0, 1) * 255).round().to(torch.uint8)
    return fit_frames(levels.numpy(force=True), config.width, config.height)


def read_conditioning(conditioning: list[Any]) -> np.ndarray:
    """Return the embedding in a CONDITIONING, float32 [T, text_dim]."""
    if len(conditioning) != 1 or conditioning[0][0].shape[0] != 1:
        raise PromptError(
            "the conditioning combines several prompts; a block follows one: connect one text "
            "encoder, and a further prompt node for the next prompt"
        )
    return conditioning[0][0][0].float().numpy(force=True)


def begin(
    bundle: OpenBundle,
    prompts: list[Switch],
    seconds: float,
    seed: int,
    start: torch.Tensor | None,
    frames: str = "uint8",
) -> tuple[Video, Progress]:
    """Begin a video that reports its progress to ComfyUI."""
    session = bundle.session
    config = session.config
    timeline = check_request(config, prompts, seconds, seed)
    assert timeline.blocks is not None
    progress = Progress(timeline.blocks, len(config.timesteps))
    video = session.begin(
        timeline,
        seed,
        seconds=seconds,
        start=None if start is None else fit_start(start, config),
        frames=frames,
        lead=None,
        on_step=progress.after_step,
    )
    return video, progress


@contextmanager
def interruptible(video: Video) -> Iterator[None]:
    """Stop a video before its next call of a graph when ComfyUI is interrupted."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_POLL_SECONDS):
            if model_management.processing_interrupted():
                video.stop()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with video:
            yield
    except RenderStopped:
        model_management.throw_exception_if_processing_interrupted()
        raise
    finally:
        ended.set()
        watcher.join()


def name_request(bundle: OpenBundle, video: Video) -> str:
    """Return a name that the same request has again, so that it finds its file."""
    request = video.request
    switches = [
        (block, switch.effect, switch.over) for block, switch in request.timeline.switches.items()
    ]
    sha256 = bundle.session.manifest.sha256
    facts = (sha256, bundle.backend, request.frames, request.seed, switches)
    digest = hashlib.sha256(repr(facts).encode())
    for embedding in request.timeline.embeddings.values():
        digest.update(embedding.tobytes())
    if request.start is not None:
        digest.update(request.start.tobytes())
    return digest.hexdigest()[:12]


class BundleNode:
    CATEGORY, FUNCTION = "PackForcing", "open_bundle"
    RETURN_TYPES, RETURN_NAMES = (BUNDLE,), ("bundle",)
    DESCRIPTION = (
        f"Open a bundle of models/{FOLDER}, or the demo model. Memory is taken here, and freed "
        "when the workflow no longer has this node with these settings."
    )

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "bundle": (list(bundle_folders()), {"tooltip": f"A folder in models/{FOLDER}."}),
                "backend": (
                    list(BACKENDS),
                    {"tooltip": "What runs the model; onnxruntime is the CPU."},
                ),
                "device": (
                    "INT",
                    {"default": 0, "min": 0, "max": 63, "tooltip": "The GPU, of those visible."},
                ),
            }
        }

    @classmethod
    def IS_CHANGED(cls, bundle, backend, device):
        return read_manifest(bundle_folder(bundle)).sha256

    def open_bundle(self, bundle, backend, device):
        folder = bundle_folder(bundle)
        if backend != "onnxruntime":  # the plan counts on memory that ComfyUI's models may fill
            model_management.unload_all_models()
            model_management.soft_empty_cache()
        return (OpenBundle(Session.open(folder, backend=backend, device=device), backend),)


class PromptNode:
    CATEGORY, FUNCTION = "PackForcing", "add_prompt"
    RETURN_TYPES, RETURN_NAMES = (PROMPTS,), ("prompts",)
    DESCRIPTION = (
        "What a video shows from a time on. Connect one prompt node to the next for a video whose "
        "prompt changes."
    )

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "prompt": (
                    "STRING",
                    {
                        "multiline": True,
                        "default": "a red star over navy stripes",
                        "tooltip": "Words, for the demo model. UMT5 models need a conditioning.",
                    },
                ),
                "time": (
                    "FLOAT",
                    {"default": 0.0, "min": 0.0, "max": LONGEST, "step": 0.1,
                     "tooltip": "Seconds of video before it; 0 for the first prompt."},
                ),
                "history": (
                    [AS_PUBLISHED, *get_args(History)],
                    {"tooltip": "What later blocks read of the past. The first prompt has none."},
                ),
                "over": (
                    "INT",
                    {"default": 1, "min": 1, "max": 10_000,
                     "tooltip": "Blocks that the change is spread over."},
                ),
            },
            "optional": {
                "before": (PROMPTS, {"tooltip": "The prompts before this one."}),
                "conditioning": (
                    "CONDITIONING",
                    {"tooltip": "The prompt as a text encoder encoded it, in place of the words."},
                ),
            },
        }  # fmt: skip

    def add_prompt(self, prompt, time, history, over, before=(), conditioning=None):
        content = prompt if conditioning is None else read_conditioning(conditioning)
        switch = Switch(time, content, None if history == AS_PUBLISHED else history, over)
        return ([*before, switch],)


def _video_inputs(**more: tuple[Any, ...]) -> dict[str, dict[str, tuple[Any, ...]]]:
    """Return the inputs of both nodes that render."""
    return {
        "required": {
            "bundle": (BUNDLE,),
            "prompts": (PROMPTS,),
            "seconds": (
                "FLOAT",
                {"default": 4.0, "min": 0.1, "max": LONGEST, "step": 0.1,
                 "tooltip": "Length of the video."},
            ),
            "seed": (
                "INT",
                {"default": 0, "min": 0, "max": LARGEST_INT, "control_after_generate": True},
            ),
            **more,
        },
        "optional": {
            "start": (
                "IMAGE",
                {"tooltip": "Picture or clip that the video begins with, cropped to its shape."},
            ),
        },
    }  # fmt: skip


class RenderNode:
    CATEGORY, FUNCTION = "PackForcing", "render"
    RETURN_TYPES = ("IMAGE", "VIDEO", "FLOAT")
    RETURN_NAMES = ("images", "video", "fps")
    DESCRIPTION = "Render a video into memory. For long ones, render to a file."

    @classmethod
    def INPUT_TYPES(cls):
        return _video_inputs()

    def render(self, bundle, prompts, seconds, seed, start=None):
        video, progress = begin(bundle, prompts, seconds, seed, start, frames="device")
        config = video.config
        images = self._allocate(video.request.frames, config)
        with interruptible(video):
            for block in video:
                pixels = torch.from_dlpack(block.frames)  # lent, [n, 3, H, W]
                stop = block.info.frames
                part = images[stop - len(pixels) : stop]
                part.copy_(pixels.movedim(1, -1))
                levels = part.mul_(255).add_(0.5).floor_()  # as `packforcing render` rounds
                progress.after_block(block.info.index, levels[-1].to(torch.uint8).numpy())
                levels.div_(255)
            if video.stopped:
                raise RenderStopped(f"stopped after {video.block} blocks")
        components = Types.VideoComponents(images=images, frame_rate=Fraction(config.fps))
        return images, InputImpl.VideoFromComponents(components), float(config.fps)

    def _allocate(self, frames: int, config: Config) -> torch.Tensor:
        shape = (frames, config.height, config.width, 3)
        needed_bytes, free_bytes = 4 * int(np.prod(shape)), free_memory()
        if needed_bytes > free_bytes:
            raise ConfigError(
                f"{frames} frames take {format_memory(needed_bytes)} as images, "
                f"{format_memory(free_bytes)} are free: use the node that renders to a file"
            )
        return torch.empty(shape, dtype=torch.float32)


class RenderToFileNode:
    CATEGORY, FUNCTION = "PackForcing", "render"
    RETURN_TYPES, RETURN_NAMES = ("VIDEO", "STRING"), ("video", "path")
    OUTPUT_NODE = True
    DESCRIPTION = (
        "Render a video into ComfyUI's output folder, block by block. What was interrupted goes on "
        "when it is queued again; what is done is not rendered twice."
    )

    @classmethod
    def INPUT_TYPES(cls):
        prefix = ("STRING", {"default": "video/packforcing", "tooltip": "Begins the file's name."})
        return _video_inputs(filename_prefix=prefix)

    def render(self, bundle, prompts, seconds, seed, filename_prefix, start=None):
        video, progress = begin(bundle, prompts, seconds, seed, start)
        config = video.config
        folder, name, _, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory(), config.width, config.height
        )
        path = Path(folder, f"{name}_{name_request(bundle, video)}.mp4")
        if not path.exists() or Path(f"{path}.render").exists():
            with interruptible(video):
                render_video(
                    bundle.session, video, path, resume=True,
                    on_frames=lambda b: progress.after_block(b.info.index, b.frames[-1]),
                )  # fmt: skip
        saved = {"filename": path.name, "subfolder": subfolder, "type": "output"}
        return {
            "ui": {"images": [saved], "animated": (True,)},
            "result": (InputImpl.VideoFromFile(str(path)), str(path)),
        }


class PlanNode:
    CATEGORY, FUNCTION = "PackForcing", "plan"
    RETURN_TYPES, RETURN_NAMES = ("STRING",), ("plan",)
    OUTPUT_NODE = True
    DESCRIPTION = "Say what a bundle takes of a GPU's memory, as `packforcing plan` does."

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "bundle": (list(bundle_folders()),),
                "target": (
                    list(TARGETS),
                    {"default": "sm86",
                     "tooltip": "sm86 is RTX 30, sm89 RTX 40, sm120 RTX 50."},
                ),
                "seconds": (
                    "FLOAT",
                    {"default": 60.0, "min": 0.1, "max": LONGEST,
                     "tooltip": "Length of the video; the archive in host memory grows with it."},
                ),
            }
        }  # fmt: skip

    @classmethod
    def IS_CHANGED(cls, **inputs):
        return float("nan")  # always: engines may have been built meanwhile

    def plan(self, bundle, target, seconds):
        text = bundle_text(bundle_folder(bundle), target, seconds)
        return {"ui": {"text": (text,)}, "result": (text,)}


NODE_CLASS_MAPPINGS = {
    "PackForcingBundle": BundleNode,
    "PackForcingPrompt": PromptNode,
    "PackForcingRender": RenderNode,
    "PackForcingRenderToFile": RenderToFileNode,
    "PackForcingPlan": PlanNode,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "PackForcingBundle": "PackForcing: Bundle",
    "PackForcingPrompt": "PackForcing: Prompt",
    "PackForcingRender": "PackForcing: Render",
    "PackForcingRenderToFile": "PackForcing: Render to File",
    "PackForcingPlan": "PackForcing: Plan",
}
