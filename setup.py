"""How moelora is built. Settings of the tools are in pyproject.toml, exact versions in constraints.txt.

The C++ kernels (csrc/) are built against the torch of the building environment, so pip needs --no-build-isolation.
MOELORA_BUILD, read here and nowhere else: auto (the default) builds them where a compiler and torch are found and goes
on without them otherwise, 1 fails without them (so use it for a wheel to publish), 0 leaves them out. The result serves
every torch from 2.10 on and every Python from 3.10 on.
"""

import importlib.util
import os
import platform
import re
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

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


WISH = os.environ.get("MOELORA_BUILD", "auto")
AVX2 = ["-mavx2", "-mfma"]
FLAGS = {
    "kernels_avx2": AVX2,
    "kernels_avx512": [
        *AVX2,
        *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")),
        "-mprefer-vector-width=512",
        "-Wno-uninitialized",  # GCC 12 reports its own headers
        "-Wno-maybe-uninitialized",
    ],
}
"""Of single files. Which of them runs is decided at run time, by the machine's instructions."""


def extensions() -> list[Extension]:
    """The kernels, or nothing where they are not wanted or cannot be built."""
    if WISH not in ("auto", "0", "1"):
        raise SystemExit(f"MOELORA_BUILD is {WISH!r}; it can be auto, 0 or 1")
    torch = importlib.util.find_spec("torch")
    missing = [] if sys.platform in ("linux", "darwin") else [f"a kernel for {sys.platform}"]
    if torch is None or torch.origin is None:
        missing.append("torch in the building environment (pip install --no-build-isolation)")
    if WISH == "1" and missing:
        raise SystemExit(f"MOELORA_BUILD=1: there is no {' and no '.join(missing)}")
    if WISH == "0" or missing:
        return []
    home = Path(torch.origin).parent
    return [
        Extension(
            "moelora.ops._cpu",
            sources=sorted(path.relative_to(HERE).as_posix() for path in (HERE / "csrc").glob("*.cpp")),
            depends=sorted(path.relative_to(HERE).as_posix() for path in (HERE / "csrc").glob("*.[hi]*")),
            # TORCH_TARGET_VERSION: nothing newer than the C interface of torch 2.10 is used.
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",
                "-fvisibility=hidden",
                f"-isystem{home / 'include'}",
            ],
            library_dirs=[str(home / "lib")],
            libraries=["torch_cpu"],
            language="c++",
            optional=WISH == "auto",
            py_limited_api=True,
        )
    ]


class BuildKernels(build_ext):
    """Adds the flags of single files, which setuptools has no place for."""

    def build_extension(self, extension: Extension) -> None:
        compile_one = self.compiler._compile
        intel = platform.machine().lower() in ("x86_64", "amd64")

        def with_flags(target, source, suffix, arguments, extra, *rest):  # type: ignore[no-untyped-def]
            own = FLAGS.get(Path(source).stem, []) if intel else []
            return compile_one(target, source, suffix, arguments, [*extra, *own], *rest)

        self.compiler._compile = with_flags
        try:
            super().build_extension(extension)
        except (CompileError, LinkError) as error:
            if not extension.optional:
                raise SystemExit(f"MOELORA_BUILD=1: the C++ kernels cannot be built: {error}") from None
            print("moelora: the C++ kernels cannot be built; all works without them, on CPUs slower", file=sys.stderr)
            raise  # setuptools goes on without an optional extension
        finally:
            self.compiler._compile = compile_one


kernels = extensions()
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
    ext_modules=kernels,
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if kernels else {},
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
        "transformers>=5.10",
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
        "quant": ["bitsandbytes>=0.50"],
        "triton": ["triton>=3.6; sys_platform == 'linux'"],
        "dev": [
            "bitsandbytes>=0.50; sys_platform == 'linux'",
            "deepspeed>=0.18; sys_platform == 'linux'",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "ruff>=0.12",
            "mypy>=1.15",
            "types-PyYAML",
            "peft>=0.18",
            "triton>=3.6; sys_platform == 'linux'",
        ],
    },
)
