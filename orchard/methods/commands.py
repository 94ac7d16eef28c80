"""A command that runs in a VM: the frames of exec's WebSocket."""

from __future__ import annotations

import base64
import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

from trio_websocket import ConnectionClosed, WebSocketConnection

from orchard.codec import ValidationError
from orchard.methods.common import JSON, parse_message
from orchard.net.transport import ClientError, ConnectError, excerpt
from orchard.net.websocket import describe_disconnect

# A command's input is sent in messages of this size.
_STDIN_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class CommandResult:
    """The result of a command: its exit code, and its output as bytes. `output` is both streams in the order of arrival."""

    exit_code: int
    output: str = field(repr=False)
    stdout: str = field(repr=False)
    stderr: str = field(repr=False)


class RunningCommand:
    """A command that runs in a VM: an asynchronous iterator over its output, as ("stdout" or "stderr", bytes).

    After the end of the iteration `exit_code` is set. The iterator raises ClientError if the command could not be run,
    and ConnectError if the connection was lost.
    """

    def __init__(self, websocket: WebSocketConnection) -> None:
        self._websocket = websocket
        self.exit_code: int | None = None

    async def send(self, data: bytes) -> None:
        """Send bytes to the stdin of an `interactive` command. Bytes sent after the command's end are dropped."""
        for start in range(0, len(data), _STDIN_BYTES):
            await self._send_frame(
                {"type": "stdin", "data": base64.b64encode(data[start : start + _STDIN_BYTES]).decode()}
            )

    async def send_eof(self) -> None:
        """Close the command's stdin."""
        await self._send_frame({"type": "stdin", "data": ""})

    async def resize(self, rows: int, cols: int) -> None:
        """Set the size of the command's terminal."""
        await self._send_frame({"type": "resize", "terminal": {"rows": rows, "cols": cols}})

    async def _send_frame(self, frame: JSON) -> None:
        # The iterator reports why the connection has ended.
        with suppress(ConnectionClosed):
            await self._websocket.send_message(json.dumps(frame))

    async def wait_result(self, most: int) -> CommandResult:
        """Return the result of the command when it has ended. Raises ClientError if it writes more than `most` bytes."""
        written: list[tuple[str, bytes]] = []
        size = 0
        async for stream, data in self:
            written.append((stream, data))
            size += len(data)
            if size > most:
                raise ClientError(
                    f"the command has written more than {most} bytes; read its output as it comes, by exec"
                )
        assert self.exit_code is not None
        texts = [
            b"".join(data for stream, data in written if stream in streams).decode("utf-8", "replace")
            for streams in (("stdout", "stderr"), ("stdout",), ("stderr",))
        ]
        return CommandResult(self.exit_code, *texts)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[str, bytes]:
        try:
            message = await self._websocket.get_message()
        except ConnectionClosed as closed:
            raise ConnectError(f"the command was cut off: {describe_disconnect(closed)}") from None
        # ValueError is raised for invalid base64.
        with suppress(ValidationError, ValueError):
            match parse_message(message):
                case {"type": "stdout" | "stderr" as kind, "data": str(data)}:
                    return kind, base64.b64decode(data)
                case {"type": "exit", "exit": {"code": int(code)}}:
                    self.exit_code = code
                    raise StopAsyncIteration
                case {"type": "error", "error": str(error)}:
                    raise ClientError(error)
        raise ClientError(f"the controller sent {excerpt(message)} of a command, expected output, an exit or an error")
