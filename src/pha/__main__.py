"""`python -m pha` is `pha`."""

from pha.cli import main

if __name__ == "__main__":
    main()
