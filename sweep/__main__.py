"""python -m sweep"""

import sys

from sweep.cli import app

# A shell completes the words of a command that is ours: with this name, the script would be that of every `python`.
completes = sys.argv[1:2] in (["--show-completion"], ["--install-completion"])
app(prog_name="qlora-sweep" if completes else "python -m sweep")
