"""`python -m launcher` is `tandem`."""

from launcher.cli.main import main

main()
