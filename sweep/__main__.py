"""python -m sweep"""

from sweep.cli import app

app(prog_name="python -m sweep")
