# SPDX-License-Identifier: Apache-2.0
"""The server as the chart's pods run it: without rights, and with nothing to write but the chart's volumes.

A mount namespace stands in for the container, so the test needs root.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from lightllm_backend.triton_server import executable
from tests.deploy.helm import rendered
from tests.deploy.test_chart import container, pods
from tests.free_ports import free_ports
from tests.polling import poll

pytestmark = [pytest.mark.e2e, pytest.mark.soak]

ROOT = Path(__file__).parents[2]
# A root that is read-only but for the volumes. What the program needs may lie in folders that only root may enter, or
# below a volume, and is put back. $USER_ID, $MODEL, $VOLUMES and $NEEDED say what; the arguments are the program.
CONTAINER = """
set -euo pipefail
mount --make-rprivate /
mount -t tmpfs none /mnt
cp -r "$MODEL" /mnt/model
number=0
for path in $NEEDED; do mkdir /mnt/$((++number)); mount --bind "$path" /mnt/$number; done
mount -t tmpfs -o mode=755 none /root
mount -t tmpfs -o mode=755 none /home
for volume in $VOLUMES; do mkdir -p "$volume"; mount -t tmpfs -o mode=1777,exec none "$volume"; done
cp -r /mnt/model /home/lightllm/model
chmod -R a+rX /home/lightllm/model
number=0
for path in $NEEDED; do
    mkdir -p "$path"
    mount --bind /mnt/$((++number)) "$path"
    mount -o remount,ro,bind "$path"
done
umount --lazy /mnt
mount -o remount,ro /root
mount -o remount,ro /home
mount -o remount,ro,bind /
if touch /opt/x 2>/dev/null; then echo "the root can be written to"; exit 1; fi
exec setpriv --reuid "$USER_ID" --regid "$USER_ID" --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all \\
    env -i PATH="$PATH" HOME=/home/lightllm OMP_NUM_THREADS=1 "$@"
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a mount namespace")
def test_it_serves_without_rights_and_writes_to_its_volumes_alone(short_model: Path, tmp_path: Path) -> None:
    pod = pods(rendered("cpu"))["server"]
    volumes = [mount["mountPath"] for mount in container(pod)["volumeMounts"] if not mount.get("readOnly")]
    executable.command([], dict(os.environ))  # the package of Triton server for development makes its folder once
    needed = {
        ROOT,
        Path(sys.prefix),
        Path(sys.base_prefix),
        *(Path(path) for path in sys.path if "site-packages" in path),
    }
    front, http, grpc, metrics = free_ports(4)
    ports = {"openai": front, "http": http, "grpc": grpc, "metrics": metrics}
    program = [sys.executable, "-m", "lightllm_backend.serve", "--model_dir=/home/lightllm/model", "--device=cpu"]
    environment = {
        "PATH": os.environ["PATH"],
        "USER_ID": str(pod["spec"]["securityContext"]["runAsUser"]),
        "MODEL": str(short_model),
        "VOLUMES": " ".join(volumes),
        "NEEDED": " ".join(map(str, sorted(needed))),
    }
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["unshare", "--mount", "bash", "-c", CONTAINER, "container", *program]
            + [f"--{name}_port={port}" for name, port in ports.items()],
            env=environment, cwd=ROOT, stdout=output, stderr=output,
        )  # fmt: skip

    def is_ready() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{front}/health").status_code == 200
        except httpx.HTTPError:
            return process.poll() is not None

    try:
        assert poll(is_ready, 240), log.read_text(errors="replace")
        assert process.poll() is None, log.read_text(errors="replace")
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert f"Uid:\t{environment['USER_ID']}\t" in status
        assert "CapEff:\t0000000000000000" in status
        answer = httpx.post(
            f"http://127.0.0.1:{front}/v1/completions", json={"model": "model", "prompt": "Tokyo", "max_tokens": 8}
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 8
    finally:
        process.terminate()
        code = process.wait(60)
    assert code == 0, log.read_text(errors="replace")
