"""`vlcache completion SHELL`: what a shell needs to complete commands, options and files of `vlcache`.

bash: eval "$(vlcache completion bash)" in ~/.bashrc; zsh: the same in ~/.zshrc;
fish: vlcache completion fish > ~/.config/fish/completions/vlcache.fish
"""

import argparse
import importlib
import os
from typing import Any

SHELLS = ("bash", "zsh", "fish")
# Set by the shell that wants to know how a line may go on.
ASKED_VARIABLE = "_ARGCOMPLETE"


def add_command(commands: Any) -> None:
    """Adds the command and its options to the parser."""
    parser = commands.add_parser(
        "completion",
        help="print what completes this command in a shell",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("shell", choices=SHELLS)


def run(args: argparse.Namespace) -> None:
    """Prints the script. Raises ValueError without argcomplete."""
    try:
        argcomplete = importlib.import_module("argcomplete")
    except ImportError as error:
        raise ValueError(f"completion needs argcomplete: pip install 'vlcache[cli]' ({error})") from error
    print(argcomplete.shellcode(["vlcache"], shell=args.shell))


def complete(parser: argparse.ArgumentParser) -> None:
    """Answers the shell and ends, where it is one that asks."""
    if ASKED_VARIABLE in os.environ:
        importlib.import_module("argcomplete").autocomplete(parser)
