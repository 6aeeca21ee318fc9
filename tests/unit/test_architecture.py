"""Who may import whom, read from the source (no torch needed), and README's map against the tree.

A rule about a room that does not exist yet is skipped; one about a room that does is checked in
full. Imports inside functions count, unless a rule says "at import time".
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("genrecal_ds", "data_tools", "ds_configs", "launch")
OPS_MAY_IMPORT = {"torch", "triton", "genrecal_ds.ops", "genrecal_ds.errors"}
DATA_TOOLS_MAY_IMPORT = (
    "genrecal_ds.recipe.config",
    "genrecal_ds.data",
    "genrecal_ds.errors",
    "genrecal_ds.models.chat",
    "genrecal_ds.models.processors",
    "genrecal_ds.console",
)


def sources(*places: str) -> list[Path]:
    """The python files at or below each place; skips the test when there is none."""
    found: list[Path] = []
    for place in places:
        path = ROOT / place
        found += [path] if path.is_file() else sorted(path.rglob("*.py"))
    if not found:
        pytest.skip(f"nothing at {', '.join(places)} yet")
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


def test_files_of_launch_import_one_another_in_no_circle():
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sources("launch")
    }
    wanted = {
        module: {
            other
            for other in files
            if other not in (module, "launch") and any(is_in(n, other) for n in imported(path))
        }
        for module, path in files.items()
    }
    while leaves := {module for module, others in wanted.items() if not others & wanted.keys()}:
        wanted = {module: others for module, others in wanted.items() if module not in leaves}
    assert not wanted, f"a circle among {sorted(wanted)}"


def test_no_utils():
    assert [path for path in sources(*PACKAGES) if path.stem in ("utils", "util", "helpers")] == []


def read_map(text: str) -> dict[str, str]:
    """README's map as path -> description. Two blanks indent; a folder's name ends with /."""
    block = re.search(r"<!-- map:start -->\n```\n(.*?)```\n<!-- map:end -->", text, re.DOTALL)
    assert block, "README.md has no fenced block between map:start and map:end"
    entries: dict[str, str] = {}
    folders: list[str] = []
    for line in block[1].splitlines():
        if not line.strip():
            continue
        name, _, description = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        assert depth <= len(folders), f"README.md's map: {name} is indented too far"
        del folders[depth:]
        entries["".join(folders) + name] = description.strip()
        if name.endswith("/"):
            folders.append(name)
    return entries


def tree() -> set[str]:
    """Modules, and folders that hold a file, of the packages that README's map must name."""
    found: set[str] = set()
    for package in ("genrecal_ds", "launch", "data_tools"):
        for path in (ROOT / package).rglob("*"):
            place = path.relative_to(ROOT)
            if path.is_dir() or "__pycache__" in place.parts:
                continue
            found |= {f"{folder.as_posix()}/" for folder in place.parents if folder.parts}
            if path.suffix == ".py" and path.name not in ("__init__.py", "__main__.py"):
                found.add(place.as_posix())
    return found


def test_readme_map_equals_the_tree():
    entries = read_map((ROOT / "README.md").read_text())
    problems = [f"missing: {path}" for path in sorted(tree() - entries.keys())]
    for path, description in entries.items():
        if not ((ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()):
            problems.append(f"gone: {path}")
        elif not description:
            problems.append(f"no description: {path}")
    assert not problems, "README.md's map and the tree differ\n  " + "\n  ".join(problems)
