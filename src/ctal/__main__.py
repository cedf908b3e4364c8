"""`python -m ctal`, for launchers that start a module on every process."""

from ctal.cli import main

if __name__ == "__main__":
    main()
