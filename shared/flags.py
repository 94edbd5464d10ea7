"""What the flags of a configuration are: its fields, in groups, as `--help` and docs/flags.md show them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import docstring_parser


@dataclass(frozen=True, kw_only=True)
class Group:
    """Flags that belong together; a field is in the group that its annotation names: `Annotated[int, LIMITS]`."""

    name: str
    says: str
    """One sentence on what they are about."""


MODEL = Group(name="model", says="What is served; all workers of a model are told the same.")
NETWORK = Group(name="network", says="What a process is called, where it listens, and how others are found.")
HTTP = Group(name="http", says="OpenAI's chat API over HTTP.")
COMPUTE = Group(name="compute", says="On what the work is done, and in what portions.")
MEMORY = Group(name="memory", says="What takes memory, and how much of it at most.")
COMPRESSION = Group(name="compression", says="How much KV is kept, where a request does not say so itself.")
LIMITS = Group(name="limit", says="What a request may ask for and how many are taken; more waits or is refused.")
PLACEMENT = Group(name="placement", says="Which workers a request gets.")
FAILURES = Group(name="failure", says="How long something may take, and what happens when it is lost.")
SECURITY = Group(name="security", says="Who may connect, and who may read along.")
TELEMETRY = Group(name="telemetry", says="Logs, traces, and what is measured on the side.")
GROUPS = (
    MODEL,
    NETWORK,
    HTTP,
    COMPUTE,
    MEMORY,
    COMPRESSION,
    LIMITS,
    PLACEMENT,
    FAILURES,
    SECURITY,
    TELEMETRY,
)


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One field of a configuration."""

    field: str
    hint: Any
    """Its type."""
    default: Any
    """`dataclasses.MISSING` where it must be given."""
    group: Group | None
    help: str

    @property
    def name(self) -> str:
        """As it is written on a command line."""
        return "--" + self.field.replace("_", "-")

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is MISSING


def flags_of(config: type[Any]) -> list[Flag]:
    """The flags of a configuration, a dataclass, in the order of its fields."""
    hints, helps = get_type_hints(config, include_extras=True), _helps(config)
    return [_flag(field, hints[field.name], helps.get(field.name, "")) for field in dataclasses.fields(config)]


def grouped(flags: Sequence[Flag]) -> list[tuple[Group | None, list[Flag]]]:
    """The same by group: those of none first, then the groups in their order that have any."""
    parts = [(group, [flag for flag in flags if flag.group == group]) for group in (None, *GROUPS)]
    return [(group, members) for group, members in parts if members]


def _flag(field: dataclasses.Field[Any], hint: Any, text: str) -> Flag:
    kind, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    default = field.default if field.default_factory is MISSING else field.default_factory()
    group = next((extra for extra in extras if isinstance(extra, Group)), None)
    return Flag(field=field.name, hint=kind, default=default, group=group, help=text)


def _helps(config: type[Any]) -> dict[str, str]:
    """What stands under each field, as one line; a subclass has the last word."""
    texts = {}
    for kind in reversed([each for each in config.__mro__ if dataclasses.is_dataclass(each)]):
        for described in docstring_parser.parse_from_object(kind).params:
            texts[described.arg_name] = " ".join((described.description or "").split())
    return texts
