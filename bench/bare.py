"""A minimal HTTP server with trio and h11: the baseline for the costs of the controller.

    python bench/bare.py [FILE]

Every request is answered with the bytes of FILE, or with an empty body. The server prints its address. It accepts
requests with a body, and checks nothing, logs nothing and sets no deadlines.
"""

import sys
from functools import partial
from pathlib import Path

import h11
import trio


async def serve(body: bytes, stream: trio.SocketStream) -> None:
    connection = h11.Connection(h11.SERVER)
    headers = [("Content-Length", str(len(body))), ("Content-Type", "application/json")]
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(16384))
        elif type(event) is h11.EndOfMessage:
            answer = [h11.Response(status_code=200, headers=headers), h11.Data(data=body), h11.EndOfMessage()]
            await stream.send_all(b"".join([connection.send(part) or b"" for part in answer]))
            connection.start_next_cycle()
        elif type(event) is h11.ConnectionClosed:
            return


async def main(body: bytes) -> None:
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, partial(serve, body), 0)
        print(f"listening on 127.0.0.1:{listeners[0].socket.getsockname()[1]}", flush=True)


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]).read_bytes() if sys.argv[1:] else b"")
