"""The architecture as a law: rooms import one way, files stay short, names and words stay clear."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("packforcing", "runtime", "export", "calibration", "evaluation", "app")  # in order
LONGEST_FILE, LONGEST_TEST = 500, 800  # lines
LARGEST_SHARE = 0.35  # of the code, of one room

# Words of a private dialect, as names of variables, parameters, fields and attributes.
VAGUE_NAMES = {"asked", "found", "given", "held", "kept", "said", "told", "wanted"}
# Public functions that nobody can search for.
VAGUE_FUNCTIONS = {"choose", "compare", "judge", "known", "opened", "read", "run", "tell", "ways"}
# Prose: the term of the field is on the right.
DIALECT = {
    r"(?<!model[ -])(?<!mirror's )\bcards?\b": "GPU",
    r"number formats?": "dtype",
    r"small numbers": "quantized weights",
    r"what .{0,30} (?:is|are) multiplied (?:with|by)": "activations, inputs",
    r"in work\b": "current",
    r"gone on with|goes on with|going on where": "resumed",
    r"page-locked": "pinned",
    r"in the checkout": "packforcing.extras.install_command",
    r"\b\w*quantis\w*|\bcolour\w*|\bnormalis\w*|\brecognis\w*|\binitialis\w*|\bsynchronis\w*": (
        "American spelling"
    ),
    r"\bgrey\w*|\bcentre[sd]?\b|(?<!\")\blicence\w*|\bneighbour\w*|\bbehaviour\w*|\bjudgement": (
        "American spelling"
    ),
}


def code_files(*folders: str) -> list[Path]:
    """Python files that git tracks or would track, below folders of the repository."""
    if not (ROOT / ".git").exists():  # a source distribution
        return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in listing.splitlines() if name.endswith(".py")]
    return [path for path in paths if path.exists()]


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    """The import name of a file in a room."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "packforcing" else ("packforcing", *parts))


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS[1:] else "packforcing"


def imports(node: ast.AST) -> Iterator[str]:
    """Every dotted name that a file imports at run time, inside functions as well."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from (name for part in child.orelse for name in imports(part))
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative imports hide the room"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        else:
            yield from imports(child)


@cache
def import_graph() -> dict[str, set[str]]:
    """The modules of the rooms, each with those of them that it imports."""
    files = {module_name(path): path for path in code_files(*ROOMS)}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        graph[module] = set()
        for name in imports(syntax(path)):
            while name and name not in files:
                name = name.rpartition(".")[0]
            if name and name != module:
                graph[module].add(name)
    return graph


@pytest.mark.parametrize(
    ("library", "place"),
    [
        ("onnxruntime", "runtime/backends/onnxruntime.py"),  # its usage reports are turned off
        ("ray", "app/jobs/ray_actors.py"),
    ],
)
def test_a_library_is_imported_in_one_place(library, place):
    importers = {
        label(path)
        for path in code_files(*ROOMS)
        if any(name.split(".")[0] == library for name in imports(syntax(path)))
    }
    assert importers == {place}


def test_rooms_import_only_those_before_them():
    upward = [
        f"{module} imports {name}"
        for module, names in import_graph().items()
        for name in names
        if ROOMS.index(room_of(name)) > ROOMS.index(room_of(module))
    ]
    assert not upward


def test_no_imports_close_a_circle():
    graph, finished = import_graph(), set[str]()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in finished:
            for name in graph[module]:
                visit(name, (*path, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


def test_the_runtime_needs_neither_torch_nor_onnx():
    heavy = {"torch", "onnx", "onnx_ir", "onnxscript", "diffusers", "transformers", "cv2"}
    for path in code_files("runtime"):
        assert not heavy & {name.split(".")[0] for name in imports(syntax(path))}, label(path)


@pytest.mark.parametrize(
    ("folders", "longest"),
    [((*ROOMS, "benchmarks", "examples"), LONGEST_FILE), (("tests",), LONGEST_TEST)],
)
def test_files_are_short_enough_to_read(folders, longest):
    lengths = {
        label(path): len(path.read_text("utf-8").splitlines()) for path in code_files(*folders)
    }
    assert not {name: length for name, length in lengths.items() if length > longest}


def code_lines(path: Path) -> int:
    """Lines with code on them: no blank line, comment or docstring."""
    ignored = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
               tokenize.ENCODING, tokenize.ENDMARKER}  # fmt: skip
    docstrings = {
        line
        for node in ast.walk(syntax(path))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }  # fmt: skip
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline):
        if token.type not in ignored:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_no_room_holds_most_of_the_code():
    sizes = {room: sum(map(code_lines, code_files(room))) for room in ROOMS}
    shares = {room: size / sum(sizes.values()) for room, size in sizes.items()}
    assert max(shares.values()) <= LARGEST_SHARE, shares


def names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every name that a file gives to a variable, parameter, field or attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


def test_names_say_what_they_hold():
    vague = [
        f"{label(path)}:{line}: {name}"
        for path in code_files(*ROOMS, "tests", "benchmarks", "examples")
        for name, line in names(syntax(path))
        if name.strip("_") in VAGUE_NAMES
    ]
    assert not vague, "\n".join(vague)


def test_tests_use_no_private_attributes():
    """What a test needs is public: a constructor's argument, a documented attribute, a callback."""
    private = [
        f"{label(path)}:{node.lineno}: {ast.unparse(node)}"
        for path in code_files("tests")
        for node in ast.walk(syntax(path))
        if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr)
        and node.attr not in ("_asdict", "_replace")  # public, of named tuples
        and not (isinstance(node.value, ast.Name) and node.value.id == "self")
    ]  # fmt: skip
    assert not private, "\n".join(private)


def test_public_functions_can_be_searched_for():
    vague = [
        f"{label(path)}: {node.name}"
        for path in code_files(*ROOMS)
        for node in syntax(path).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in VAGUE_FUNCTIONS
        and not is_command(node)
    ]  # fmt: skip
    assert not vague


def is_command(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """Whether a function is a command of the CLI, which is named as users call it."""
    return any(".command(" in ast.unparse(decorator) for decorator in node.decorator_list)


def prose(path: Path) -> Iterator[tuple[str, int]]:
    """Comments and strings of a code file, lines of a page."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from ((line, number) for number, line in enumerate(text.splitlines(), 1))
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            for number, line in enumerate(token.string.splitlines(), token.start[0]):
                yield line, number


def test_prose_uses_the_words_of_the_field():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    private = [
        f"{label(path)}:{line}: {match[0]!r} -> {term}"
        for path in [*code_files(*ROOMS, "benchmarks", "examples"), *pages]
        for text, line in prose(path)
        for pattern, term in DIALECT.items()
        for match in re.finditer(pattern, text, re.IGNORECASE)
    ]
    assert not private, "\n".join(private)


def test_messages_about_missing_packages_name_extras_that_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras, calls = set(project["optional-dependencies"]), 0
    for path in code_files(*ROOMS):
        for node in ast.walk(syntax(path)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            first = {"install_command": 0, "optional_imports": 1}.get(node.func.id)
            for argument in node.args[first:] if first is not None else ():
                if isinstance(argument, ast.Constant):
                    assert argument.value in extras, f"{label(path)}:{node.lineno}"
                    calls += 1
    assert calls > 5
    for path in code_files(*ROOMS):  # none is written by hand
        if path.name != "extras.py":
            for text, line in prose(path):
                for match in re.finditer(r"pip install \W*(?:packforcing|\.)?\[([^\]]*)\]", text):
                    assert set(match[1].split(",")) <= extras, f"{label(path)}:{line}"
