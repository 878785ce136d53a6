# SPDX-License-Identifier: Apache-2.0
"""What the body of an HTTP request costs Triton server in memory while it reads it: `python -m perf.body_memory`.

Each body is a prompt that is far too long, so the engine never sees it; the engine tells the time alone.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click
import psutil

from lightllm_backend.launch.health import http_call
from perf.record import RESULTS, circumstances, write_result
from perf.replicas.fleet import Replica, sleeping_settings
from perf.serving.systems import free_ports

MEBIBYTE = 1 << 20


def peak_and_resident(process: psutil.Process) -> tuple[int, int]:
    """The most memory that the process has had since `forget_peak`, and what it has now, in bytes."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    sizes = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    return int(sizes["VmHWM"][0]) * 1024, int(sizes["VmRSS"][0]) * 1024


def forget_peak(process: psutil.Process) -> None:
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")


@click.command(help=str(__doc__).partition("\n\n")[0])
@click.option("--mebibytes", default=(1, 16, 64), show_default=True, multiple=True, help="size of a body")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "body_memory.json", show_default=True)
def main(mebibytes: tuple[int, ...], out: Path) -> None:
    rows = []
    names = ("http_port", "grpc_port", "metrics_port")
    with tempfile.TemporaryDirectory() as name:
        replica = Replica(
            1, dict(zip(names, free_ports(3), strict=True)), sleeping_settings(Path(name)), Path(name) / "log"
        )
        replica.start()
        try:
            replica.wait_ready()
            [server] = [process for process in replica.processes() if process.name() == "tritonserver"]
            for size in mebibytes:
                forget_peak(server)
                _, before = peak_and_resident(server)
                body = json.dumps({"text_input": "x" * (size * MEBIBYTE)})
                status, _ = http_call(replica.http_address, "POST", "/v2/models/lightllm/generate", body, 120)
                peak, _ = peak_and_resident(server)
                rows.append({"mebibytes": size, "status": status, "peak_mebibytes": (peak - before) / MEBIBYTE})
                click.echo(f"a body of {size} MiB: {rows[-1]['peak_mebibytes']:.0f} MiB, status {status}")
        finally:
            replica.stop()
    write_result(out, {"benchmark": "body_memory", **circumstances(None), "rows": rows})


if __name__ == "__main__":
    main()
