# SPDX-License-Identifier: Apache-2.0
"""The picture of the dashboard in docs/monitoring.md: a server under load, and a Prometheus that scrapes it.

    python -m perf.dashboard_picture --seconds 240

Starts the launch command (the embedded model, unless --model_dir names another), Prometheus (Debian's package
prometheus) and clients, then asks Prometheus for what the panels of deploy/grafana/lightllm.json show and draws that
with matplotlib: Grafana itself is in no package registry that we use. Fails if a panel that should show something is
empty.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl

mpl.use("agg")
from matplotlib import dates
from matplotlib import pyplot as plt
from PIL import Image

from lightllm_client import AsyncLightLLMClient, LightLLMError
from perf.serving.systems import free_ports

ROOT = Path(__file__).parents[1]
DASHBOARD = ROOT / "deploy" / "grafana" / "lightllm.json"
PICTURE = ROOT / "docs" / "images" / "dashboard.png"
SCRAPE_SECONDS = 2
RATE_INTERVAL = "20s"
START_SECONDS = 900.0
# What need not happen in a run.
MAY_BE_EMPTY = ("Failed",)
# Small limits, so that requests queue on a CPU, too.
SETTINGS = {"running_max_req_size": 6, "max_queue_size": 12, "max_total_token_num": 1500}
CLIENTS = 12
PREAMBLE = "You are a helpful assistant. Answer briefly, and say so if you do not know. "
QUESTIONS = ("What is the capital of Japan?", "Tell me a story.", "List three fruits.", "Why is the sky blue?")
COLOURS = 64
COLUMN_INCHES, ROW_INCHES = 0.5, 0.27
SHOWN = 0.75  # of the time of load: then the clients become fewer


@click.command()
@click.option("--seconds", default=240.0, show_default=True, help="of load")
@click.option("--prometheus", default="prometheus", show_default=True, help="the program")
@click.option("--model_dir", default=None, help="the model (default: the embedded one)")
def main(seconds: float, prometheus: str, model_dir: str | None) -> None:
    program = shutil.which(prometheus)
    if program is None:
        raise click.UsageError(
            f"--prometheus is {prometheus!r}; allowed: a program, such as that of Debian's prometheus"
        )
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ports = stack.enter_context(server(model_dir, folder))
        address = stack.enter_context(scraping(program, f"127.0.0.1:{ports['metrics_port']}", folder))
        began = time.time()
        asyncio.run(load(f"127.0.0.1:{ports['grpc_port']}", seconds))
        ended = began + SHOWN * seconds
        shown = json.loads(DASHBOARD.read_text())["panels"]
        panels = [(panel, series(address, panel, began, ended)) for panel in shown]
    empty = [panel["title"] for panel, found in panels if not found]
    if unexpected := set(empty) - set(MAY_BE_EMPTY):
        raise click.ClickException(f"nothing to show: {', '.join(sorted(unexpected))}")
    draw(panels)


@contextlib.contextmanager
def server(model_dir: str | None, folder: Path) -> Iterator[dict[str, int]]:
    """Run the launch command; its ports by their settings."""
    names = ("http_port", "grpc_port", "metrics_port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    settings = {**SETTINGS, **ports, **({"model_dir": model_dir} if model_dir else {})}
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    log = folder / "server.log"
    with (
        log.open("wb") as output,
        running([sys.executable, "-m", "lightllm_backend.serve", *options], output) as process,
    ):
        wait_for(f"http://127.0.0.1:{ports['http_port']}/v2/health/ready", process, log)
        yield ports


@contextlib.contextmanager
def scraping(program: str, target: str, folder: Path) -> Iterator[str]:
    """Run a Prometheus that scrapes the target; its address."""
    [port] = free_ports(1)
    configuration = folder / "prometheus.yml"
    jobs = [{"job_name": "lightllm", "static_configs": [{"targets": [target]}]}]
    # JSON is YAML.
    configuration.write_text(json.dumps({"global": {"scrape_interval": f"{SCRAPE_SECONDS}s"}, "scrape_configs": jobs}))
    command = [
        program, f"--config.file={configuration}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    log = folder / "prometheus.log"
    with log.open("wb") as output, running(command, output) as process:
        wait_for(f"http://127.0.0.1:{port}/-/ready", process, log)
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def running(command: list[str], output: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError):
            get(url)
            return
        time.sleep(0.5)
    raise click.ClickException(f"{url} does not answer:\n{log.read_text(errors='replace')}")


def get(url: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=30) as response:
        body: bytes = response.read()
        return body


async def load(address: str, seconds: float) -> None:
    """Clients that ask one question after another, more of them in the middle than at the ends."""
    began = time.monotonic()

    async def ask(client: AsyncLightLLMClient, number: int) -> None:
        chance = random.Random(number)
        share = abs(2 * (number + 0.5) / CLIENTS - 1)  # of the time at either end that this client does not ask
        await asyncio.sleep(share * seconds / 2)
        while time.monotonic() - began < seconds * (1 - share / 2):
            options = {"max_tokens": chance.choice((8, 24, 60)), "ignore_eos": chance.random() < 0.7}
            stream = client.stream(PREAMBLE + chance.choice(QUESTIONS), **options)  # type: ignore[arg-type]
            with contextlib.suppress(LightLLMError):
                async with stream:
                    async for chunk in stream:
                        if chance.random() < 0.003 and chunk.finish_reason == "":
                            break  # the client hangs up
            if chance.random() < 0.05:
                with contextlib.suppress(LightLLMError):
                    await client.generate("x", max_tokens=10**6)  # more than there is room for
            await asyncio.sleep(chance.random())

    async with AsyncLightLLMClient(address) as client:
        await asyncio.gather(*(ask(client, number) for number in range(CLIENTS)))


def series(prometheus: str, panel: dict[str, Any], began: float, ended: float) -> list[tuple[str, list[Any]]]:
    """The names and points [(time, value)] of all curves of a panel; labels instead of points for a table."""
    found = []
    for target in panel["targets"]:
        expression = target["expr"].replace("$__rate_interval", RATE_INTERVAL).replace("$instance", ".*")
        query = {"query": expression, "start": began, "end": ended, "step": SCRAPE_SECONDS}
        url = f"{prometheus}/api/v1/query_range?{urllib.parse.urlencode(query)}"
        for result in json.loads(get(url))["data"]["result"]:
            points = [(at, value) for at, text in result["values"] if math.isfinite(value := float(text))]
            labels = result["metric"]
            name = target["legendFormat"]
            for label, value in labels.items():
                name = name.replace(f"{{{{{label}}}}}", value)
            if panel["type"] == "table":
                found.append(("", [f"{label}: {value}" for label, value in labels.items() if label != "__name__"]))
            elif points:
                found.append((name, points))
    return found


UNITS = {"percentunit": (100, " %"), "s": (1, " s"), "reqps": (1, " /s"), "none": (1, "")}


def draw(panels: list[tuple[dict[str, Any], list[tuple[str, list[Any]]]]]) -> None:
    """Draw each panel in its place of Grafana's grid, which is 24 columns wide, and save the picture."""
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel, _ in panels)
    with mpl.rc_context({"font.size": 7, "axes.spines.top": False, "axes.spines.right": False}):
        figure = plt.figure(figsize=(24 * COLUMN_INCHES, rows * ROW_INCHES))
        for panel, found in panels:
            x, y, w, h = (panel["gridPos"][key] for key in "xywh")
            # Room for labels at the left and below, and for the title above.
            left, bottom, right, top = x + 1.1, y + h - 1.0, x + w - 0.3, y + 1.2
            axes = figure.add_axes((left / 24, 1 - bottom / rows, (right - left) / 24, (bottom - top) / rows))
            axes.set_title(panel["title"], fontsize=8, loc="left", fontweight="bold", pad=5)
            if panel["type"] == "timeseries":
                _curves(axes, panel, found)
            else:
                axes.axis("off")
                _text(axes, panel, found)
        image = io.BytesIO()
        figure.savefig(image, dpi=110)
    picture = Image.open(image).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    PICTURE.parent.mkdir(exist_ok=True)
    picture.save(PICTURE, optimize=True)
    click.echo(f"{os.path.relpath(PICTURE)}: {PICTURE.stat().st_size >> 10} KiB")


def _curves(axes: Any, panel: dict[str, Any], found: list[tuple[str, list[Any]]]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    factor, unit = UNITS[defaults["unit"]]
    if defaults["custom"]["stacking"]["mode"] == "normal":
        times = sorted({at for _, points in found for at, _ in points})
        values = [[factor * dict(points).get(at, 0.0) for at in times] for _, points in found]
        axes.stackplot([_moment(at) for at in times], values, labels=[name for name, _ in found], alpha=0.7)
    else:
        for name, points in found:
            known = {round(at): factor * value for at, value in points}
            times = range(min(known), max(known) + 1, SCRAPE_SECONDS)
            values = [known.get(at, math.nan) for at in times]  # gaps stay gaps
            axes.plot([_moment(at) for at in times], values, label=name, linewidth=1, marker=".", markersize=1)
    axes.set_ylim(0, 1.25 * max(axes.get_ylim()[1], 0.01))  # room for the legend
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}{unit}")
    axes.xaxis.set_major_formatter(dates.DateFormatter("%H:%M"))
    axes.xaxis.set_major_locator(dates.AutoDateLocator(minticks=3, maxticks=6))
    axes.grid(alpha=0.2)
    axes.legend(fontsize=6, frameon=False, ncols=3, loc="upper left")


def _text(axes: Any, panel: dict[str, Any], found: list[tuple[str, list[Any]]]) -> None:
    if panel["type"] == "table":
        axes.text(0, 0.6, "\n".join("    ".join(labels) for _, labels in found), fontsize=7)
        return
    defaults = panel["fieldConfig"]["defaults"]
    factor, unit = UNITS[defaults["unit"]]
    words = {key: one["text"] for mapping in defaults.get("mappings", ()) for key, one in mapping["options"].items()}
    value = factor * found[0][1][-1][1] if found else None
    text = "no data" if value is None else words.get(f"{value:g}", f"{value:.3g}{unit}")
    axes.text(0.0, 0.1, text, fontsize=18, color="C2")


def _moment(at: float) -> Any:
    return dates.num2date(at / 86400)


if __name__ == "__main__":
    main()
