"""The vocabulary of options: one name has one meaning in every command.

    --bundle DIR                  an exported model
    --model NAME                  a model by name: a preset, or one of `packforcing models`
    --weights PATH                a file or folder of weights
    --prompt TEXT                 a prompt; --prompts FILE: one per line
    --encoder DIR                 the text encoder UMT5
    --target NAME[,NAME...]       GPU architectures, as in sm89
    --gpu NAME                    a GPU by its product name
    --budget GIB[,GIB...]         device memory
    --backend NAME                the library that runs, or builds for, a GPU or CPU
    --dtype NAME                  dtype of weights, cache and arithmetic together
    --weight-dtype, --cache-dtype dtype of the weights, of the KV cache
    --attention-dtype             dtype in which self-attention multiplies
    --size WxH                    pixels of a frame
    --history SINK,MID,RECENT     blocks of each partition
    --policy NAME[,NAME...]       history policy
    --seconds, --seed             length of a video, and its random numbers
    --out PATH                    the result
    --threads N, --json

An option that takes several values keeps its singular name; commas separate the values.
Older spellings are accepted and not shown: `--targets` (--target), `--policies` (--policy),
`--precision` (--dtype in export, both others in plan), quantize's `--weights` and `--cache`
(--weight-dtype, --cache-dtype), `--int8` (--weight-dtype int8), `--kind` (--model), and the bundle
as an argument. `--prompt` and the argument PROMPT are the same wherever one of them is.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from packforcing.presets import AUTOENCODERS
from packforcing.units import GIB, parse_memory

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Any], Any]

MAX_HISTORY_BLOCKS = 1000  # of a partition: the search for a plan visits every one
MAX_BUDGET_GIB = 10_000
JSON = "packforcing.json"  # in the context's `meta`: whether the result is printed as JSON


class Option(click.Option):
    """An option with older spellings, an argument of the same meaning, and a variable.

    Its environment variable ends in its spelling: `--json` of `render` is
    PACKFORCING_RENDER_JSON.

    Args:
        aliases: Spellings that are accepted and not shown.
        streams: Whether `-` is standard output; of every other `--out` it is refused.
        attrs: As for `click.Option`.
    """

    def __init__(
        self, *args: Any, aliases: Sequence[str] = (), streams: bool = False, **attrs: Any
    ) -> None:
        super().__init__(*args, **attrs)
        self.aliases, self.streams = list(aliases), streams

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        shown = self.opts
        self.opts = [*shown, *self.aliases]
        try:
            super().add_to_parser(parser, ctx)
        finally:
            self.opts = shown

    def consume_value(self, ctx: click.Context, opts: Mapping[str, Any]) -> tuple[Any, Any]:
        argument = opts.get(f"{self.name}_argument")
        if isinstance(argument, str):
            if isinstance(opts.get(self.name or ""), str):
                raise click.UsageError(
                    f"{self.opts[0]} is set twice: as an option and as '{argument}'", ctx
                )
            opts = {**opts, self.name or "": argument}
        return super().consume_value(ctx, opts)

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        if self.name == "out" and str(value) == "-" and not self.streams:
            self.type.fail("'-' is no name here; only render writes to standard output", self, ctx)
        return super().type_cast_value(ctx, value)

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        if ctx.auto_envvar_prefix is None or not self.allow_from_autoenv or self.hidden:
            return None
        spelling = max(self.opts, key=len).lstrip("-").replace("-", "_").upper()
        return os.environ.get(f"{ctx.auto_envvar_prefix}_{spelling}") or None


class _Argument(click.Argument):
    """An argument that sets an option; one without a metavar is not shown."""

    def get_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [self.metavar] if self.metavar else []


def option(*spellings: str, **attrs: Any) -> Decorator:
    """Decorate a command with an `Option`."""
    return click.option(*spellings, cls=Option, **attrs)


def argument_for(name: str, metavar: str = "") -> Decorator:
    """Accept an argument in the place of the option whose parameter is `name`."""
    return click.argument(
        f"{name}_argument", cls=_Argument, required=False, metavar=metavar, expose_value=False
    )


def options(*decorators: Decorator) -> Decorator:
    """Join decorators into one, in the order of `--help`."""

    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


# Types: what is wrong with a value is said before anything is loaded


class SizeType(click.ParamType):
    """Width and height in pixels, as in 832x480."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        # Wan's own tools write 832*480, others 832 x 480
        text = re.sub(r"\s*[xX\u00d7*]\s*", "x", value.strip())
        width, height = _integers(text, "x", 2) or self.fail(
            f"'{value}' is not WxH, like 832x480", param, ctx
        )
        return width, height


class HistoryType(click.ParamType):
    """Sink, mid and recent blocks, as in 2,16,1."""

    name = "history"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int, int]:
        if isinstance(value, tuple):
            return value
        blocks = _integers(value, ",", 3)
        if blocks is None:
            self.fail(f"'{value}' is not SINK,MID,RECENT, like 2,16,1", param, ctx)
        if max(blocks) > MAX_HISTORY_BLOCKS:
            self.fail(
                f"'{value}' has more than {MAX_HISTORY_BLOCKS} blocks in a partition", param, ctx
            )
        sink, mid, recent = blocks
        return sink, mid, recent


class BudgetsType(click.ParamType):
    """Amounts of memory in GiB, as in 4,6.5 or 8GiB; converted to bytes."""

    name = "budgets"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        budgets = []
        for part in value.split(","):
            try:
                size_gib = float(part.strip().lower().removesuffix("gib"))
            except ValueError:
                size_gib = math.nan
            if not 0 < size_gib < MAX_BUDGET_GIB:
                self.fail(f"'{value}' is not GiB, like 8 or 4,6.5,12", param, ctx)
            budgets.append(int(size_gib * GIB))
        return tuple(budgets)


class LimitType(click.ParamType):
    """A number of blocks, or an amount of memory, as in 512MiB."""

    name = "limit"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        if isinstance(value, int):
            return value
        if parse_memory(value) is not None:
            return str(value)
        try:
            return int(value)
        except ValueError:
            self.fail(f"'{value}' is no number of blocks, nor memory like 512MiB", param, ctx)


class NamesType(click.ParamType):
    """Names separated by commas."""

    name = "names"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(name.strip() for name in value.split(","))
        if not all(names):
            self.fail(f"'{value}' has an empty name", param, ctx)
        return names


class PrecisionType(click.ParamType):
    """Dtypes of weights and cache, as in fp16,int8; one name is for both."""

    name = "precision"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        weights, _, cache = value.partition(",")
        if weights not in WEIGHT_DTYPES or (cache or weights) not in CACHE_DTYPES:
            self.fail(f"'{value}' is not WEIGHTS,CACHE, like fp16,int8", param, ctx)
        return weights, cache or weights


MOST_STEPS = 50  # a smaller number alone counts steps, a larger one is a timestep


class StepsType(click.ParamType):
    """Timesteps before the shift, as in 1000,750,500,250, or their number."""

    name = "steps"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...] | int:
        if isinstance(value, tuple | int):
            return value
        if value.isascii() and value.isdigit() and 0 < int(value) <= MOST_STEPS:
            return int(value)
        try:
            parts = value.split(",") if "," in value else value.split()
            return tuple(map(float, parts))
        except ValueError:
            self.fail(f"'{value}' is not STEP,STEP,..., like 1000,750,500,250", param, ctx)


class ShardType(click.ParamType):
    """One of several equal parts, as in 2/8."""

    name = "shard"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        number, count = _integers(value, "/", 2) or (0, 0)
        if not 1 <= number <= count:
            self.fail(f"'{value}' is not I/N, from 1/N to N/N, like 2/8", param, ctx)
        return number, count


def _integers(text: str, separator: str, count: int) -> list[int] | None:
    parts = text.split(separator)
    if len(parts) != count or not all(part.isascii() and part.isdigit() for part in parts):
        return None
    return [int(part) for part in parts]


COMPUTE_DTYPES = ("fp32", "fp16")
QUANTIZED_WEIGHT_DTYPES = ("int8", "w8a8", "int4", "fp8", "nvfp4")
WEIGHT_DTYPES = ("fp32", "fp16", *QUANTIZED_WEIGHT_DTYPES)
CACHE_DTYPES = ("fp32", "fp16", "int8", "fp8")
ATTENTION_DTYPES = ("fp8",)
SIZE, HISTORY, BUDGETS, NAMES = SizeType(), HistoryType(), BudgetsType(), NamesType()
LIMIT, PRECISION, STEPS, SHARD = LimitType(), PrecisionType(), StepsType(), ShardType()
FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
PATH = click.Path(path_type=Path)


# Options that several commands share


def bundle_option(text: str = "Exported model.  [default: the demo model]", **attrs: Any) -> Any:
    """Add `--bundle`, or the bundle as an argument, which earlier releases asked for."""
    return options(
        option("--bundle", type=FOLDER, metavar="DIR", help=text, **attrs),
        argument_for("bundle"),
    )


def out_folder_option(default: str) -> Decorator:
    """Add `--out` for a folder of results."""
    return option(
        "--out",
        type=FOLDER,
        metavar="DIR",
        default=default,
        show_default=True,
        help="Folder for the results.",
    )


def seconds_option(default: float, text: str = "Length of the video.") -> Decorator:
    """Add `--seconds`, a length of video."""
    return option("--seconds", default=default, show_default=True, help=text)


seed_option = option(
    "--seed",
    default=0,
    show_default=True,
    help="The same command on the same machine, backend and threads gives the same video.",
)
strict_option = option(
    "--strict",
    is_flag=True,
    help="Refuse a prompt of more than 512 tokens instead of reading the first 511.",
)
encoder_attrs: dict[str, Any] = {"type": PATH, "metavar": "DIR"}
target_attrs: dict[str, Any] = {"type": NAMES, "metavar": "NAME[,NAME...]"}
# What `presets.policies` and `plan.TARGETS` have; neither is imported for --help
POLICY_NAMES = ("packforcing", "sliding-window", "sink-window", "full-history")
POLICY_HELP = (
    f"What blocks read of earlier ones: {', '.join(POLICY_NAMES[:-1])} or {POLICY_NAMES[-1]}."
)
OTHER_CONTEXT = "TensorRT engines refuse another context size than the bundle's."
TARGET_NAMES = (
    "sm75 (RTX 20), sm80 (A100), sm86 (RTX 30), sm87 (Jetson Orin), sm89 (RTX 40), sm110 (Jetson "
    "Thor), sm120 (RTX 50), sm121 (DGX Spark)"
)


def step_options(owner: str) -> Decorator:
    """Add the options for denoising steps; `owner` has the defaults."""
    default = f"  [default: the {owner}'s]"
    return options(
        option(
            "--steps",
            type=STEPS,
            metavar="STEP,...",
            help="Denoising steps from 1000 down, before the shift, like 1000,750,500,250; or how "
            f"many there are, where the weights were trained for that number.{default}",
        ),
        option(
            "--first-steps",
            type=STEPS,
            metavar="STEP,...",
            help=f"Denoising steps of the first block that is generated.{default}",
        ),
        option(
            "--shift",
            type=float,
            metavar="S",
            help=f"Shift of the noise levels toward more noise, like 5.{default}",
        ),
        option(
            "--commit",
            type=click.Choice(["clean", "last-step"]),
            help="Source of the keys and values that later blocks read. clean: an extra call on "
            "the finished, noise-free block. last-step: the last step, whose input has noise."
            f"{default}",
        ),
    )


shape_options = options(
    option("--size", type=SIZE, metavar="WxH", help="Pixels of a frame.  [default: the model's]"),
    option(
        "--block-frames",
        type=click.IntRange(1, 64),
        metavar="N",
        help="Latent frames generated together: 4 in PackForcing, 3 in Self-Forcing.  "
        "[default: the model's]",
    ),
    option(
        "--history",
        type=HISTORY,
        metavar="SINK,MID,RECENT",
        help="Size of the context in blocks, like 2,16,1: the first, selected compressed ones, the "
        "newest. MID is 0 in a window.  [default: the policy's]",
    ),
    option(
        "--policy",
        metavar="NAME",
        help=f"{POLICY_HELP}  [default: packforcing for demo and wan-1.3b, for others the one in "
        "`packforcing models`]",
    ),
    option(
        "--vae",
        type=click.Choice(list(AUTOENCODERS)),
        help="Autoencoder: a tiny one, or Wan's.  [default: the one in the weights, or the tiny "
        "one; `plan --budget` picks Wan's if everything else stays whole]",
    ),
    step_options("model"),
)
filter_options = options(
    option(
        "--scale",
        type=click.IntRange(1, 4),
        default=1,
        show_default=True,
        metavar="N",
        help="Scale frames by N on their way to the file (Lanczos).",
    ),
    option(
        "--interpolate",
        type=click.IntRange(1, 4),
        default=1,
        show_default=True,
        metavar="N",
        help="Write N times the frames per second, those between interpolated along the motion.",
    ),
)
backend_option = option(
    "--backend",
    metavar="NAME",
    default="onnxruntime",
    show_default=True,
    help="Library that runs the model: onnxruntime on the CPU; tensorrt-rtx, tensorrt or "
    "onnxruntime-cuda on a GPU.",
)
run_options = options(
    option(
        "--threads",
        type=click.IntRange(1, 1024),
        metavar="N",
        help="CPU threads.  [default: the cores that this process may use; where a render is "
        "resumed, as many as it began with]",
    ),
    backend_option,
)


def _note_json(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    ctx.meta[JSON] = value
    return value


json_option = option(
    "--json", "as_json", is_flag=True, callback=_note_json, help="Print the result as JSON."
)
