"""`python -m launcher` is `tandem`, and `main` is the console script: it can be interrupted while the commands are still imported."""

from launcher.interruption import interruption


def main() -> None:
    """Run the command line and exit."""
    try:
        interruption.catch()
        from launcher.cli import main as run

        run()
    except BaseException:
        if interruption.number is not None:
            interruption.exit()
        raise


if __name__ == "__main__":
    main()
