"""The typer application: every verb, in the groups that ``kolotune --help`` shows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kolotune.foundation import installation
from kolotune.version import VERSION

from . import in_container
from .cancel import cancel
from .chat import chat
from .check import check
from .clean import clean
from .compare import compare
from .container import app as container
from .convert import convert
from .dequantize import dequantize
from .doctor import doctor
from .export import export
from .follow import follow
from .init import init
from .install import install
from .launch import launch
from .merge import merge
from .modelfile import modelfile
from .models import models
from .options import reporter
from .plan import plan
from .prepare import prepare
from .push import push
from .quantize import quantize
from .rebuild import rebuild
from .report import report
from .run import run
from .runs import runs
from .serve import serve
from .status import status
from .sweep import sweep
from .train import train
from .uninstall import uninstall
from .verify import verify
from .version import version

_HELP = "From a file of chats to a model that runs in Ollama. Begin with: kolotune run chats.jsonl"


@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Attributes:
        command: the function; its first docstring line is what ``--help`` shows.
        client: whether it works in the client alone, without PyTorch and llama.cpp.
    """

    command: Callable[..., int]
    client: bool = False

    @property
    def name(self) -> str:
        return self.command.__name__


GROUPS: dict[str, tuple[Verb, ...]] = {
    "Make a model": (
        Verb(init, client=True), Verb(check), Verb(plan), Verb(run), Verb(sweep), Verb(export),
    ),
    "Look at it": (
        Verb(status, client=True), Verb(runs, client=True), Verb(report), Verb(compare), Verb(verify, client=True),
        Verb(models, client=True), Verb(doctor, client=True),
    ),
    "Use it": (
        Verb(chat), Verb(install, client=True), Verb(uninstall, client=True), Verb(serve), Verb(push),
    ),
    "Other machines": (
        Verb(launch, client=True), Verb(follow, client=True), Verb(cancel, client=True),
    ),
    "Single stages": (
        Verb(prepare), Verb(train), Verb(merge), Verb(convert), Verb(quantize), Verb(modelfile),
    ),
    "The rest": (
        Verb(rebuild), Verb(dequantize), Verb(clean, client=True), Verb(version, client=True),
    ),
}  # fmt: skip
_CONTAINER_GROUP = "Other machines"


class _Groups(TyperGroup):
    """Shows the verbs in their groups, one line each."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # of typer's own copy of click, which is private
        for title, verbs in GROUPS.items():
            names = [verb.name for verb in verbs] + (["container"] if title == _CONTAINER_GROUP else [])
            rows = [(name, self.commands[name].get_short_help_str(limit=200)) for name in names]
            with formatter.section(title):
                formatter.write_dl(rows)


def _checked(verb: Verb) -> Callable[..., int]:
    """Return the verb's function; what it needs to have installed is checked before it does anything."""
    if verb.client:
        return verb.command

    @functools.wraps(verb.command)
    def command(*arguments: object, **options: object) -> int:
        installation.require_local(verb.name)
        return verb.command(*arguments, **options)

    return command


app = typer.Typer(
    name="kolotune",
    cls=_Groups,
    help=_HELP,
    epilog=in_container.HELP,
    no_args_is_help=True,
    rich_markup_mode=None,  # rich's help takes longer to load than everything else
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        reporter(False).result(f"kolotune {VERSION}")
        raise typer.Exit


@app.callback()
def _any_verb(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take the options that stand before a verb."""


for _verbs in GROUPS.values():
    for _verb in _verbs:
        app.command(_verb.name)(_checked(_verb))
app.add_typer(container, name="container")
