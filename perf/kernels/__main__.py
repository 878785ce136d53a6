# SPDX-License-Identifier: Apache-2.0
"""Times the kernels at the sizes of real models, each beside the hardware's limit and PyTorch's own operation.

python -m perf.kernels
python -m perf.kernels linear token_attention
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from lightllm_backend.kernels import launchers
from perf.hardware_limits import hardware_limits
from perf.kernels.measure import Place, benchmark, measure
from perf.record import RESULTS, circumstances, write_result

DEVICE = torch.device("cuda")


def rows_of(name: str, place: Place, limits: dict[str, Any]) -> list[dict[str, Any]]:
    module, rows = benchmark(name), []
    for size in tqdm(module.SIZES, desc=name, unit="case"):
        rows.append(measure(name, module.case(place, *size), limits))
        torch.cuda.empty_cache()
    return rows


def table_of(name: str, rows: list[dict[str, Any]]) -> Table:
    table = Table("case", "µs", "GB/s", "TFLOP/s", "of the limit", "PyTorch, µs", title=name)
    for row in rows:
        if row.get("is_wrong"):
            table.add_row(row["case"], f"[red]differs from the reference by {row['difference']:.3g}[/]")
            continue
        others = ", ".join(f"{peer} {us:.1f}" for peer, us in row["torch_us"].items())
        gigabytes, tera = row["bytes_per_second"] / 1e9, row["operations_per_second"] / 1e12
        arithmetic = f"{tera:.0f}" if row["operations"] else "–"
        table.add_row(row["case"], f"{row['us']:.2f}", f"{gigabytes:,.0f}", arithmetic, f"{row['share']:.2f}", others)
    return table


@click.command(help=str(__doc__).partition("\n")[0])
@click.argument("names", nargs=-1, type=click.Choice(launchers.__all__))
@click.option(
    "--out", type=click.Path(path_type=Path), help="the JSON file (default: in perf/results, if all are timed)"
)
def main(names: tuple[str, ...], out: Path | None) -> None:
    limits = hardware_limits()
    if limits is None:
        raise click.ClickException("this needs a GPU; tests/perf runs the kernels without one")
    torch.manual_seed(0)
    place = Place(DEVICE, torch.bfloat16)
    console, rows = Console(width=140), []
    with torch.inference_mode():
        for name in names or launchers.__all__:
            rows += rows_of(name, place, limits)
            console.print(table_of(name, [row for row in rows if row["kernel"] == name]))
    result = {"benchmark": "kernels", **circumstances(limits["gpu"]), "limits": limits, "rows": rows}
    if out or not names:
        write_result(out or RESULTS / f"kernels_{limits['gpu']}.json".replace(" ", "_").lower(), result)
    wrong = [f"{row['kernel']} at {row['case']}" for row in rows if row.get("is_wrong")]
    if wrong:
        raise click.ClickException(f"different from the reference: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
