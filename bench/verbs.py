"""Measure how long verbs of the `orchard` command take, from their start to their end.

    ./run bench verbs [--rounds N] [--pyz FILE]

They ask a controller without TLS that has one VM. The comparison is a Python that does nothing, with the modules of its
start. The standard library alone, with argparse and http.client, sends the request of `list vms` and no more. `--pyz` measures an orchard.pyz (`./run pyz`) in place of this clone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from load import CONTROLLER, NO_AUTH, running
from measure import ROUNDS, Variant, compare
from start import cpu_of_children

from orchard.cli.connection import ControllerConnection
from orchard.cli.context import Context

# Verbs that need nothing, http.client, and trio with a WebSocket. The tunnel is refused, because the VM does not run.
VERBS = ("version --client", "list vms", "__tunnel --wait 1 vm 22")
LEAST = """\
import argparse, http.client, json
parser = argparse.ArgumentParser()
parser.add_argument("address")
connection = http.client.HTTPConnection(parser.parse_args().address)
connection.request("GET", "/v1/vms")
json.loads(connection.getresponse().read())
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="./run bench verbs")
    parser.add_argument("--rounds", type=int, default=3 * ROUNDS, help="default %(default)s")
    parser.add_argument("--pyz", metavar="FILE", type=Path)
    options = parser.parse_args()
    program = [str(options.pyz.absolute())] if options.pyz else ["-m", "orchard"]
    with tempfile.TemporaryDirectory() as home, running(*CONTROLLER, NO_AUTH, home=Path(home)) as server:
        url = f"http://127.0.0.1:{server.port}"
        with ControllerConnection(Context(url)) as controller:
            controller.call("POST", "/vms", body={"name": "vm", "image": "i"})
        env = {**os.environ, "ORCHARD_HOME": home, "ORCHARD_URL": url}

        def run(*words: str) -> None:
            subprocess.run([sys.executable, *words], env=env, capture_output=True, check=False)

        variants = [
            Variant(f"orchard {verb}", partial(run, *program, *verb.split()), 1, cpu_of_children) for verb in VERBS
        ]
        least = partial(run, "-c", LEAST, f"127.0.0.1:{server.port}")
        variants.append(Variant("argparse and http.client", least, 1, cpu_of_children))
        variants.append(Variant("python -c pass", partial(run, "-c", "pass"), 1, cpu_of_children))
        compare(*variants, count=options.rounds)


if __name__ == "__main__":
    main()
