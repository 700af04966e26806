"""A room of the service in this process: its functions called as the service calls them."""

from medvl.serve.interface import Refused
from medvl.serve.worker import Result


def open_room(opener, folder):
    """A function (name, arguments) -> what the service gets: the result, or the events before it with `events=True`."""
    told = []
    room = opener(None, lambda call, event: told.append(event), str(folder))

    def ask(name, events=False, **arguments):
        told.clear()
        room.submit("1", (name, arguments))
        room.work(lambda: False)
        *pieces, last = told
        if isinstance(last, Refused):
            raise last
        assert isinstance(last, Result)
        return (pieces, last.value) if events else last.value

    return ask
