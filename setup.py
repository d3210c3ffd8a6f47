"""Builds memkern's compiled libraries: CMakeLists.txt says what is built, this file finds the tools and drives it.

Without a compiler, or without torch, the install is pure Python and says why. ``MEMKERN_BUILD_CPP=0/1`` and
``MEMKERN_BUILD_CUDA=0/1`` decide by hand, ``TORCH_CUDA_ARCH_LIST`` and ``MAX_JOBS`` are honoured.
"""

from __future__ import annotations

import filecmp
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)  # the stable ABI that the operator libraries are built against


@dataclass(frozen=True)
class Plan:
    """What this machine can build; an empty ``libraries`` is a pure-Python install for ``reason``."""

    libraries: tuple[str, ...] = ()
    reason: str = ""
    notes: tuple[str, ...] = ()
    defines: tuple[tuple[str, str], ...] = ()
    cmake: str = ""


def tool(name: str) -> str | None:
    """A program of this Python's own environment, else of PATH; an absolute name is taken as it is."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def torch_root() -> Path | None:
    """The folder of the torch that memkern will run with, without importing it.

    pip hides the environment's packages from an isolated build; ``sysconfig`` still names their folder.
    """
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        return Path(spec.origin).parent
    for site in dict.fromkeys(sysconfig.get_paths()[key] for key in ("purelib", "platlib")):
        linked = [line for pth in sorted(Path(site).glob("*.pth")) for line in pth.read_text().splitlines()]
        for folder in [site, *(line for line in linked if os.path.isabs(line))]:
            if (Path(folder) / "torch" / "version.py").is_file():
                return Path(folder) / "torch"
    return None


def find_nvcc() -> str | None:
    """nvcc of $CUDA_HOME, $CUDA_PATH, PATH or /usr/local/cuda, in this order."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (found := shutil.which("nvcc", path=str(Path(home) / "bin"))):
            return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def nvcc_version(nvcc: str) -> tuple[int, int]:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", text)
    if match is None:
        raise SystemExit(f"memkern: {nvcc} --version names no release:\n{text}")
    return int(match[1]), int(match[2])


def cuda_architectures(nvcc: tuple[int, int]) -> tuple[str, str]:
    """The compute capabilities to build for, as torch writes them ("9.0a;10.0+PTX") and as CMake does."""
    default = "8.0;9.0a;10.0+PTX" if nvcc >= (12, 8) else "8.0+PTX;9.0a"
    # `or`: make and container images may export it empty.
    listed = re.split(r"[;,\s]+", (os.environ.get("TORCH_CUDA_ARCH_LIST") or default).strip(" ;"))
    targets = []
    for entry in listed:
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(
                f"memkern: TORCH_CUDA_ARCH_LIST has {entry!r}; expected capabilities such as '8.0;9.0a;10.0+PTX'"
            )
        number = match[1] + match[2] + match[3]
        targets += [f"{number}-real"] + ([f"{number}-virtual"] if match[4] else [])
    return ";".join(listed), ";".join(targets)


def switch(name: str) -> bool | None:
    """A MEMKERN_BUILD_* variable: on, off, or None to decide by what is there."""
    value = os.environ.get(name, "").strip().lower()
    if value in ("", "auto"):
        return None
    if value in ("1", "on", "true", "yes"):
        return True
    if value in ("0", "off", "false", "no"):
        return False
    raise SystemExit(f"memkern: {name}={value!r}; expected 0 or 1")


def git_state() -> str:
    """Commit of this checkout, with "-dirty" when files differ from it; empty outside a checkout (an sdist)."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return ""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def memkern_version() -> str:
    match = re.search(r'^__version__ = "(.+)"$', (ROOT / "memkern" / "__init__.py").read_text(), re.MULTILINE)
    assert match is not None, "memkern/__init__.py has no __version__ line"
    return match[1]


def interface(library: str) -> str:
    """See memkern/_interface.py; importing memkern would need torch."""
    return runpy.run_path(str(ROOT / "memkern" / "_interface.py"))["interface"](ROOT / "csrc", library) or ""


def make_plan() -> Plan:
    """Decide from the tool chain what is built, never from a visible GPU."""
    want_cpp, want_cuda = switch("MEMKERN_BUILD_CPP"), switch("MEMKERN_BUILD_CUDA")

    def pure(reason: str) -> Plan:
        forced = [f"MEMKERN_BUILD_{n}=1" for n, on in (("CPP", want_cpp), ("CUDA", want_cuda)) if on]
        if forced:
            raise SystemExit(f"memkern: {' and '.join(forced)}, but {reason}")
        return Plan(reason=reason)

    if want_cpp is False and not want_cuda:
        return Plan(reason="MEMKERN_BUILD_CPP=0")
    torch = torch_root()
    if torch is None:
        return pure("there is no torch in this environment (install torch first to get the compiled operators)")
    info = runpy.run_path(str(torch / "version.py"))
    version, torch_cuda = str(info["__version__"]), info.get("cuda")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
        return pure(f"torch {version} is older than {'.'.join(map(str, OLDEST_TORCH))}")
    compiler = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++")))), None)
    if compiler is None:
        return pure("there is no C++ compiler ($CXX, c++ or g++)")

    libraries, notes = [], []
    defines = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CXX_COMPILER": compiler,
        "CMAKE_CXX_FLAGS": os.environ.get("CXXFLAGS", ""),
        "MEMKERN_VERSION": memkern_version(),
        "MEMKERN_GIT": git_state(),
        "MEMKERN_TORCH_ROOT": str(torch),
        "MEMKERN_TORCH_VERSION": version,
        "MEMKERN_INTERFACE_CPU": interface("cpu"),
        "MEMKERN_INTERFACE_CUDA": interface("cuda"),
        "MEMKERN_CUDA_ARCH_LIST": "",
        "MEMKERN_PYTHON_INCLUDE": "",
        "MEMKERN_PYBIND11_INCLUDE": "",
        "MEMKERN_MODULE_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX") or ".so",
    }
    sources = ROOT / "csrc"
    if want_cpp is not False:
        include, pybind11 = sysconfig.get_paths()["include"], importlib.util.find_spec("pybind11")
        if not (Path(include) / "Python.h").is_file():
            notes.append(f"memkern._C is left out: {include}/Python.h is missing (Debian: apt-get install python3-dev)")
        elif pybind11 is None or not pybind11.origin:
            notes.append("memkern._C is left out: pybind11 is missing (pip install pybind11)")
        else:
            libraries.append("_C")
            defines["MEMKERN_PYTHON_INCLUDE"] = include
            defines["MEMKERN_PYBIND11_INCLUDE"] = str(Path(pybind11.origin).parent / "include")
        if any(sources.glob("bind_cpu/*.cpp")):
            libraries.append("_ops_cpu")
    if want_cuda or (want_cuda is None and torch_cuda and want_cpp is not False):
        nvcc = find_nvcc()
        if nvcc is None:
            if want_cuda:
                raise SystemExit("memkern: MEMKERN_BUILD_CUDA=1, but nvcc is neither in $CUDA_HOME nor on PATH")
            notes.append("the CUDA operators are left out: nvcc is neither in $CUDA_HOME nor on PATH")
        elif torch_cuda and nvcc_version(nvcc)[0] != int(str(torch_cuda).split(".")[0]):
            clash = f"{nvcc} is CUDA {'.'.join(map(str, nvcc_version(nvcc)))} and torch {version} has CUDA {torch_cuda}"
            if want_cuda:
                raise SystemExit(f"memkern: MEMKERN_BUILD_CUDA=1, but {clash}")
            notes.append(f"the CUDA operators are left out: {clash}")
        elif any(sources.glob("bind_cuda/*.cpp")):
            libraries.append("_ops_cuda")
            listed, targets = cuda_architectures(nvcc_version(nvcc))
            defines |= {
                "CMAKE_CUDA_COMPILER": nvcc,
                "CMAKE_CUDA_HOST_COMPILER": compiler,
                "CMAKE_CUDA_ARCHITECTURES": targets,
                "MEMKERN_CUDA_ARCH_LIST": listed,
            }
    if not libraries:
        return Plan(reason="; ".join(notes) or "there is nothing to compile", notes=tuple(notes))
    cmake, ninja = tool("cmake"), tool("ninja")
    if cmake is None or ninja is None:
        raise SystemExit(
            "memkern: a C++ compiler is here but cmake or ninja is not: pip install cmake ninja "
            "(or MEMKERN_BUILD_CPP=0 for a pure-Python install)"
        )
    defines |= {"CMAKE_MAKE_PROGRAM": ninja, "MEMKERN_LIBRARIES": ";".join(libraries)}
    return Plan(tuple(libraries), notes=tuple(notes), defines=tuple(defines.items()), cmake=cmake)


def file_name(library: str) -> str:
    """The operator libraries have no Python ABI and so no tag in their names; ``_C`` has both."""
    return library + (sysconfig.get_config_var("EXT_SUFFIX") if library == "_C" else ".so")


class Build(build_ext):
    """Runs CMake with Ninja, then copies what it made to the build folder or, in place, beside the Python files."""

    def run(self) -> None:
        for note in PLAN.notes:
            print(f"memkern: {note}")
        if not PLAN.libraries:
            print(f"memkern: pure-Python install ({PLAN.reason})")
        built = self._compile() if PLAN.libraries else None
        package = ROOT / "memkern" if self.inplace else Path(self.build_lib) / "memkern"
        for name in map(file_name, ("_C", "_ops_cpu", "_ops_cuda")):
            source, target = (built / name if built else None), package / name
            if source is None or not source.exists():
                target.unlink(missing_ok=True)  # a library that this plan does not build would be a stale one
            elif not target.exists() or not filecmp.cmp(source, target, shallow=False):
                target.parent.mkdir(parents=True, exist_ok=True)
                fresh = target.with_name(f".{target.name}.{os.getpid()}")
                shutil.copy2(source, fresh)
                fresh.replace(target)  # a process that has the old one mapped keeps it

    def _compile(self) -> Path:
        """Build everything of the plan and return the folder that holds it."""
        # One folder per tool chain: CMake cannot change a compiler in place.
        keys = ("CMAKE_CXX_COMPILER", "CMAKE_CUDA_COMPILER", "MEMKERN_TORCH_ROOT", "MEMKERN_MODULE_SUFFIX")
        chain = sha256("\n".join(dict(PLAN.defines).get(key, "") for key in keys).encode()).hexdigest()[:8]
        folder = ROOT / "build" / f"cmake-{chain}"
        shutil.rmtree(folder / "out", ignore_errors=True)
        quiet = self.verbose < 1
        defines = [f"-D{key}={value}" for key, value in PLAN.defines]
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)) if sys.platform == "linux" else 2)
        steps = [
            [PLAN.cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *defines],
            [PLAN.cmake, "--build", str(folder), "--parallel", jobs] + (["--", "--quiet"] if quiet else []),
            [PLAN.cmake, "--install", str(folder), "--prefix", str(folder / "out")],
        ]
        for step in steps:
            if not quiet:
                print(" ".join(step), flush=True)
            chatty = "--build" not in step  # configuring and installing; errors come on stderr
            if subprocess.run(step, stdout=subprocess.DEVNULL if quiet and chatty else None).returncode:
                raise SystemExit(
                    f"memkern: the native build failed at: {' '.join(step[:4])} ... "
                    "(MEMKERN_BUILD_CPP=0 installs without compiled operators)"
                )
        if self.inplace:
            shutil.copyfile(folder / "compile_commands.json", ROOT / "compile_commands.json")  # for editors
        return folder / "out"

    def get_ext_filename(self, fullname: str) -> str:
        package, _, library = fullname.rpartition(".")
        return os.path.join(*package.split("."), file_name(library))

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in grafts csrc, whatever this machine would build of it


PLAN = make_plan()
setup(
    ext_modules=[Extension(f"memkern.{name}", sources=[]) for name in PLAN.libraries],
    cmdclass={"build_ext": Build},
)
