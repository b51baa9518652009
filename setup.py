"""How moelora is built. Settings of the tools are in pyproject.toml, exact versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
FOLDERS = ("recipes", "triton_kernels")
"""Folders beside moelora/ that are installed inside it: recipes/ is imported as moelora.recipes."""


def version() -> str:
    """The version, from moelora/__init__.py without importing it."""
    found = re.search(r'^__version__ = "([^"]+)"', (HERE / "moelora/__init__.py").read_text(encoding="utf-8"), re.M)
    if found is None:
        raise SystemExit('moelora/__init__.py: no line __version__ = "..."')
    return found[1]


def readme() -> str:
    """The text shown on the package's page."""
    path = HERE / "README.md"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


mapped = {f"moelora.{folder}": folder for folder in FOLDERS if (HERE / folder / "__init__.py").is_file()}

setup(
    name="moelora",
    version=version(),
    description="Mixtures of LoRA experts for transformers models",
    long_description=readme(),
    long_description_content_type="text/markdown",
    author="The moelora authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["lora", "mixture of experts", "fine-tuning", "peft", "transformers"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=[*find_packages(include=["moelora", "moelora.*"]), *mapped],
    package_dir=mapped,
    package_data={
        "": ["*.jinja", "*.j2"],
        "moelora": ["py.typed", "assets/**"],
        "moelora.recipes": ["**/*.yaml", "**/*.json"],
    },
    include_package_data=False,
    zip_safe=False,
    entry_points={"console_scripts": ["moelora = moelora.cli.main:app"]},
    install_requires=[
        "torch>=2.10",
        "transformers>=5.0",
        "accelerate>=1.0",
        "trl>=1.16; python_version >= '3.11'",
        "trl>=1.14; python_version < '3.11'",  # 1.15 needs Python 3.11
        "datasets>=4.0",
        "safetensors>=0.4",
        "huggingface-hub>=1.0",
        "regex>=2024.4.16",
        "pydantic>=2.8",
        "pyyaml>=6",
        "typer>=0.12",
        "rich>=13",
        "jinja2>=3.1",
        "tensorboard>=2.15",
        "matplotlib>=3.8",
    ],
    extras_require={
        "deepspeed": ["deepspeed>=0.18"],
        "eval": ["lm-eval>=0.4.9"],
        "quant": ["bitsandbytes>=0.48"],
        "triton": ["triton>=3.6; sys_platform == 'linux'"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "ruff>=0.12",
            "mypy>=1.15",
            "types-PyYAML",
            "peft>=0.18",
        ],
    },
)
