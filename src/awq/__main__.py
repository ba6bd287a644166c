"""`python -m awq` is `awq`."""

from awq.cli import main

if __name__ == "__main__":
    main()
