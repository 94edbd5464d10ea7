"""`vlcache chat`: a conversation, line by line from stdin; /help lists what one can do besides asking."""

import argparse
import contextlib
import importlib
import sys
from typing import Any

from vlcache._client import Client
from vlcache._completion import Completion
from vlcache._errors import Cancelled, VlcacheError
from vlcache._events import Delta
from vlcache._messages import Message
from vlcache._settings import Sampling, Timeout
from vlcache.cli.conversation import Conversation
from vlcache.cli.hints import describe
from vlcache.cli.interrupts import on_interrupt
from vlcache.cli.options import add_json, add_settings, client_of, compression_of, sampling_of
from vlcache.formatting import format_bytes, format_ms, format_share, to_json

PROMPT = "> "


def add_command(commands: Any) -> None:
    """Adds the command and its options to the parser."""
    parser = commands.add_parser("chat", help="hold a conversation about images", description=__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="shown with the first question")
    add_settings(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Answers until stdin ends or /quit. Raises ValueError for a bad option, OSError for an image that is not there.

    A turn that fails is told and forgotten at a terminal, and ends the command elsewhere.
    """
    conversation, sampling = Conversation(compression_of(args)), sampling_of(args)
    for file in args.image:
        conversation.command(f"/image {file}")
    with client_of(args, Timeout(total_s=args.timeout), tenant=args.tenant) as client:
        _Chat(client, conversation, sampling, args).run()


class _Chat:
    """Lines in, answers out."""

    def __init__(
        self, client: Client, conversation: Conversation, sampling: Sampling, args: argparse.Namespace
    ) -> None:
        self._client = client
        self._conversation = conversation
        self._sampling = sampling
        self._args = args
        self._is_watched = sys.stdin.isatty()

    def run(self) -> None:
        """Until the conversation is over."""
        if self._is_watched:
            with contextlib.suppress(ImportError):  # without it, which some Pythons are, lines are not edited
                importlib.import_module("readline")
            self._tell("/help lists what one can do besides asking, ctrl-D ends")
        while not self._conversation.is_over:
            try:
                self._take(self._read())
            except EOFError:
                break
            except KeyboardInterrupt:
                # at a terminal it only gives the line up
                if not self._is_watched:
                    raise
                self._tell("")

    def _read(self) -> str:
        """The next line. Raises EOFError when there is none."""
        try:
            return input(PROMPT if self._is_watched and sys.stdout.isatty() else "").strip()
        except EOFError:
            self._tell("")
            raise

    def _take(self, line: str) -> None:
        try:
            if line.startswith("/"):
                self._tell(self._conversation.command(line))
            elif line:
                self._ask(line)
        except (VlcacheError, ValueError, OSError) as error:
            if not self._is_watched:
                raise
            self._tell(describe(error, self._args))

    def _ask(self, question: str) -> None:
        asked = self._conversation.asked(question)
        said: list[str] = []
        completion = self._answer(asked, said)
        if said:
            self._conversation.answered(asked, "".join(said))
        if completion is None:
            self._tell("(stopped)")
        else:
            self._say(completion)

    def _answer(self, asked: list[Message], said: list[str]) -> Completion | None:
        """Streams one answer into `said`, and to stdout unless that is for a program; None where ctrl-C stopped it."""
        stream = self._client.stream(
            messages=asked,
            model=self._args.model,
            sampling=self._sampling,
            compression=self._conversation.compression,
            priority=self._args.priority,
        )
        with stream, on_interrupt(stream.close) as interrupted:
            try:
                for event in stream:
                    if isinstance(event, Delta) and event.text:
                        said.append(event.text)
                        self._print(event.text)
                return stream.result()
            except Cancelled:
                if not interrupted.happened:
                    raise
                return None
            finally:
                if said:
                    self._print("\n")

    def _print(self, text: str) -> None:
        if not self._args.json:
            print(text, end="", flush=True)

    def _say(self, completion: Completion) -> None:
        if self._args.json:
            print(to_json(completion), flush=True)
        else:
            self._tell(cost_line(completion))

    def _tell(self, text: str) -> None:
        """Everything but answers."""
        if text or self._is_watched:
            print(text, file=sys.stderr, flush=True)


def cost_line(completion: Completion) -> str:
    """The KV that an answer saved, and its first token."""
    kept, ttft = completion.compression, f"TTFT {format_ms(completion.timings.ttft_s)}"
    if kept is None:
        return f"[{ttft}]"
    saved = kept.full_bytes - kept.kept_bytes
    share = format_share(saved, kept.full_bytes)
    return f"[KV {format_bytes(kept.kept_bytes)} of {format_bytes(kept.full_bytes)} kept, {share} saved | {ttft}]"
