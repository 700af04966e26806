"""Rooms and engines of the service in this process: called as the service calls them."""

from medvl.language.images import open_image
from medvl.serve.engine import BatchEngine, EngineConfig
from medvl.serve.interface import Piece, Refused, Request
from medvl.serve.worker import Result


def open_room(opener, folder):
    """A function (name, arguments) -> the result that the service gets."""
    told = []
    room = opener(None, lambda call, event: told.append(event), str(folder))

    def ask(name, **arguments):
        told.clear()
        room.submit("1", (name, arguments))
        room.work(lambda: False)
        (last,) = told
        if isinstance(last, Refused):
            raise last
        assert isinstance(last, Result)
        return last.value

    return ask


def answer_served(served, requests, rows=4):
    """{id: (text, adapters)} of requests that an engine answers together."""
    told = {}
    engine = BatchEngine(
        served, EngineConfig(rows=rows), lambda call, event: told.setdefault(call, []).append(event)
    )
    for request in requests:
        engine.submit(engine.prepare(request))
    while not engine.is_idle:
        engine.work(lambda: False)
    texts = {
        call: "".join(event.text for event in of if isinstance(event, Piece)) for call, of in told.items()
    }
    return {call: (text, told[call][-1].adapters) for call, text in texts.items()}


def ask(call, text, images=(), **settings):
    """A request of one turn."""
    content = "<image>\n" * len(images) + text
    pictures = tuple(open_image(image) for image in images)
    return Request(id=call, messages=({"role": "user", "content": content},), images=pictures, **settings)
