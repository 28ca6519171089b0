"""python -m denselab: the command line."""

from denselab.cli import main

main()
