"""Start-up: what an installation may and may not count on."""

import os
import subprocess
import sys

ENTER = """
import os
os.access = lambda path, mode: mode != os.W_OK or str(path).startswith({temporary!r})
import volcal.units
print(os.environ.get("NUMBA_CACHE_DIR", "numba's own choice"))
from volcal.market.pricing import norm_cdf_scalar
print(norm_cdf_scalar(0.0))
"""


def start(temporary, **env):
    """What a fresh interpreter prints that imports a kernel where only `temporary` can be written to."""
    code = ENTER.format(temporary=str(temporary))
    seen = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary), **env},
    )
    assert seen.returncode == 0, seen.stderr
    return seen.stdout.split("\n")[:2]


def test_kernels_are_kept_where_nothing_else_can_be_written(tmp_path):
    folder, value = start(tmp_path)
    assert folder.startswith(str(tmp_path)) and float(value) == 0.5
    assert list((tmp_path / f"volcal-kernels-{os.getuid()}").rglob("*.nbc")), "nothing was kept"
    assert start(tmp_path)[0] == folder, "the second start looks elsewhere"


def test_a_chosen_folder_is_left_alone(tmp_path):
    chosen = tmp_path / "mine"
    assert start(tmp_path, NUMBA_CACHE_DIR=str(chosen))[0] == str(chosen)


