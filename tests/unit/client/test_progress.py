"""Progress bars: on a terminal, for nobody in a pipe, and with what they need."""

import io
import sys

import pytest
from rich.console import Console
from vlcache import Client, Request
from vlcache._progress_bar import progress_bar

from tests.unit.client.service import whole_answer


def test_a_bar_is_drawn_on_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with progress_bar("requests", 3, console) as advance:
        for _ in range(3):
            advance()
    assert "3/3" in console.file.getvalue()


def test_nothing_is_drawn_in_a_pipe(service, capsys):
    service.attempts = [whole_answer(), whole_answer()]
    with Client(service.address) as client:
        assert len(client.generate_many([Request("a"), Request("b")], progress=True)) == 2
    assert capsys.readouterr() == ("", "")


def test_without_rich_it_says_what_to_install(service, monkeypatch):
    monkeypatch.setitem(sys.modules, "vlcache._progress_bar", None)
    with Client(service.address) as client, pytest.raises(ValueError, match=r"pip install 'vlcache\[cli\]'"):
        client.generate_many([Request("a")], progress=True)
    assert service.requests == []
