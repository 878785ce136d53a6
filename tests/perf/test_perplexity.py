# SPDX-License-Identifier: Apache-2.0
"""The perplexities of a tiny model's checkpoint, beside transformers'."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForCausalLM

from lightllm_backend.text.tokenizer import Tokenizer
from perf import perplexity
from perf.model_directory import TOKENIZER
from perf.report.engine import perplexity_table
from perf.shapes import SHAPES

WINDOW = 48


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose head is tied to the embeddings, and sure enough of itself for its weights to matter."""
    folder: Path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    shape = SHAPES["tiny"] | {"vocab_size": 32000, "tie_word_embeddings": True, "initializer_range": 0.1}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    shutil.copyfile(TOKENIZER, folder / "tokenizer.model")
    return folder


def test_it_is_that_of_transformers(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "CASES", (("auto", "auto"), ("int4", "int8")))
    packed = "compressed-tensors, W8A16"
    monkeypatch.setattr(perplexity, "FORMATS", {packed: perplexity.FORMATS[packed]})
    out = tmp_path / "out.json"
    arguments = f"--model_dir {directory} --window {WINDOW} --windows 2 --device cpu --out {out}"
    run = CliRunner().invoke(perplexity.main, arguments.split(), catch_exceptions=False)
    assert run.exit_code == 0, run.output
    result = json.loads(out.read_text())
    plain, quantised, checkpoint = result["rows"]
    assert result["tokens"] == 2 * (WINDOW - 1)

    model = LlamaForCausalLM.from_pretrained(directory)
    text = " ".join(perplexity.TEXT.read_text().split())
    ids = torch.tensor(perplexity.windows_of(text, Tokenizer.load(directory), WINDOW)[:2])
    with torch.inference_mode():
        loss = model(ids, labels=ids).loss
    assert plain["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-3)
    assert quantised["perplexity"] != plain["perplexity"]
    assert quantised["ratio"] == pytest.approx(1.0, abs=0.3)
    assert checkpoint["perplexity"] != plain["perplexity"]
    assert checkpoint["ratio"] == pytest.approx(1.0, abs=0.01)
    assert perplexity_table(result)[-1] in run.output


def test_a_text_must_fill_a_window(directory: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    run = CliRunner().invoke(perplexity.main, ["--model_dir", str(directory), "--text", str(text)])
    assert run.exit_code == 2
    assert "short.txt has fewer than 1024 tokens" in " ".join(run.output.replace("│", " ").split())
