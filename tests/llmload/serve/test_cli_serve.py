"""`llmload serve` as users run it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request

TIMEOUT_S = 30


def test_command_tells_where_it_serves_until_interrupted(model_folder):
    process = subprocess.Popen(
        [
            *(sys.executable, "-W", "error", "-c", "from llmload.cli import main; main()"),
            *("serve", "--model", str(model_folder), "--port", "0", "--json"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        serving = json.loads(process.stdout.readline())
        assert (serving["event"], serving["model"]) == ("serving", "model")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{serving['base_url']}/models", timeout=TIMEOUT_S) as response:
            assert json.load(response)["data"][0]["id"] == "model"
        with opener.open(serving["url"], timeout=TIMEOUT_S) as response:
            assert "default-src 'none'" in response.headers["content-security-policy"]
            assert b"<title>llmload</title>" in response.read()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=TIMEOUT_S)
        assert (process.returncode, err) == (130, "")
    finally:
        process.kill()
        process.communicate()
