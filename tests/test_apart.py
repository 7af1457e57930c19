"""A process of its own, also for scripts as people write them."""

import os
import subprocess
import sys

from trainables.apart import one_process

SCRIPT = """
import os
from trainables.apart import one_process

print("begun")
with one_process(int) as pool:
    print("apart" if pool.submit(os.getpid).result() != os.getpid() else "here")
"""


def test_a_script_needs_no_guard(tmp_path):
    """Nor does it begin once more in the process."""
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, file], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("begun\napart\n", "")


def test_the_main_module_stays_what_it_is():
    main = sys.modules["__main__"]
    with one_process(int) as pool:
        assert sys.modules["__main__"] is main
        assert pool.submit(os.getppid).result() == os.getpid()
