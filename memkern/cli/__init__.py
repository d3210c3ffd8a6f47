"""The ``memkern`` command.

Every module or package beside this file whose name does not start with ``_`` is a command of that name and defines a
function ``command`` with typer's annotations; its docstring is the help. A module is imported when its command runs or
when the help lists it, so at the top it imports the standard library, typer and rich alone, and the rest inside the
function.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperGroup

# The order of the help; others follow by name.
_ORDER = ("info", "validate", "bench", "demo", "search", "train", "evaluate", "predict", "generate", "recall")


class CommandFolder(TyperGroup):
    """Finds the commands by their files and imports one when it is asked for.

    A subclass names the package; a module in it may define ``group``, a folder of its own, in place of ``command``.
    """

    package: ClassVar[str] = __name__

    def list_commands(self, ctx: Any) -> list[str]:
        paths = importlib.import_module(self.package).__path__
        modules = (module.name for module in pkgutil.iter_modules(paths) if not module.name.startswith("_"))
        found = {name.replace("_", "-") for name in modules}
        return [name for name in _ORDER if name in found] + sorted(found.difference(_ORDER))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"{self.package}.{cmd_name.replace('-', '_')}")
        if hasattr(module, "group"):
            folder = typer.main.get_command(module.group)
            folder.name = cmd_name
            return folder
        alone = typer.Typer(add_completion=False, rich_markup_mode="rich")
        alone.command(cmd_name)(module.command)
        return typer.main.get_command(alone)


main = typer.Typer(
    cls=CommandFolder,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        import memkern

        typer.echo(f"memkern {memkern.__version__}")
        raise typer.Exit


@main.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Fused operators for memory-augmented transformers: what is here, is it right, how fast is it."""
