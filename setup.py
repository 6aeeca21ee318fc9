"""Packaging. The ranges below are the only place that says which versions are supported."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# Read, not imported: a build environment has none of the dependencies.
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "genrecal_ds" / "__init__.py").read_text(), re.MULTILINE
)
if VERSION is None:
    raise SystemExit("setup.py: no __version__ line in genrecal_ds/__init__.py")

EVALUATION = ["matplotlib", "scikit-learn", "scipy"]  # figures, t-SNE; Student's t
DEMO = ["scikit-learn"]  # its handwritten digits are the demo's pictures
LORA = ["peft"]
DEVELOPMENT = [
    *LORA,
    "num2words",  # transformers' SmolVLM processor wants it, for videos
    "hypothesis",
    "matplotlib",
    "mypy",
    "pyarrow",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "scikit-learn",
    "scipy",
    "setuptools>=77",  # the packaging test builds a wheel without build isolation
    "tensorboard",
    "triton>=3.6",  # its interpreter runs the kernels' tests where there is no GPU
    "types-PyYAML",
]

setup(
    name="genrecal_ds",
    version=VERSION[1],
    description="Distils a large VLM into a small one with another tokenizer and architecture",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11,<2.15",
        "deepspeed>=0.19,<0.20",
        "transformers>=5.17,<6",
        "webdataset>=1.0,<2",
        "jinja2",
        "numpy",
        "pillow",
        "protobuf",
        "psutil",
        "pydantic>=2",
        "pyyaml",
        "rich",
        "safetensors",
        "sentencepiece",
        "tiktoken",
    ],
    extras_require={
        "flash": ["flash-attn"],
        "int8": ["torchao"],  # teacher.placement: replica_int8
        "lora": LORA,  # student.lora
        "eval": EVALUATION,
        "peers": ["liger-kernel", "cut-cross-entropy"],  # make bench-cpu, bench-gpu
        "cloud": ["fsspec", "s3fs", "gcsfs"],  # data.remote: shards behind a local cache
        "parquet": ["pyarrow"],  # data_tools.build --format parquet
        "demo": DEMO,
        "dev": DEVELOPMENT,
    },
    packages=find_packages(
        include=[
            f"{top}{below}"
            for top in ("genrecal_ds", "data_tools", "ds_configs", "launch")
            for below in ("", ".*")
        ]
    ),
    package_data={
        "genrecal_ds": ["py.typed", "planner/models/*.json"],
        "ds_configs": ["*.json"],
        "launch": [
            "recipes/**/*.yaml",
            "grids/*.yaml",
            "slurm/*",
            "studies/*",
            "containers/*",
            "hostfile*",
            "demo/**/*.json",
            "demo/**/*.yaml",
            "demo/**/*.jinja",
        ],
    },
    entry_points={
        "console_scripts": ["genrecal-train = launch.train:main"],
        "lmms_eval.models": ["genrecal_export = genrecal_ds.evaluate.lmms_model:MANIFEST"],
    },
    zip_safe=False,
)
