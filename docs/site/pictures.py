# SPDX-License-Identifier: Apache-2.0
"""Draws the documentation's diagrams as SVG files that follow the reader's light or dark mode.

python docs/site/pictures.py
"""

from __future__ import annotations

from html import escape
from pathlib import Path

import numpy as np

from lightllm_backend.router.admission import Forecast

IMAGES = Path(__file__).parents[1] / "images"
STYLE = """
svg{--paper:#ffffff;--ink:#1f2933;--faint:#6b7785;--box:#eef2f6;--free:#f4f6f8;--alarm:#b3261e;
--a:#4878a8;--b:#8fb3d5;--c:#cddfee;--d:#e08a3c;--on-a:#ffffff;--on-b:#10202f;--on-c:#10202f;--on-d:#10202f}
@media(prefers-color-scheme:dark){svg{--paper:#1e2129;--ink:#e3e7ec;--faint:#9aa5b1;--box:#2b303b;--free:#262a33;
--alarm:#ff8a80;--a:#5b93c7;--b:#41688e;--c:#2f4457;--d:#c9752a;--on-a:#0d1620;--on-b:#ffffff;--on-c:#ffffff;
--on-d:#10202f}}
text{fill:var(--ink);font:12px sans-serif}
.small{font-size:11px}.bold{font-weight:bold}.faint{fill:var(--faint)}.alarm{fill:var(--alarm)}
.middle{text-anchor:middle}.end{text-anchor:end}
.total{paint-order:stroke;stroke:var(--paper);stroke-width:4px}
.paper{fill:var(--paper)}.box{fill:var(--box);stroke:var(--faint)}.group{fill:none;stroke:var(--faint)}
.free{fill:var(--free);stroke:var(--faint);stroke-dasharray:2 2}
.a{fill:var(--a)}.b{fill:var(--b)}.c{fill:var(--c)}.d{fill:var(--d)}
.slot{stroke:var(--paper)}
.on-a{fill:var(--on-a)}.on-b{fill:var(--on-b)}.on-c{fill:var(--on-c)}.on-d{fill:var(--on-d)}
.line{stroke:var(--faint);fill:none}.dashed{stroke-dasharray:5 4}.limit{stroke:var(--alarm);stroke-dasharray:5 4}
"""
ARROW = (
    '<marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
    'orient="auto-start-reverse">'
    '<path d="M0 0L8 4L0 8z" fill="#8492a0"/></marker>'
)
# The three sequences of the Router's example and the one that waits: slots held, and steps left.
RUNNING = {"A": (2, 6), "B": (4, 3), "C": (2, 1)}
WAITING = {"D": (1, 4)}
CAPACITY = 13


class Picture:
    """An SVG file: a title for those who cannot see it, and shapes in the order in which they are drawn."""

    def __init__(self, title: str, width: int, height: int) -> None:
        self._size = f'width="{width}" height="{height}"'
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {self._size} viewBox="0 0 {width} {height}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE.strip()}</style>",
            f"<defs>{ARROW}</defs>",
        ]
        self.rectangle(0, 0, width, height, "paper")

    def rectangle(self, x: float, y: float, width: float, height: float, kind: str, radius: int = 0) -> None:
        rounded = f' rx="{radius}"' if radius else ""
        self._parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"{rounded}/>')

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        self._parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(text)}</text>')

    def box(self, x: float, y: float, width: float, height: float, *lines: str) -> None:
        """A rounded box with its name and what it does."""
        self.rectangle(x, y, width, height, "box", radius=6)
        top = y + height / 2 + 4 - 8 * (len(lines) - 1)
        for number, line in enumerate(lines):
            self.text(x + width / 2, top + 16 * number, line, "middle " + ("small faint" if number else "bold"))

    def block(self, x: float, y: float, width: float, height: float, kind: str, label: str) -> None:
        """A filled rectangle in the colour of a sequence or a step, with a label inside."""
        self.rectangle(x, y, width, height, f"{kind} slot")
        self.text(x + width / 2, y + height / 2 + 4, label, f"small middle on-{kind}")

    def arrow(self, *points: tuple[float, float], both: bool = False, dashed: bool = False) -> None:
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
        start = ' marker-start="url(#arrow)"' if both else ""
        kind = "line dashed" if dashed else "line"
        self._parts.append(f'<path class="{kind}" d="{path}" marker-end="url(#arrow)"{start}/>')

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str = "line") -> None:
        self._parts.append(f'<line class="{kind}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"/>')

    def svg(self) -> str:
        return "\n".join([*self._parts, "</svg>\n"])


def request_path() -> Picture:
    """The processes that a request passes."""
    picture = Picture("The path of a request through tritonserver's models and the worker process", 860, 400)
    picture.rectangle(130, 20, 710, 220, "group", radius=8)
    picture.text(144, 40, "tritonserver", "bold")
    picture.rectangle(150, 54, 670, 94, "group", radius=8)
    picture.text(164, 72, "ensemble lightllm", "faint")
    picture.box(14, 84, 90, 54, "client", "gRPC or HTTP")
    picture.box(180, 84, 160, 54, "tokenizer", "text → token ids")
    picture.box(410, 84, 160, 54, "generation", "submits, streams out")
    picture.box(640, 84, 160, 54, "detokenizer", "token ids → text")
    picture.box(180, 176, 160, 50, "lightllm_unary", "one response a request")
    picture.arrow((104, 106), (180, 106))
    picture.arrow((340, 106), (410, 106))
    picture.arrow((570, 104), (640, 104))
    picture.text(605, 98, "chunks", "small faint middle")
    picture.arrow((640, 124), (570, 124), dashed=True)
    picture.text(605, 138, "delivered", "small faint middle")
    picture.arrow((720, 138), (720, 162), (60, 162), (60, 138))
    picture.text(600, 176, "text, as it is made", "small faint middle")
    picture.arrow((76, 138), (76, 200), (180, 200), both=True)
    picture.rectangle(130, 274, 560, 110, "group", radius=8)
    picture.text(144, 292, "worker process of rank 0: holds a GPU", "bold")
    picture.box(180, 304, 160, 62, "Router", "admits and schedules")
    picture.box(410, 304, 130, 62, "ModelRunner", "kernels, sampler")
    picture.box(580, 304, 96, 62, "KV pool", "token slots")
    picture.arrow((340, 324), (410, 324))
    picture.text(375, 318, "batch", "small faint middle")
    picture.arrow((410, 348), (340, 348))
    picture.text(375, 362, "tokens", "small faint middle")
    picture.arrow((540, 335), (580, 335), both=True)
    picture.box(720, 304, 120, 62, "ranks 1, 2, …", "one GPU each")
    picture.arrow((475, 366), (475, 376), (780, 376), (780, 366))
    picture.arrow((490, 138), (490, 250), (290, 250), (290, 304), both=True)
    picture.text(498, 200, "a message a step", "small faint")
    picture.arrow((230, 226), (230, 304), both=True)
    return picture


def token_slots() -> Picture:
    """The same three sequences in a cache of reserved rows and in a pool of token slots."""
    lengths = {"A": 5, "B": 3, "C": 6}
    longest, size = 12, 22
    picture = Picture("Reserved rows waste slots; a pool of token slots holds as many as there are tokens", 720, 330)
    picture.text(20, 26, f"A row for each request, as long as it may become ({longest} tokens)", "bold")
    for row, (name, length) in enumerate(lengths.items()):
        for column in range(longest):
            x, y = 20 + column * size, 40 + row * 26
            if column < length:
                picture.block(x, y, size, size, name.lower(), name)
            else:
                picture.rectangle(x, y, size, size, "free")
    slots, held = longest * len(lengths), sum(lengths.values())
    picture.text(310, 60, f"{slots} slots are taken, {held} of them hold a token.", "faint")
    picture.text(310, 78, "A fourth request finds no room.", "faint")
    picture.text(20, 152, "One pool of token slots", "bold")
    pool: list[str] = list("AABACBACC.CCAC.B" + "." * 20)
    for number, name in enumerate(pool):
        x, y = 20 + number % 18 * size, 166 + number // 18 * 26
        if name == ".":
            picture.rectangle(x, y, size, size, "free")
        else:
            picture.block(x, y, size, size, name.lower(), name)
    assert {name: pool.count(name) for name in lengths} == lengths
    assert len(pool) == slots
    picture.text(430, 186, f"{held} slots are taken, one for each token;", "faint")
    picture.text(430, 204, f"{slots - held} are free for any sequence.", "faint")
    picture.text(20, 250, "The table of slots, on the GPU: which slot has which position of a sequence", "bold")
    for row, name in enumerate(lengths):
        places = [str(number) for number, holder in enumerate(pool) if holder == name]
        picture.block(20, 262 + row * 20, size, 18, name.lower(), name)
        picture.text(52, 275 + row * 20, "  ".join(f"{place:>2}" for place in places), "small")
    return picture


def demand(sequences: dict[str, tuple[int, int]]) -> list[dict[str, int]]:
    """What each sequence holds, now and in each step from now on."""
    steps = max(left for _, left in sequences.values())
    return [
        {name: held + step for name, (held, left) in sequences.items() if step <= left} for step in range(steps + 1)
    ]


def admission() -> Picture:
    """The slots that sequences hold over the next steps, as the Router forecasts them."""
    unit, bar, base = 13, 34, 258
    picture = Picture("Token slots held over the next steps, without and with sequence D", 760, 300)
    running, [waiting] = np.array(list(RUNNING.values())), WAITING.values()
    forecast = Forecast(running[:, 0], running[:, 1])
    titles = (
        f"A, B and C run: the peak is {forecast.peak} of {CAPACITY} slots",
        f"with D, which waits: the peak would be {forecast.peak_with(*waiting)}",
    )
    for left, sequences, title in zip((52, 414), (RUNNING, RUNNING | WAITING), titles, strict=True):
        columns = demand(sequences)
        picture.text(left - 28, 26, title, "bold")
        picture.line(left, base - CAPACITY * unit, left + 316, base - CAPACITY * unit, "limit")
        for step, column in enumerate(columns):
            x, y = left + step * 44, float(base)
            for name in sorted(column, key=lambda name: -sequences[name][1]):
                height = column[name] * unit
                y -= height
                picture.block(x, y, bar, height, name.lower(), f"{name} {column[name]}")
            total = sum(column.values())
            picture.text(x + bar / 2, y - 5, str(total), "middle bold total" + (" alarm" if total > CAPACITY else ""))
            picture.text(x + bar / 2, base + 16, str(step), "middle")
        picture.line(left, base, left + 316, base)
        picture.text(left - 6, base - CAPACITY * unit + 4, str(CAPACITY), "end alarm")
        picture.text(left + 160, 292, "steps from now", "middle faint")
    return picture


def overlapped_steps() -> Picture:
    """Two time lines: a GPU that waits for the host between its steps, and one that does not."""
    picture = Picture("Steps on the GPU one after the other, without and with overlap", 780, 320)

    def lanes(top: int, title: str) -> None:
        picture.text(20, top, title, "bold")
        for row, name in enumerate(("host", "GPU")):
            picture.text(20, top + 34 + row * 44, name)
            picture.line(60, top + 46 + row * 44, 760, top + 46 + row * 44)

    step, plan, apply = 130, 50, 46
    lanes(26, "Without overlap, the GPU waits while the host plans")
    x = 64
    for number in range(3):
        picture.block(x, 44, plan, 24, "c", f"plan {number}")
        picture.block(x + plan, 88, step, 24, "a", f"step {number}")
        picture.block(x + plan + step, 44, apply, 24, "d", f"apply {number}")
        x += plan + step + apply
    lanes(176, "With overlap, step 1 is launched before the tokens of step 0 are known")
    picture.block(64, 194, plan, 24, "c", "plan 0")
    first = 64 + plan
    for number in range(5):
        start = first + number * step
        picture.block(start, 238, step, 24, "a", f"step {number}")
        if number:
            picture.block(start, 194, apply, 24, "d", f"apply {number - 1}")
        if number < 4:
            picture.block(start + step - plan - 6, 194, plan, 24, "c", f"plan {number + 1}")
    picture.text(64, 290, "Step 0 writes its tokens into a table on the GPU, where step 1 reads them.", "faint")
    picture.text(
        64, 308, "The host applies them a step later: it streams them out and sees which sequences ended.", "faint"
    )
    return picture


def replicas() -> Picture:
    """The proxy chooses a replica for each request."""
    picture = Picture(
        "HAProxy in front of replicas: a prefix key chooses by consistent hash, else least requests", 800, 250
    )
    picture.box(14, 96, 120, 54, "clients", "with retries")
    picture.rectangle(190, 14, 360, 222, "group", radius=8)
    picture.text(204, 34, "HAProxy", "bold")
    picture.box(206, 96, 110, 54, "prefix key?")
    picture.box(370, 46, 166, 54, "consistent hash", "at most 1.25 × the average")
    picture.box(370, 146, 166, 54, "least requests")
    picture.arrow((134, 123), (206, 123))
    picture.arrow((261, 96), (261, 73), (370, 73))
    picture.text(315, 67, "yes", "small faint middle")
    picture.arrow((261, 150), (261, 173), (370, 173))
    picture.text(315, 167, "no", "small faint middle")
    for number, name in enumerate(("replica 1", "replica 2", "replica …")):
        y = 46 + number * 54
        picture.box(650, y, 130, 40, name)
        picture.arrow((536, 73), (650, y + 16))
        picture.arrow((536, 173), (650, y + 24))
    picture.text(204, 222, "asks the model health of each replica every second", "small faint")
    return picture


PICTURES = {
    "replicas.svg": replicas,
    "request_path.svg": request_path,
    "token_slots.svg": token_slots,
    "admission.svg": admission,
    "overlapped_steps.svg": overlapped_steps,
}


if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (IMAGES / name).write_text(draw().svg(), encoding="utf-8")
