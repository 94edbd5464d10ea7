"""What a chat has said so far, and what its commands change."""

import dataclasses
from collections.abc import Callable, Mapping

from vlcache._messages import Image, Message
from vlcache._settings import Compression

HELP = """\
/image FILE       show an image with the next question; may be repeated
/retention SHARE  keep this share of the KV from now on, in (0, 1]
/clear            forget everything that was said
/help             this list
/quit             end, as ctrl-D does; ctrl-C stops an answer"""


class Conversation:
    """The turns so far, the images of the next one, and the settings of all that follow.

    A turn counts when it is answered: `asked` tells what to send, `answered` keeps both sides of it.
    """

    def __init__(self, compression: Compression) -> None:
        self.compression = compression
        self.is_over = False
        self._turns: list[Message] = []
        self._images: list[Image] = []
        self._commands: Mapping[str, Callable[[str], str]] = {
            "/image": self._show,
            "/retention": self._retain,
            "/clear": self._clear,
            "/help": lambda _: HELP,
            "/quit": self._quit,
        }

    def command(self, line: str) -> str:
        """Does what a line that begins with a slash says; returns what to tell.

        Raises ValueError for an unknown command or a bad value, OSError for an image that cannot be read.
        """
        name, _, value = line.partition(" ")
        command = self._commands.get(name)
        if command is None:
            raise ValueError(f"there is no {name}; /help lists what there is")
        return command(value.strip())

    def asked(self, question: str) -> list[Message]:
        """All turns, ending with this question and the images that were shown for it."""
        return [*self._turns, Message(role="user", parts=[*self._images, question])]

    def answered(self, asked: list[Message], answer: str) -> None:
        """Keeps the turn; one that was stopped keeps what had been said."""
        self._turns = [*asked, Message(role="assistant", parts=[answer])]
        self._images = []

    def _show(self, file: str) -> str:
        if not file:
            raise ValueError("/image needs a file")
        data = Image(file).read()
        self._images.append(Image(data))
        return f"{file} ({len(data)} bytes) goes with the next question"

    def _retain(self, share: str) -> str:
        self.compression = dataclasses.replace(self.compression, retention=float(share), max_kept_tokens=None)
        return f"retention {share} from now on"

    def _clear(self, _: str) -> str:
        self._turns, self._images = [], []
        return "forgotten"

    def _quit(self, _: str) -> str:
        self.is_over = True
        return ""
