"""Nothing goes to anybody's server: ONNX Runtime's own telemetry is off before it is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_onnx_runtime_keeps_no_device_id_and_no_queue_of_events(tmp_path: Path):
    code = "import llmload; model = llmload.load_model(llmload.bundled_model_path())"
    code += "; llmload.StageEngine(model.config, model.weights)"
    # Where telemetry is on, merely loading the library writes both below the home folder.
    environment = {name: value for name, value in os.environ.items() if "ORT" not in name}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    ours = tmp_path / "cache" / "llmload"  # what a model's folder holds, noted by `model_cache.py`
    assert [str(path) for path in left if not path.is_relative_to(ours)] == []
