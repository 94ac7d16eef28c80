"""Feed arbitrary bytes to the parsers and the server: each input must lead to an answer, a refusal or a close.

    ./run bench fuzz [TARGET] [--seconds S] [--seed N] [--steered]

TARGET is `http` (bytes on a connection to the HTTP server, WebSocket frames among them), `frames` (WebSocket frames of
tunnels, which must give the same events however they are cut), `json` (bodies of requests), `lines` (files of the stored
state), or by default all of these in turn. The inputs are put together at random from typical fragments. With `--steered`
atheris chooses them by the code that they reach (`./run python -m pip install atheris`). The first input that fails is
printed, and the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "net"))

from orchard import schema
from orchard.codec import ValidationError, decode, parse_json
from orchard.resources import validation
from orchard.storage.errors import DamagedError
from orchard.store import read_state

MAX_FRAGMENTS = 12
# The longest input that atheris tries.
MAX_INPUT = 4096  # bytes


def http(data: bytes) -> None:
    """Send bytes to the server. The first byte chooses into how many pieces the rest is cut."""
    from test_server import send_anything

    parts = 1 + (data[:1] or b"\0")[0] % 8
    step = max(1, len(data) // parts)
    send_anything([data[start : start + step] for start in range(1, len(data), step)])


def frames(data: bytes) -> None:
    """Read frames. The first byte chooses whose they are, the second one the size of the pieces."""
    from test_wsframes import check_same_events_in_pieces

    sender, size = (data[:2] + b"\0\0")[:2]
    check_same_events_in_pieces(data[2:], range(0, len(data), 1 + size), masked=bool(sender & 1))


def json(data: bytes) -> None:
    """Parse a body, and decode what it contains as each resource."""
    with suppress(ValidationError):
        raw = parse_json(data)
        for read in (
            lambda: validation.vm_from_client(raw, []),
            lambda: validation.patched_spec(schema.VMSpec(image="i"), raw, []),
            lambda: validation.worker_from_client(raw, []),
            lambda: validation.account_from_client(raw, []),
            lambda: validation.replaced_settings(schema.ClusterSettings(), raw, []),
            lambda: validation.events_from_client(raw, []),
            lambda: validation.report_from_worker(raw, []),
            lambda: decode(schema.VMSpec, raw),
        ):
            with suppress(ValidationError):
                read()


def lines(data: bytes) -> None:
    """Load a file of the stored state."""
    with tempfile.TemporaryDirectory() as home:
        path = Path(home, "state.jsonl")
        path.write_bytes(data)
        with suppress(DamagedError):
            read_state(path)


def fragments_of(target: str) -> Sequence[bytes]:
    """Return the fragments that the inputs of a target are made of."""
    if target == "http":
        from test_server import FRAGMENTS

        return FRAGMENTS
    if target == "frames":
        from test_server import HELLO_FRAME, VIOLATIONS

        headers = [
            b"\x02\x00",
            b"\x02\x83key.",
            b"\x80\x84key.",
            b"\x00\x7e\x01\x00",
            b"\x82\xfe\x00\x80key.",
            b"\x01\x82key.",
        ]
        return [
            HELLO_FRAME,
            *headers,
            b"\x89\x02hi",
            b"\x8a\x82key.hi",
            b"\x88\x02\x03\xe8",
            "wörld".encode(),
            *(frame for _, frame in VIOLATIONS.values()),
        ]
    texts = ['{"name":"vm",', '"image":"i"', '"cpu":4', '"labels":{"a":"b"}', '"resources":{"x":1}', "}", "{", "[", "]"]
    texts += [":", ",", '"', "\\ud800", "1e999", "-0", "NaN", "null", "true", '"startup_script":{"env":{"A":"b"}}', " "]
    texts += [
        '{"sum":"0123456789abcdef",',
        '"format":"orchard-state"',
        '"version":1',
        '"revision":1',
        '"changes":[]',
        "\n",
    ]
    texts += [
        '"hostDirs":[{"name":"a","path":"/x"}]',
        '"roles":["compute:read"]',
        '"netSoftnet":true',
        '"kind":"log_line"',
    ]
    return [text.encode() for text in texts]


TARGETS: dict[str, Callable[[bytes], None]] = {"http": http, "frames": frames, "json": json, "lines": lines}


def fuzz(target: str, seconds: float, seed: int) -> bytes | None:
    """Try random inputs. Return the first that fails."""
    fragments = fragments_of(target)
    # The first input imports the tests that a target uses.
    TARGETS[target](b"")
    chance, until, tried = random.Random(seed), time.monotonic() + seconds, 0
    while time.monotonic() < until:
        count = chance.randrange(MAX_FRAGMENTS)
        data = b"".join(
            chance.choice(fragments) if chance.random() < 0.8 else chance.randbytes(chance.randrange(20))
            for _ in range(count)
        )
        tried += 1
        try:
            TARGETS[target](data)
        except Exception:  # noqa: BLE001 -- any exception is a finding
            traceback.print_exc()
            return data
    print(f"{target}: {tried:,} inputs, none failed; seed {seed}")
    return None


def fuzz_steered(target: str, seconds: float, seed: int) -> None:
    """Let atheris choose the inputs. It ends the process."""
    import atheris  # type: ignore[import-untyped]

    atheris.instrument_all()
    with tempfile.TemporaryDirectory() as corpus:
        for number, fragment in enumerate(fragments_of(target)):
            Path(corpus, str(number)).write_bytes(fragment)
        options = [f"-max_total_time={seconds:.0f}", f"-seed={seed}", f"-max_len={MAX_INPUT}", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *options, corpus], TARGETS[target])
        atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(prog="./run bench fuzz")
    parser.add_argument("target", nargs="?", choices=list(TARGETS))
    parser.add_argument("--seconds", type=float, default=60, help="for each target; default %(default)s")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31), help="default: a random one")
    parser.add_argument("--steered", action="store_true", help="have atheris choose the inputs; needs a TARGET")
    options = parser.parse_args()
    if options.steered:
        if options.target is None:
            parser.error("--steered needs a TARGET")
        fuzz_steered(options.target, options.seconds, options.seed)
    for target in [options.target] if options.target else TARGETS:
        failed = fuzz(target, options.seconds, options.seed)
        if failed is not None:
            print(f"{target} fails with {failed!r}; seed {options.seed}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
