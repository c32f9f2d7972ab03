"""`python -m launcher` is `tandem`."""

from launcher.cli import main

main()
