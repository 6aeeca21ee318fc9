"""Who may import whom, read from the source (no torch needed), and docs/map.md against the tree.

A rule about a room that is not there fails. Imports inside functions count, unless a rule says
"at import time".
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from genrecal_ds.recipe.kinds import KINDS

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("genrecal_ds", "data_tools", "ds_configs", "launch")
# From the ground up: a room imports rooms below it alone.
FLOORS = (
    "errors", "ops", "dist", "recipe", "console", "data", "models", "objectives", "estimate",
    "evaluate", "training", "planner", "analysis", "ablate", "export", "status", "doctor",
)  # fmt: skip
OPS_MAY_IMPORT = {"torch", "triton", "genrecal_ds.ops", "genrecal_ds.errors", "genrecal_ds.IGNORE"}
DATA_TOOLS_MAY_IMPORT = (
    "genrecal_ds.recipe.config",
    "genrecal_ds.data",
    "genrecal_ds.errors",
    "genrecal_ds.models.chat",
    "genrecal_ds.models.processors",
    "genrecal_ds.console",
)


def sources(*places: str) -> list[Path]:
    """The python files at or below each place; fails when there is none."""
    found: list[Path] = []
    for place in places:
        path = ROOT / place
        found += [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert found, f"nothing at {', '.join(places)}: a rule about it would hold of nothing"
    return found


def import_nodes(tree: ast.AST, at_import_time: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not (at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from import_nodes(node, at_import_time)


def imported(path: Path, at_import_time: bool = False, text: str | None = None) -> set[str]:
    """Dotted names a file imports; `from a import b` gives a.b, since b may be a module."""
    names: set[str] = set()
    for node in import_nodes(ast.parse(text or path.read_text()), at_import_time):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            continue
        module = node.module or ""
        if node.level:
            parents = path.relative_to(ROOT).parts[: -node.level]
            module = ".".join((*parents, module)).rstrip(".")
        names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def is_in(name: str, rooms: str | tuple[str, ...] | set[str]) -> bool:
    rooms = (rooms,) if isinstance(rooms, str) else tuple(rooms)
    return any(name == room or name.startswith(room + ".") for room in rooms)


def importers(files: list[Path], room: str) -> set[str]:
    """Which of the files import something of the room, as paths from the root."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in files
        if any(is_in(name, room) for name in imported(path))
    }


def test_reads_every_form_of_import():
    text = (
        "import a.b as c\nfrom d import e\nfrom . import f\nfrom ..g.h import i\n"
        "if True:\n    import j\ndef k():\n    import l\n    def m():\n        from n import o\n"
        "class P:\n    import q\n"
    )
    path = ROOT / "genrecal_ds" / "data" / "reader.py"
    at_import_time = {"a.b", "d.e", "genrecal_ds.data.f", "genrecal_ds.g.h.i", "j", "q"}
    assert imported(path, at_import_time=True, text=text) == at_import_time
    assert imported(path, text=text) == at_import_time | {"l", "n.o"}


def test_deepspeed_is_imported_by_engine_and_checkpoint_only():
    allowed = {"genrecal_ds/training/engine.py", "genrecal_ds/training/checkpoint.py"}
    assert importers(sources(*PACKAGES), "deepspeed") <= allowed


def test_webdataset_is_imported_by_data_and_data_tools_only():
    found = importers(sources(*PACKAGES), "webdataset")
    allowed = ("genrecal_ds/data/", "data_tools/")
    assert [path for path in found if not path.startswith(allowed)] == []


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("genrecal_ds/data", "genrecal_ds.models"),
        ("genrecal_ds/data", "genrecal_ds.ops"),
        ("genrecal_ds/data", "transformers"),
        ("genrecal_ds/models", "genrecal_ds.training"),
        ("genrecal_ds/models", "genrecal_ds.objectives"),
        ("genrecal_ds/objectives", "genrecal_ds.training"),
        ("genrecal_ds/evaluate", "genrecal_ds.training"),
        ("genrecal_ds/analysis", "genrecal_ds.training"),
        ("genrecal_ds/training", "genrecal_ds.export"),
        ("genrecal_ds/training/trainer.py", "genrecal_ds.models"),
        ("genrecal_ds/training/trainer.py", "transformers"),
        ("genrecal_ds/training/trainer.py", "deepspeed"),
        ("genrecal_ds", "launch"),
        ("genrecal_ds", "data_tools"),
        ("data_tools", "launch"),
    ],
)
def test_room_does_not_import(room: str, forbidden: str):
    assert importers(sources(room), forbidden) == set()


def test_export_knows_checkpoints_only_and_not_at_import_time():
    """DeepSpeed wrote the shards, so only training/checkpoint.py can read them."""
    export = ROOT / "genrecal_ds/export.py"
    training = {name for name in imported(export) if is_in(name, "genrecal_ds.training")}
    allowed = {"genrecal_ds.training.checkpoint", "genrecal_ds.training.manifest"}
    assert all(is_in(name, allowed) for name in training)
    eager = imported(export, at_import_time=True)
    assert not any(is_in(name, "genrecal_ds.training") for name in eager)


def test_doctor_and_planner_know_how_stages_are_built_and_not_at_import_time():
    """As --dry-run does: to share what it prints, and to refuse a recipe before torch is there."""
    rooms = {"doctor.py": ("inputs", "weights"), "planner": ()}
    for room, allowed in rooms.items():
        for path in sources(f"genrecal_ds/{room}"):
            training = {name for name in imported(path) if is_in(name, "genrecal_ds.training")}
            names = {f"genrecal_ds.training.{name}" for name in allowed}
            assert all(is_in(name, names) for name in training)
            eager = imported(path, at_import_time=True)
            assert not any(is_in(name, "genrecal_ds.training") for name in eager)


def test_ops_import_torch_only():
    for path in sources("genrecal_ds/ops"):
        outside = {
            name
            for name in imported(path)
            if not is_in(name, OPS_MAY_IMPORT) and name.split(".")[0] not in sys.stdlib_module_names
        }
        assert outside == set(), f"{path.relative_to(ROOT)} imports more than torch"


def test_ops_import_triton_lazily():
    """A file may import triton at its top only if every other one imports that file lazily."""
    files = sources("genrecal_ds/ops")
    kernels = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in files
        if any(is_in(name, "triton") for name in imported(path, at_import_time=True))
    }
    for path in sources("genrecal_ds"):
        if path in kernels.values():
            continue
        eager = {n for n in imported(path, at_import_time=True) if is_in(n, set(kernels))}
        assert eager == set(), f"{path.relative_to(ROOT)} pulls in triton when imported"


def test_data_tools_import_data_config_and_processors_only():
    for path in sources("data_tools"):
        names = {name for name in imported(path) if is_in(name, "genrecal_ds")}
        others = {name for name in names if not is_in(name, DATA_TOOLS_MAY_IMPORT)}
        assert others == set(), f"{path.relative_to(ROOT)} reaches into other rooms"


@pytest.mark.parametrize(
    "leaf",
    [
        "genrecal_ds/recipe",
        "genrecal_ds/console",
        "genrecal_ds/errors.py",
        "genrecal_ds/estimate/memory.py",
    ],
)
@pytest.mark.parametrize("heavy", ["torch", "transformers", "deepspeed"])
def test_leaf_imports_nothing_heavy(leaf: str, heavy: str):
    assert importers(sources(leaf), heavy) == set()


@pytest.mark.parametrize(
    "module", ["genrecal_ds.recipe.config", "genrecal_ds.doctor", "launch.train"]
)
def test_importing_leaves_torch_out(module: str):
    """A recipe is refused, and --help printed, before torch is imported: also through others."""
    sources(module.replace(".", "/") + ".py")
    program = (
        f"import sys, {module}\n"
        "print([m for m in ('torch', 'transformers', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def arrows(*places: str) -> dict[str, set[str]]:
    """Every module and the modules among them that it imports, also inside functions."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sources(*places)
    }
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        # `from a.b import c` is an arrow to a.b.c where that is a module, else to a.b.
        names = {name if name in files else name.rpartition(".")[0] for name in imported(path)}
        found[module] = (names & files.keys()) - {module}
    return found


def circles(wanted: dict[str, set[str]]) -> set[str]:
    """Modules that import each other in a loop, or that need one that does."""
    while leaves := {module for module, others in wanted.items() if not others & wanted.keys()}:
        wanted = {module: others for module, others in wanted.items() if module not in leaves}
    return set(wanted)


def room_of(module: str) -> str:
    """The entry at the top of genrecal_ds that holds a module."""
    return module.split(".")[1] if "." in module else ""


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == set()
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"a", "b", "c"}


def test_no_circle_and_no_arrow_upwards():
    """Prints, with pytest -s, what the house looks like."""
    house = arrows("genrecal_ds")
    between = {(room_of(a), room_of(b)) for a, others in house.items() for b in others}
    between = {(a, b) for a, b in between if a != b and a and b}
    upwards = [(a, b) for a, b in between if FLOORS.index(a) <= FLOORS.index(b)]
    top = [path for path in (ROOT / "genrecal_ds").iterdir() if path.is_file()]
    num_lines = sum(len(path.read_text().splitlines()) for path in sources("genrecal_ds"))
    in_circles = circles(house) | circles(arrows("launch"))
    print(
        f"\ngenrecal_ds: {num_lines} lines, {len(house)} modules, {len(top)} files at the top, "
        f"{len({room_of(m) for m in house} - {''})} rooms, {len(between)} arrows between rooms, "
        f"{len(upwards)} upwards, {len(in_circles)} modules in circles"
    )
    assert in_circles == set() and upwards == []
    assert len(top) <= 8


def compared_strings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every string that a comparison or a match names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare | ast.MatchValue):
            for child in ast.walk(node):
                if isinstance(child, ast.Constant) and isinstance(child.value, str):
                    yield child.lineno, child.value


def test_only_the_table_of_kinds_knows_their_names():
    """A comparison with a kind's name anywhere else would be a second description of it."""
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text!r}"
        for path in sources(*PACKAGES)
        if path != ROOT / "genrecal_ds/recipe/kinds.py"
        for line, text in compared_strings(path)
        if text in KINDS
    ]
    print(f"\ncomparisons with a kind's name outside recipe/kinds.py: {len(found)}")
    assert found == []


def test_unit_tests_lie_where_their_module_does():
    """tests/unit/ROOM/test_MODULE.py or test_MODULE_ASPECT.py, MODULE anywhere in the room."""
    lost = []
    for path in sources("tests/unit"):
        place = path.relative_to(ROOT / "tests/unit")
        if not path.name.startswith("test_") or len(place.parts) == 1:
            continue
        room = place.parent.as_posix()
        folder = ROOT / (room if room.split("/")[0] in PACKAGES else f"genrecal_ds/{room}")
        modules = {entry.stem for entry in folder.rglob("*")} | {folder.name}
        if not any(path.stem == f"test_{m}" or path.stem.startswith(f"test_{m}_") for m in modules):
            lost.append(place.as_posix())
    assert lost == []


def test_no_utils():
    assert [path for path in sources(*PACKAGES) if path.stem in ("utils", "util", "helpers")] == []
